"""Pictures of a run: the table behind the rank picture, and that files appear for any kind of history."""

import importlib.util
import itertools
import math

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from hf_fastpeft import AdaLoraCallback, AdaptiveLoraConfig, SoraCallback, SoraConfig, plot_ranks
from hf_fastpeft.errors import MissingPackageError
from hf_fastpeft.run import plots
from hf_fastpeft.run.plots import plot_loss, rank_grid

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.fixture
def drawn(monkeypatch):
    """The figures of a test, in order."""
    figures, make = [], plots._empty
    monkeypatch.setattr(plots, "_empty", lambda size: figures.append(make(size)) or figures[-1])
    return figures


def panels(figure):
    return {axis.get_title().partition(":")[0]: axis for axis in figure.axes if axis.get_title()}


def test_modules_become_layers_by_projections():
    kept = {f"base_model.model.model.layers.{i}.mlp.up_proj": i for i in (0, 2, 10)}
    kept["base_model.model.model.layers.2.self_attn.q_proj"] = 7
    kept["score"] = 5
    layers, projections, grid = rank_grid(kept)
    assert layers == ["0", "2", "10", "other"]
    assert projections == ["up_proj", "q_proj", "score"]
    assert grid[1][:2] == [2.0, 7.0]
    assert math.isnan(grid[0][1])
    assert grid[3][2] == 5.0


@pytest.mark.parametrize("steps", [0, 1, 20])
def test_pictures_are_written(tmp_path, steps):
    history = [{"step": i, "loss": 3 - i / 20} for i in range(1, steps + 1)] + [{"step": steps, "eval_loss": 2.0}]
    plot_loss(history, tmp_path / "loss.png", title="t", before=3.0)
    kept = {f"model.layers.{i}.mlp.{p}_proj": (i % 4, 4) for i in range(30) for p in ("up", "down")}
    ranks = [(step, dict.fromkeys(kept, 4)) for step in range(steps)]
    plot_ranks(kept, ranks, tmp_path / "ranks.png", title="t")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "ranks.png"))


def history_of(layers, steps, r=8):
    names = [f"base_model.model.model.layers.{i}.{p}" for i in range(layers) for p in PROJECTIONS]
    return [(t, {n: max(r - t * (i % 3), i % 5) for i, n in enumerate(names)}) for t in range(1, steps + 1)]


def test_every_panel_shows_its_numbers(tmp_path, drawn):
    history = history_of(3, 4)
    kept = {name: (rank, 8) for name, rank in history[-1][1].items()}
    plot_ranks(kept, history, tmp_path / "ranks.png", title="a run")
    shown = panels(drawn[0])
    assert drawn[0].get_suptitle() == "a run"
    totals = [sum(values.values()) for _, values in history]
    assert set(shown) == {
        "Ranks left per module (of 8)",
        "Mean rank of each layer, by step",
        "In total",
        "Mean rank of each projection",
    }
    assert shown["In total"].get_title() == f"In total: {totals[-1]} of {8 * 21} left"
    (curve, _) = shown["In total"].get_lines()
    assert list(curve.get_xdata()) == [1, 2, 3, 4]
    assert list(curve.get_ydata()) == totals
    (image,) = shown["Ranks left per module (of 8)"].get_images()
    want = torch.tensor(list(history[-1][1].values())).view(3, 7)
    assert torch.equal(torch.tensor(image.get_array()).long(), want)
    by_step = torch.tensor([list(values.values()) for _, values in history], dtype=torch.float64).view(4, 3, 7)
    (mesh,) = shown["Mean rank of each layer, by step"].collections
    torch.testing.assert_close(torch.tensor(mesh.get_array()).double(), by_step.mean(2).T)
    lines = shown["Mean rank of each projection"].get_lines()
    assert [line.get_label() for line in lines] == [p.rpartition(".")[2] for p in PROJECTIONS]
    torch.testing.assert_close(torch.tensor([list(line.get_ydata()) for line in lines]).double(), by_step.mean(1).T)
    (label,) = [axis.get_ylabel() for axis in drawn[0].axes if not axis.get_title()]  # the colour bar
    assert label == "rank"


def test_no_label_covers_another_at_30_layers_of_7_modules(tmp_path, drawn):
    history = history_of(30, 40)
    plot_ranks({n: (r, 8) for n, r in history[-1][1].items()}, history, tmp_path / "ranks.png", title="t")
    figure = drawn[0]
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes:
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            # Not of rotated labels: such a box is much larger than its text.
            boxes = [t.get_window_extent(renderer) for t in ticks if t.get_text() and t.get_rotation() == 0]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    titles = [axis.title.get_window_extent(renderer) for axis in figure.axes if axis.get_title()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in titles)
    left = panels(figure)["Ranks left per module (of 8)"]
    projections = [t.get_text() for t in left.get_xticklabels()]
    assert projections == [p.rpartition(".")[2] for p in PROJECTIONS]
    assert len(left.texts) == 210


def test_modules_outside_layers_and_other_adapters(tmp_path, drawn):
    kept = {"base_model.model.model.layers.0.mlp.up_proj": (2, 4), "base_model.model.lm_head": (1, 4)}
    history = [
        (step, {"default/lm_head": 4 - step, "default/model.layers.0.mlp.up_proj": 2, "other/lm_head": 9})
        for step in (1, 2, 3)
    ]
    plot_ranks(kept, history, tmp_path / "ranks.png")
    shown = panels(drawn[0])
    lines = {line.get_label(): list(line.get_ydata()) for line in shown["Mean rank of each projection"].get_lines()}
    assert lines == {"lm_head": [3, 2, 1], "up_proj": [2, 2, 2]}
    assert [t.get_text() for t in shown["Ranks left per module (of 4)"].get_yticklabels()] == ["0", "other"]
    assert list(shown["In total"].get_lines()[0].get_ydata()) == [5, 4, 3]


METHODS = {
    "SoRA": (SoraConfig(r=4, target_r=2, target_modules=["q_proj", "down_proj"], warmup_ratio=0), SoraCallback),
    "adaptive LoRA": (
        AdaptiveLoraConfig(init_r=4, target_r=2, target_modules=["q_proj", "down_proj"], delta_t=1),
        AdaLoraCallback,
    ),
    "AdaLoRA of PEFT": (
        AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj", "down_proj"], total_step=9, deltaT=1),
        AdaLoraCallback,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_model_is_drawn_from_the_callback_or_the_log(tmp_path, drawn, method):
    config, callback = METHODS[method][0], METHODS[method][1]()
    ids = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, logging_steps=2, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(get_peft_model(tiny_llama(), config), args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    curves = []
    for history in (callback.history, trainer.state.log_history):
        plot_ranks(trainer.model, history, str(tmp_path / "ranks.png"), title=method)
        shown = panels(drawn[-1])
        assert shown["In total"].get_title() == "In total: 8 of 16 left"
        curve = shown["In total"].get_lines()[0]
        curves.append((list(curve.get_xdata()), list(curve.get_ydata())))
    assert curves[0] == curves[1]
    assert curves[0][0] == [2, 4, 6, 8]
    assert curves[0][1][-1] == 8
    assert ("Mean rank of each projection" in panels(drawn[0]), "Mean rank of each projection" in shown) == (
        True,
        False,
    )


def test_a_model_whose_ranks_do_not_adapt_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"plot_ranks: adapter 'default': found no layer of PeftModel whose ranks adapt"
    ):
        plot_ranks(model, [], tmp_path / "ranks.png")


def test_a_missing_matplotlib_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="run `pip install matplotlib`"):
        plot_ranks({"a": (1, 2)}, [], tmp_path / "ranks.png")
