"""Random sequences of PEFT operations on gated layers; after each, the logits are those of the formula in float64."""

import copy
import pickle
import random

import pytest
import torch
from methods import METHODS, PREFIX, reference_llama
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny import tiny_llama

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # what PEFT says when the walk asks for nothing
    pytest.mark.filterwarnings("ignore:Already unmerged. Nothing to do:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning"),
]

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
BASE = tiny_llama(torch.float64)
WEIGHTS = {name: tensor.clone() for name, tensor in BASE.state_dict().items()}


class Walk:
    """A model, and beside it what the operations so far must have made of it.

    Attributes:
        factor: of each adapter, by what its scaling was multiplied.
        merged: path -> weight change in the base weight; such a layer's forward asks for no adapter.
    """

    def __init__(self, method, seed, folder):
        self.method, self.folder, self.random = method, folder, random.Random(seed)
        torch.manual_seed(seed)
        config = self.config()
        self.model = get_peft_model(
            tiny_llama(torch.float64), config, adapter_name="first", autocast_adapter_dtype=False
        )
        self.model.eval()
        self.factor, self.merged, self.enabled, self.count = {"first": 1.0}, {}, True, 0
        self.write("first")

    def config(self):
        pick = self.random.choice
        settings = {
            "r": pick([2, 4]),
            "lora_alpha": pick([2, 6]),
            "target_modules": pick([["q_proj", "down_proj"], ["q_proj"], ["v_proj", "down_proj"]]),
            "use_rslora": pick([True, False]),
            "rank_pattern": pick([{}, {r".*layers\.1\..*": 1}]),
            "lora_dropout": pick([0.0, 0.5]),
        }
        return self.method.config(**settings)

    @property
    def layers(self):
        return {p.removeprefix(PREFIX): m for p, m in self.model.named_modules() if isinstance(m, LoraLayer)}

    @property
    def adapters(self):
        return list(self.model.peft_config)

    def some(self):
        return self.random.choice(self.adapters)

    # ---- what must come out

    def changes(self, adapter):
        """Path -> weight change of the adapter, from its saved tensors."""
        tensors = get_peft_model_state_dict(self.model, adapter_name=adapter)
        config, found = self.model.peft_config[adapter], {}
        for key in tensors:
            if not key.endswith(".lora_A.weight"):
                continue
            path = key.removesuffix(".lora_A.weight")
            a, b = (tensors[f"{path}.lora_{part}.weight"] for part in "AB")
            gate = tensors.get(f"{path}.lora_A.gate.weight", torch.ones(len(a)))
            r = len(a)
            scaling = config.lora_alpha / (r**0.5 if config.use_rslora else r) * self.factor[adapter]
            gate = gate.double() * getattr(config, "gate_scale", 1.0)
            found[path.removeprefix(PREFIX)] = scaling * b.double() @ torch.diag(gate) @ a.double()
        return found

    def expected(self):
        weights = {name: tensor.double() for name, tensor in WEIGHTS.items()}
        if self.enabled:
            found = [changes.items() for changes in map(self.changes, self.model.active_adapters)]
            acting = [(path, change) for items in found for path, change in items if path not in self.merged]
            for path, change in [*acting, *self.merged.items()]:
                weights[f"{path}.weight"] = weights[f"{path}.weight"] + change
        return reference_llama(weights, IDS, BASE.config, {})

    def check(self):
        with torch.no_grad():
            got, want = self.model(IDS).logits, self.expected()
        if not self.enabled:
            self.merged = {}  # a forward with disabled adapters unmerges
        assert (got - want).norm() / want.norm() < 1e-6  # transformers' norms round to float32

    # ---- what may happen

    def write(self, adapter=None):
        adapter = adapter or self.some()
        if self.merged:  # unmerging would take out what is there now
            return
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if f".{adapter}." in name:
                    p.copy_(torch.randn(p.shape, dtype=p.dtype) * (0.3 if p.dim() > 1 else 0.02))
                    if p.dim() == 1 and self.random.random() < 0.5:
                        p[0] = 0

    def add(self):
        if self.merged or not self.enabled:  # PEFT leaves layers that are new to the model enabled and unmerged
            return
        name = f"walk{self.count}"
        self.count += 1
        self.model.add_adapter(name, self.config(), autocast_adapter_dtype=False)
        self.factor[name] = 1.0
        self.write(name)
        self.model.to(torch.float64)
        self.model.eval()

    def delete(self):
        if len(self.adapters) > 1 and not self.merged:
            name = self.some()
            self.model.delete_adapter(name)
            del self.factor[name]
            # layers of which the deleted one was the only active adapter have each taken one that they have
            self.model.set_adapter(self.some())

    def set_one(self):
        if not self.merged:
            self.model.set_adapter(self.some(), inference_mode=self.random.random() < 0.5)

    def set_several(self):
        if not self.merged:
            chosen = self.random.sample(self.adapters, self.random.randint(1, len(self.adapters)))
            self.model.base_model.set_adapter(chosen)

    def merge(self):
        if self.merged or not self.enabled:
            return
        names = self.random.choice([None, [self.some()], self.adapters])
        self.model.merge_adapter(adapter_names=names, safe_merge=self.random.random() < 0.5)
        for changes in map(self.changes, names or self.model.active_adapters):
            for path, change in changes.items():
                self.merged[path] = self.merged.get(path, 0) + change

    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = {}

    def switch(self):
        self.enabled = not self.enabled
        act = "enable_adapter_layers" if self.enabled else "disable_adapter_layers"
        getattr(self.model.base_model, act)()

    def scale(self):
        name, scale = self.some(), self.random.choice([0.5, 2.0, 0.25])
        if not self.merged:
            for layer in self.layers.values():
                layer.set_scale(name, scale)
            self.factor[name] = scale

    def multiply_scale(self):
        if not self.merged:
            for layer in self.layers.values():
                layer.scale_layer(2.0)
            for name in self.model.active_adapters:
                self.factor[name] *= 2.0

    def copied(self):
        self.model = copy.deepcopy(self.model)

    def pickled(self):
        self.model = pickle.loads(pickle.dumps(self.model))  # noqa: S301  our own bytes

    def state_dict(self):
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name in self.adapters:
            self.write(name)
        self.model.load_state_dict(state)

    def requires_grad(self):
        self.model.set_requires_grad(self.some(), self.random.random() < 0.5)

    def modes(self):
        self.model.train()
        self.model.eval()

    def dtypes(self):
        self.model.double()

    def saved(self):
        """The adapter through a file, under another name, its scaling as configured."""
        if self.merged or not self.enabled:
            return
        name, again = self.some(), f"walk{self.count}"
        self.count += 1
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        folder = self.folder / name
        low = self.random.random() < 0.5
        self.model.load_adapter(
            folder, again, is_trainable=self.random.random() < 0.5, low_cpu_mem_usage=low, autocast_adapter_dtype=False
        )
        self.factor[again] = 1.0
        self.model.eval()

    def loaded(self):
        """A model anew from the file of one adapter."""
        if self.merged or not self.enabled:
            return
        name = self.some()
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        self.model = PeftModel.from_pretrained(
            tiny_llama(torch.float64),
            self.folder / name,
            adapter_name=name,
            low_cpu_mem_usage=self.random.random() < 0.5,
            autocast_adapter_dtype=False,
            is_trainable=self.random.random() < 0.5,
        ).eval()
        self.factor = {name: 1.0}


STEPS = [
    *("write", "add", "delete", "set_one", "set_several", "merge", "unmerge", "switch", "scale", "multiply_scale"),
    *("copied", "pickled", "state_dict", "requires_grad", "modes", "dtypes", "saved", "loaded"),
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["LORA", "SORA", "ADAPTIVE_LORA"])
def test_logits_are_the_formula_s_after_each_operation(name, seed, tmp_path):
    walk, taken = Walk(METHODS[name], seed, tmp_path), []
    walk.check()
    for _ in range(30):
        taken.append(walk.random.choice(STEPS))
        getattr(walk, taken[-1])()
        try:
            walk.check()
        except AssertionError as error:
            raise AssertionError(f"after {taken}") from error
