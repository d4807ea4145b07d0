"""Pictures of a run: the table behind the rank picture, and that files appear for any kind of history."""

import math

import pytest

from hf_fastpeft.run.plots import plot_loss, plot_ranks, rank_grid


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
