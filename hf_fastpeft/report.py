"""What was fused in a patched model, what was not and why, as JSON and as a table for people."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import bare_model
from hf_fastpeft.fast_module import FastModule

__all__ = ["describe", "report_text"]


def describe(model: nn.Module, modules: Sequence[FastModule]) -> dict[str, Any]:
    """JSON-ready: per block the modules fused now, those that are not and why, and the calls so far.

    Args:
        model: the model.
        modules: its patched modules, at least one.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for module in modules:
        site = module._fastpeft
        for name in module.blocks:
            row = blocks.setdefault(
                name, {"modules": 0, "fused": 0, "stock": Counter(), "calls_fused": 0, "calls_stock": Counter()}
            )
            row["modules"] += 1
            reason = module.obstacle(name)
            if reason is None:
                row["fused"] += 1
            else:
                row["stock"][reason] += 1
            row["calls_fused"] += site.fused[name]
            row["calls_stock"].update({why: n for (block, why), n in site.stock.items() if block == name})
    for row in blocks.values():
        row["stock"], row["calls_stock"] = dict(row["stock"]), dict(row["calls_stock"])
    site = modules[0]._fastpeft
    return {
        "model": type(bare_model(model)).__name__,
        "model_type": site.origin.model_type,
        "impl": site.impl,
        "blocks": blocks,
        "routing": _routing_of(modules),
        "skipped": dict(site.origin.skipped),
        "unmatched": list(site.origin.unmatched),
        "restored": False,
    }


def report_text(data: dict[str, Any]) -> str:
    """The report of :func:`describe` as a table for people."""
    lines = [
        f"hf_fastpeft: {data['model']} ({data['model_type']}), impl={data['impl']}"
        + (", restored; as it was before" if data["restored"] else ""),
        f"{'block':<14} {'modules':>7} {'fused':>6} {'stock':>6}   calls fused/stock",
    ]
    for name, row in data["blocks"].items():
        calls = f"{row['calls_fused']}/{sum(row['calls_stock'].values())}"
        lines.append(f"{name:<14} {row['modules']:>7} {row['fused']:>6} {sum(row['stock'].values()):>6}   {calls}")
        lines += [f"    stock now: {why} ({n} modules)" for why, n in row["stock"].items()]
        past = {why: n for why, n in row["calls_stock"].items() if why not in row["stock"]}
        lines += [f"    ran stock: {why} ({n} calls)" for why, n in past.items()]
    lines += _routing_lines(data["routing"])
    lines += [f"left alone: {path}: {why}" for path, why in data["skipped"].items()]
    lines += [f"no module of class {name}" for name in data["unmatched"]]
    return "\n".join(lines)


def _routing_of(modules: Sequence[FastModule]) -> dict[str, Any] | None:
    """What the model's head did about padding and positions without a label; None without a fused head."""
    for module in modules:
        if isinstance(module, FastCausalLM):
            return {**module._fastpeft.routing.to_json(), "obstacle": module.routing_obstacle()}
    return None


def _routing_lines(data: dict[str, Any] | None) -> list[str]:
    if data is None:
        return []
    padding, last = data["padding"], data["last_layer"]
    lines = [
        f"padding removed in {padding['calls']} calls ({padding['of'] - padding['rows']} of {padding['of']} tokens)",
        f"last layer ran on labelled positions in {last['calls']} calls ({last['rows']} of {last['of']} tokens)",
    ]
    if data["second_forwards"]:
        lines.append(f"    run once more for logits that were read: {data['second_forwards']} calls")
    if data["obstacle"] is not None:
        lines.append(f"    every position now: {data['obstacle']}")
    past = {why: n for why, n in data["unrouted"].items() if why != data["obstacle"]}
    return lines + [f"    every position: {why} ({n} calls)" for why, n in past.items()]
