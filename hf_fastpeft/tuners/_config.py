"""What the configurations of gated methods share: the checks of LoRA's own fields, and the note in the model card."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

__all__ = ["NOT_PLAIN_LORA", "check", "is_int", "write_card", "wrong_lora_settings"]

# On a field that is always truthy: PEFT's own LoRA layers then refuse a configuration that was not made for them
# ("unsupported variant combination"), where LoraModel or X-LoRA would build plain LoRA from it.
NOT_PLAIN_LORA = {"is_lora_variant": True}

_CARD = """{heading}

{method} is not part of PEFT. Import the package that provides it first; `PeftModel.from_pretrained` raises
`KeyError: '{peft_type}'` without it.

```python
import hf_fastpeft

model = hf_fastpeft.load_adapter("path/to/this/folder")
```

To serve the adapter where `hf_fastpeft` is not installed, write it as plain LoRA (the gates fold into the matrices):

```python
hf_fastpeft.export_to_lora(model, "path/to/plain-lora")
```
"""


def write_card(folder: str, method: str, peft_type: str) -> None:
    """Say in the folder's model card, once, what loading the adapter takes."""
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    heading = f"## Loading this {method} adapter"
    if heading not in text:
        note = _CARD.format(heading=heading, method=method, peft_type=peft_type)
        card.write_text(f"{text.rstrip()}\n\n{note}".lstrip(), encoding="utf-8")


def check(config: Any, wrong: list[str], name: str, ok: Callable[[Any], Any], possible: str) -> None:
    """Append a message to ``wrong`` unless field ``name`` satisfies ``ok``; values of another kind do not."""
    value = getattr(config, name)
    try:
        good = bool(ok(value))
    except TypeError:
        good = False
    if not good:
        wrong.append(f"{name}={value!r}: {possible}")


def wrong_lora_settings(config: LoraConfig, inits: Sequence[object]) -> list[str]:
    """Settings of LoRA that have no gated form, one message each."""
    wrong = [
        f"{f.name}={getattr(config, f.name)!r}: this LoRA variant has no gated form; leave it at its default"
        for f in fields(LoraConfig)
        if f.metadata.get("is_lora_variant") and getattr(config, f.name)
    ]
    if config.init_lora_weights not in inits:
        wrong.append(
            f"init_lora_weights={config.init_lora_weights!r}: changes the base weights or freezes a factor; "
            f"possible: {', '.join(map(repr, inits))}"
        )
    if config.bias != "none" or config.lora_bias:
        wrong.append(
            f"bias={config.bias!r}, lora_bias={config.lora_bias!r}: a bias is not gated, so a pruned layer would keep "
            "it; possible: bias='none', lora_bias=False"
        )
    if config.use_qalora or config.megatron_config:
        wrong.append("use_qalora, megatron_config: no gated layer; leave them at their defaults")
    if config.target_parameters:
        wrong.append(f"target_parameters={config.target_parameters!r}: only linear layers; use target_modules")
    return wrong


def is_int(value: object) -> bool:
    """An integer that is no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
