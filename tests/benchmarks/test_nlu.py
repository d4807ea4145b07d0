"""The intent-classification benchmark at toy size: rows are generated, the model is a two-layer BERT."""

import json
import random

import pytest
import torch
from tiny import CACHE, VOCAB_SIZE, tiny_tokenizer
from transformers import BertConfig, BertModel

from benchmarks import nlu, nlu_data, nlu_table, nlu_worker, report
from benchmarks.nlu_methods import METHODS, head_parameters, load_from

CLASSES = ("apple", "berry", "cherry", "stone")


def write_rows(folder, name, per_class):
    """``stone`` shares no word with the fruits, which share most of theirs."""
    generator = random.Random(name)
    lines = []
    for c, label in enumerate(CLASSES):
        for _ in range(per_class):
            first, end, shared = (100, 120, "grey") if label == "stone" else (0, 9, "fruit")
            words = [f"w{60 + c}", f"w{generator.randrange(first, end)}", shared]
            generator.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": label, "domain": "x"}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return [write_rows(folder, "toy_train", 16), write_rows(folder, "toy_test", 5)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(**sizes, vocab_size=VOCAB_SIZE)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    split = {"num_classes": 3, "fit_per_class": 8, "dev_per_class": 4}
    return {
        **nlu.settings_of(False, "minilm"),
        "model": "toy",
        "model_folder": str(folder),
        "steps": 4,
        "batch": 4,
        "seeds": [1, 2],
        "extensions": 1,
        "split": split,
    }


def swept(method, best):
    return [{"phase": "sweep", "rate": r, "f1": float(r == best)} for r in METHODS[method].rates]


PREFIX = pytest.param(
    "prefix",
    marks=pytest.mark.skipif(
        CACHE == "cache", reason="PEFT 0.21 finds no cache by its old name in the classifiers of transformers 5.24"
    ),
)


@pytest.mark.parametrize("method", [PREFIX if name == "prefix" else name for name in METHODS])
def test_each_method_trains_and_is_scored(method, files, settings):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    request = {"settings": settings, "method": method, "files": files, "done": swept(method, METHODS[method].rates[1])}
    first, second = list(nlu_worker.runs(request))
    assert (first["phase"], first["seed"], second["seed"]) == ("test", 1, 2)
    assert first["rate"] == METHODS[method].rates[1]
    assert len(first["predicted"].split()) == 15
    assert all(0 <= first[score] <= 1 for score in ("precision", "recall", "f1"))
    assert first["peak_bytes"] > 1e8
    assert "peak_bytes" not in second  # that process has run before
    assert first["cpu_s_per_step"] > 0
    pruned = first["trainable_after"] < first["trainable"]
    assert pruned == (method in ("sora", "sora-r5", "sora-slow", "adalora", "adaptive", "adaptive-r7"))
    assert first["head"] == 64 * 3 + 3  # the classifier's weight and bias, whatever the method
    assert (first["trainable"] == 0) == (method == "head")


@pytest.mark.parametrize("method", ["full", "head", "lora-r8", "sora", PREFIX])
def test_the_head_steps_at_its_own_rate(method, files, settings, monkeypatch):
    seen = {}

    class Spy(nlu_worker.HeadRateTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            for group in optimizer.param_groups:
                seen.update({id(p): (group["lr"], group["weight_decay"]) for p in group["params"]})
            seen["steps"] = sum(len(group["params"]) for group in optimizer.param_groups)
            return optimizer

    monkeypatch.setattr(nlu_worker, "HeadRateTrainer", Spy)
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": c % 3} for c in range(8)]
    load = load_from(settings["model_folder"], 3)
    model, _ = nlu_worker.train(METHODS[method], load, tiny_tokenizer(), rows, settings, rate=2e-3, seed=0)
    head = head_parameters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in head] == [(3, 64), (3,)]
    rate = 2e-3 if method == "head" else settings["head_rate"]
    assert [seen[id(p)] for p in head] == [(rate, 0.01), (rate, 0.0)]  # weight, bias
    assert {seen[id(p)][0] for p in trained} - {rate} == (set() if method == "head" else {2e-3})
    assert seen["steps"] == len(trained)  # each once


def test_pruned_parameters_are_what_lora_of_that_rank_has(files, settings):
    """12 ranks pruned to a mean of 8, against plain LoRA r=8 with the same head: equal but for gates."""
    found = {}
    for method in ("lora-r8", "sora"):
        request = {
            "settings": {**settings, "seeds": [1]},
            "method": method,
            "files": files,
            "done": swept(method, 3e-3),
        }
        (found[method],) = nlu_worker.runs(request)
    modules = 2 * 6 + 1
    # in + out differ between modules, and ranks move between them
    assert found["sora"]["trainable_after"] == pytest.approx(found["lora-r8"]["trainable"] + 8 * modules, rel=0.15)


def test_rates_go_beyond_the_grid_while_the_best_is_on_its_edge():
    grid = [1e-3, 3e-3, 1e-2]
    assert nlu_worker.next_rate({}, grid, 2) == 1e-3
    assert nlu_worker.next_rate({1e-3: 0.5}, grid, 2) == 3e-3
    assert nlu_worker.next_rate({1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.6}, grid, 2) is None
    tried = {1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7}
    assert nlu_worker.next_rate(tried, grid, 2) == pytest.approx(3e-2)
    assert nlu_worker.next_rate(tried, grid, 0) is None
    tried[3e-2] = 0.8
    assert nlu_worker.next_rate(tried, grid, 2) == pytest.approx(9e-2)
    tried[9e-2] = 0.9
    assert nlu_worker.next_rate(tried, grid, 2) is None
    assert nlu_worker.next_rate({1e-3: 0.7, 3e-3: 0.7, 1e-2: 0.7}, grid, 2) == pytest.approx(3.3e-4)
    assert nlu_worker.best_rate({3e-3: 0.7, 1e-3: 0.7, 1e-2: 0.1}) == 1e-3  # the lowest on a tie


def test_runs_are_kept_and_continued(files, settings, tmp_path, monkeypatch, capsys):
    pairs = nlu_data.group_files(files)
    out = tmp_path / "results" / "nlu-quick-toy.json"
    chosen = ["head", "lora-r8"]
    real, started = nlu._process, []

    def in_process(request, keep, deadline):
        started.append((request["method"], len(request["done"])))
        for record in nlu_worker.runs(request):
            keep(record)
            if len(started) == 1 and record["phase"] == "test":
                return "exit -9: cut off"
        return None

    monkeypatch.setattr(nlu, "_process", in_process)
    result = nlu.run(settings, pairs, out, methods=chosen, jobs=1, command="run me")
    assert not result["complete"]
    assert "cut off" in str(result["runs"]["toy"]["lora-r8"])
    before = result["runs"]["toy"]["lora-r8"][:-1]
    assert "no verdict (seeds are missing): head only" in nlu_table.table(result)
    result = nlu.run(settings, pairs, out, methods=chosen, jobs=1)
    assert started[2] == ("lora-r8", len(before))
    assert result["runs"]["toy"]["lora-r8"][: len(before)] == before
    assert result["complete"]
    assert result["command"] == "run me"
    held = json.loads(out.read_text())
    assert held["data"]["toy"].keys() == {"toy_train.jsonl", "toy_test.jsonl"}

    text = report.build(report.load(out.parent), [])
    assert "### Methods on intent classification: nlu-quick-toy" in text
    assert "`run me`" in text
    assert "3 intents, 24 training rows, 4 steps of 4, 15 test rows, 2 seeds" in text
    row = result["summary"]["toy"]["head"]
    low, high = row["interval"]
    assert low <= row["difference"] <= high
    assert f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" in text
    assert "12 held-out training rows" in text

    with pytest.raises(ValueError, match="holds results of other settings"):
        nlu.run({**settings, "steps": 5}, pairs, out, methods=chosen)
    monkeypatch.setattr(nlu, "_process", real)
    late = nlu.run(settings, pairs, tmp_path / "late.json", methods=["head"], limit_s=0)
    assert late["runs"]["toy"]["head"][0]["reason"] == "not started: time is up"
    assert "| head only | failed: not started: time is up |" in nlu_table.table(late)


def result_of(wrong, kept):
    """A result of 40 rows and two seeds; ``wrong``: method -> rows a seed that it confuses."""
    gold = [i % 2 for i in range(40)]
    runs = {}
    for method, counts in wrong.items():
        tests = []
        for seed, count in enumerate(counts, 1):
            predicted = [1 - c if i < count else c for i, c in enumerate(gold)]
            f1 = nlu_data.macro(torch.tensor(gold), torch.tensor(predicted), 2)[2].item()
            tests.append({"phase": "test", "seed": seed, "f1": f1, "predicted": " ".join(map(str, predicted))})
        runs[method] = tests
    return {
        "settings": {"seeds": [1, 2]},
        "gold": {"toy": " ".join(map(str, gold))},
        "rows": {"toy": {"classes": ["a", "b"]}},
        "runs": {"toy": runs},
        "summary": {"toy": {method: {"trainable_after": count} for method, count in kept.items()}},
    }


@pytest.mark.parametrize(
    ("wrong", "kept", "says"),
    [
        ([4, 4], 70, ["+0.400 [", "], met; 70.0% of the parameters, met."]),  # F1 0.9 against 0.5
        ([4, 4], 71, ["], met; 71.0% of the parameters, missed."]),
        ([36, 36], 60, ["-0.400 [", "], missed; 60.0% of the parameters, met."]),
        ([10, 28], 60, ["+0.025 [", "], met by the mean, not resolved by the interval; 60.0%"]),
        ([10, 32], 60, ["-0.025 [", "], missed by the mean, not resolved by the interval; 60.0%"]),
        ([10], 60, ["no verdict, seeds are missing"]),
    ],
)
def test_a_target_is_met_by_interval_mean_and_parameters(wrong, kept, says):
    result = result_of({"lora-r8": [20, 20], "sora-r5": wrong}, {"lora-r8": 100, "sora-r5": kept})
    said = nlu_table.verdict(result, "toy", nlu_table.Claim("sora-r5", "lora-r8", 0.005, 0.7))
    assert said.startswith("SoRA r=8 to 5 within 0.005 of LoRA r=8 with 70% of its parameters or less: ")
    assert all(part in said for part in says), said


def test_a_loss_within_the_margin_meets_the_target():
    result = result_of({"lora-r8": [4, 4], "sora-r5": [6, 6]}, {"lora-r8": 100, "sora-r5": 50})  # 0.05 below

    def verdict(margin):
        return nlu_table.verdict(result, "toy", nlu_table.Claim("sora-r5", "lora-r8", margin, 0.7))

    assert "-0.050 [" in verdict(0.2)
    assert "], met; 50.0%" in verdict(0.2)
    assert "], missed by the mean, not resolved" in verdict(0.005)
    assert "], met by the mean, not resolved" in verdict(0.06)


def test_targets_name_methods_of_the_table():
    assert all({claim.method, claim.against} <= METHODS.keys() for claim in nlu_table.CLAIMS)
    assert sorted(nlu.ORDER) == sorted(METHODS)


def test_a_worker_is_a_process(files, settings, monkeypatch):
    request = {"settings": {**settings, "seeds": [1]}, "method": "head", "files": [str(f) for f in files]}
    records = []
    request["done"] = swept("head", METHODS["head"].rates[1])
    assert nlu._process(request, records.append, float("inf")) is None
    assert [r["phase"] for r in records] == ["test"]
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert nlu._process({**request, "done": []}, records.append, float("inf")).startswith("exit 1")


def test_what_is_missing_is_skipped_with_its_reason(files, settings, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "hf_fastpeft.callbacks.adalora", None)
    request = {"settings": settings, "method": "adalora", "files": [str(f) for f in files], "done": []}
    (tmp_path / "r.json").write_text(json.dumps(request))
    monkeypatch.setattr("sys.argv", ["nlu_worker", str(tmp_path / "r.json")])
    nlu_worker.main()
    said = json.loads(capsys.readouterr().out.removeprefix(nlu_worker.MARK))
    assert said["phase"] == "skipped"
    assert "no hf_fastpeft.callbacks.adalora.AdaLoraCallback" in said["reason"]


def test_confusable_classes_share_their_words(files):
    rows = nlu_data.read(files[0])
    assert nlu_data.confusable(rows, 3) == ["apple", "berry", "cherry"]
    assert nlu_data.confusable(rows, 9) == sorted(CLASSES)


def test_splits_are_disjoint_balanced_and_the_same_every_time(files):
    options = {"num_classes": None, "fit_per_class": 6, "dev_per_class": 4}
    split = nlu_data.load(*files, **options)
    assert split == nlu_data.load(*files, **options)
    assert [len(part) for part in (split.fit, split.dev, split.test)] == [24, 16, 20]
    train = [text for text, _ in nlu_data.read(files[0])]
    assert all([text for text, _ in split.fit + split.dev].count(t) <= train.count(t) for t in set(train))


def test_macro_scores_are_the_textbook_ones():
    gold, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1, 1])
    precision, recall, f1 = (float(v) for v in nlu_data.macro(gold, predicted, 3))
    assert precision == pytest.approx((1 + 2 / 4 + 0) / 3)
    assert recall == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert f1 == pytest.approx((0.8 + 2 / 3 + 0) / 3)
    twice = nlu_data.macro(gold, predicted, 3, torch.tensor([[2.0, 0, 1, 1, 1, 1]], dtype=torch.float64))
    again = nlu_data.macro(gold[[0, 0, 2, 3, 4, 5]], predicted[[0, 0, 2, 3, 4, 5]], 3)
    assert all(torch.equal(a, b) for a, b in zip(twice, again, strict=True))


def test_interval_holds_zero_for_equals_and_not_for_a_clear_difference():
    generator = torch.Generator().manual_seed(0)
    gold = torch.randint(4, (200,), generator=generator)

    def noisy(share):
        wrong = torch.rand(3, 200, generator=generator) < share
        return torch.where(wrong, torch.randint(4, (3, 200), generator=generator), gold)

    low, high = nlu_data.paired_interval(gold, noisy(0.3), noisy(0.3), 4, resamples=500)
    assert low < 0 < high
    low, high = nlu_data.paired_interval(gold, noisy(0.1), noisy(0.5), 4, resamples=500)
    assert 0 < low < high
    # one seed always right, one always wrong: 0.5 +- 0.5, wider by the root of 2 / (2 - 1)
    coin = torch.arange(60) % 2
    low, high = nlu_data.paired_interval(coin, torch.stack([coin, 1 - coin]), (1 - coin).expand(2, -1), 2)
    assert (low, high) == pytest.approx((0.5 - 0.5**0.5, 0.5 + 0.5**0.5))
    same = noisy(0.2)
    assert nlu_data.paired_interval(gold, same, same, 4, resamples=50) == (0, 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["toy.jsonl"], "possible names: NAME_train.jsonl"), (["toy_train.jsonl"], "toy needs both toy_train.jsonl and")],
)
def test_files_come_in_pairs(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        nlu_data.group_files([tmp_path / name for name in names])


def test_a_row_without_label_is_named(tmp_path):
    (tmp_path / "x_train.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=r"x_train.jsonl:2: a row needs 'text' and 'label'"):
        nlu_data.read(tmp_path / "x_train.jsonl")


def test_command_line_refuses_what_it_does_not_know(files, capsys):
    for arguments, message in (
        (["--data", "nothing_train.jsonl"], "no file nothing_train.jsonl"),
        (["--data", *map(str, files), "--only", "loha"], "--only: loha; possible: full, head"),
        (["--data", str(files[0])], "toy needs both"),
    ):
        with pytest.raises(SystemExit):
            nlu.main(arguments)
        assert message in capsys.readouterr().err
