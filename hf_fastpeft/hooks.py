"""Whose code runs beside the modules' own: hooks, foreign forwards, modules of other packages."""

from typing import Any

from torch import nn

from hf_fastpeft.watch import Watch

__all__ = ["HOOKS", "foreign_code", "hooked", "intercepted"]

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
# Hooks of these modules look at no shape: FSDP2 gathers parameters, transformers records outputs if it was asked to.
HARMLESS_HOOKS = ("torch.distributed.fsdp.", "transformers.utils.output_capturing")
# packages whose modules write to no other module's parameters in their forward
KNOWN_PACKAGES = ("bitsandbytes", "hf_fastpeft", "peft", "torch", "transformers")


def intercepted(module: nn.Module, watch: Watch | None = None) -> str | None:
    """Why bypassing ``module.forward`` would skip somebody else's code, or None. Global hooks are the caller's."""
    state = module.__dict__
    if watch is not None:
        for name in ("forward", *HOOKS):
            watch.is_set(module, name)
    if "forward" in state:
        return f"{type(module).__name__} has a forward of its own (hook or foreign patch)"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"hooks on {type(module).__name__}"
    return None


def hooked(module: nn.Module) -> str | None:
    """Why calling ``module`` with other rows would show; hooks that look at no shape do not count."""
    state = module.__dict__
    if "forward" not in state and all(_harmless(state[name]) for name in HOOKS):
        return None
    return intercepted(module)


def _harmless(hooks: dict[int, Any]) -> bool:
    return all(str(getattr(hook, "__module__", "")).startswith(HARMLESS_HOOKS) for hook in hooks.values())


def _is_known(code: Any) -> bool:
    """By the package that defines a hook or a class; ``enable_input_require_grads`` puts such a hook on embeddings.

    A checkpoint's own code is in ``transformers_modules``, another package.
    """
    return str(getattr(code, "__module__", "")).partition(".")[0] in KNOWN_PACKAGES


def foreign_code(children: list[nn.Module], watch: Watch) -> str | None:
    """Whose code runs in the midst of a forward over ``children`` and may write to what was read before; None without.

    Walks all modules at and below them, 1 ms a thousand of them on one CPU core; the watch's look takes 0.15.
    """
    pending = [*children]
    for module in pending:  # grows on the way
        taken = [watch.is_set(module, name) for name in ("forward", *FORWARD_HOOKS)]
        if any(taken):
            if "forward" in module.__dict__:
                return intercepted(module)
            if not all(_is_known(hook) for name in FORWARD_HOOKS for hook in module.__dict__[name].values()):
                return f"hooks on {type(module).__name__}"
        if not _is_known(watch.kind(module)):
            return f"{type(module).__name__} of {type(module).__module__}"
        pending += watch.children(module)
    return None
