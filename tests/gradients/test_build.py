"""Building a store: against the one-sample loop, batches, losses, resume, bad rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from integers import IntegerModel, integer_loss, integer_rows
from ranks import run_ranks
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.gradients import job

IDENTITY = inf.Projection("identity")


def make_store(path: Path, model: nn.Module, dataset, **kwargs) -> inf.GradientStore:
    return inf.build_store(path, model, dataset, progress=False, **{"projection": IDENTITY, **kwargs})


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


_MEASURED = """
import json, sys
import torch
from integers import IntegerModel, integer_loss
import influence_fast as inf
from influence_fast._memory import peak_memory
torch.set_num_threads(1)

class Lazy:
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, row): return {"input_ids": [3 + row % 30, 5, 7, 9], "labels": row % 3}

# 3,840 bytes a row, so that all rows are more than the memory that the test allows.
model, count = IntegerModel(24), int(sys.argv[2])
settings = {"layers": "all", "projection": "identity", "loss": integer_loss, "shard_rows": 500}
expected = inf.estimate_build(model, Lazy(count), **settings).memory_bytes if len(sys.argv) > 3 else 0
inf.build_store(sys.argv[1], model, Lazy(count), progress=False, **settings)
print(json.dumps([expected, peak_memory()]))
"""


def measured(path: Path, *arguments: str) -> list[int]:
    command = [sys.executable, "-c", _MEASURED, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("task", "name"), [("classification", n) for n in models.CLASSIFIERS] + [("causal", n) for n in models.CAUSAL]
)
def test_store_equals_the_one_sample_loop(tmp_path: Path, task: str, name: str) -> None:
    model, samples = models.make(name, task), models.rows(task, count=7)
    layers = inf.select_layers(model, "attention[1:],head")
    truth = models.oracle(model, samples, layers)
    store = make_store(tmp_path / "s", model, samples, layers=layers, batch_tokens=20, shard_rows=3)
    assert (len(store), store.layers, list(store.ids)) == (7, layers, list(range(7)))
    store.verify()
    for layer in layers:
        expected = truth[layer].flatten(1)
        got = store.read(layer).double()
        assert (got - expected).norm() <= 1e-5 * expected.norm(), layer
        torch.testing.assert_close(store.sqnorm(layer), got.square().sum(1), rtol=1e-12, atol=0)
    with torch.no_grad():
        expected_loss = torch.stack([models.losses(model, models.collate([s]))[0] for s in samples])
    torch.testing.assert_close(store.column("loss"), expected_loss, rtol=1e-4, atol=1e-5)
    if task == "classification":
        answers = torch.stack([model(torch.tensor([s["input_ids"]])).logits[0].argmax() for s in samples])
        assert torch.equal(store.column("prediction"), answers)
        labels = torch.tensor([s["labels"] for s in samples])
        assert torch.equal(store.column("correct").bool(), answers == labels)


def test_losses(tmp_path: Path) -> None:
    model, samples = models.make("llama", "causal"), models.rows("causal")
    mean = make_store(tmp_path / "mean", model, samples, layers="head")
    total = make_store(tmp_path / "sum", model, samples, layers="head", loss="causal-lm-sum")
    targets = torch.tensor([len(s["input_ids"]) - 2 for s in samples])
    torch.testing.assert_close(total.read("lm_head"), mean.read("lm_head") * targets[:, None], rtol=1e-4, atol=1e-6)

    def twice(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return 2 * models.losses(network, batch)

    own = make_store(tmp_path / "own", model, samples, layers="head", loss=twice)
    torch.testing.assert_close(own.read("lm_head"), 2 * mean.read("lm_head"), rtol=1e-4, atol=1e-6)
    with pytest.raises(inf.InputError, match=r"one value per sample, shape \(1,\), got \(\)"):
        make_store(tmp_path / "bad", model, samples, layers="head", loss=lambda m, b: models.losses(m, b).sum())


def test_classifier_without_a_pad_token(tmp_path: Path) -> None:
    model, samples = models.make("gpt2"), models.rows()
    truth = models.oracle(model, samples, ["score"])["score"].flatten(1)
    model.config.pad_token_id = None
    got = make_store(tmp_path / "s", model, samples, layers="head").read("score").double()
    assert (got - truth).norm() <= 1e-5 * truth.norm()
    assert model.config.pad_token_id is None


def test_running_out_of_memory_halves_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = models.make("bert"), models.rows(count=30)
    settings = {"layers": "head,attention[0]", "batch_tokens": 90, "shard_rows": 15}
    expected = make_store(tmp_path / "a", model, samples, **settings)
    sizes = []

    def tight(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 40:
            raise torch.OutOfMemoryError

    handle = model.register_forward_pre_hook(tight, with_kwargs=True)
    got = make_store(tmp_path / "b", model, samples, **settings)
    handle.remove()
    assert max(sizes) > 40
    assert sum(size > 40 for size in sizes) <= 2, "a budget that did not fit must not be tried again"
    assert got.meta["settings"]["batch_tokens"] == 90
    for layer in expected.layers:
        torch.testing.assert_close(got.read(layer), expected.read(layer), rtol=1e-4, atol=1e-6)

    def hopeless(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise torch.OutOfMemoryError

    model.register_forward_pre_hook(hopeless, with_kwargs=True)
    with pytest.raises(inf.InfluenceError, match=r"row \d+ \(\d tokens\) does not fit in memory alone"):
        make_store(tmp_path / "c", model, samples, layers="head")


def test_peak_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    (estimated, small), (_, large) = measured(tmp_path / "a", "1000", "estimate"), measured(tmp_path / "b", "12000")
    assert large < 1.05 * small
    assert 0.75 * small < estimated < 1.25 * small


def killed_at(steps: int, path: Path) -> None:
    step, left = job._step, [steps]

    def dying(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    job._step = dying
    make_store(
        path, IntegerModel(), integer_rows(12), layers="all", projection="sjlt:32", loss=integer_loss, batch_tokens=20,
        shard_rows=4,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 5, 8, 10])
def test_resume_after_a_kill_ends_in_the_same_bytes(tmp_path: Path, steps: int, monkeypatch) -> None:
    """In integers, whose sums are exact on every machine; what is computed again goes through the same batches, so that
    other numbers have the same bits on one machine too."""
    settings = {"layers": "all", "projection": "sjlt:32", "batch_tokens": 20, "shard_rows": 4}
    model, samples = IntegerModel(), integer_rows(12)
    step, probe, batches, probed = job._step, job.Job._probe, [], []
    monkeypatch.setattr(job.Job, "_probe", lambda self, rows: (probed.append(len(rows)), probe(self, rows))[1])
    monkeypatch.setattr(job, "_step", lambda *given: (batches.append(given[4]), step(*given))[1])
    make_store(tmp_path / "whole", model, samples, loss=integer_loss, **settings)
    # The rows of the probe come first, each alone.
    whole = batches[probed[0] :]
    batches.clear()
    assert run_ranks(killed_at, steps, tmp_path / "killed", log=tmp_path / "log", ranks=1) == -signal.SIGKILL
    make_store(tmp_path / "killed", model, samples, loss=integer_loss, **settings)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    batches = batches[probed[1] :]
    assert batches == whole[-len(batches) :]
    assert len(batches) <= len(whole)


def test_resume_refuses_what_is_not_the_same(tmp_path: Path) -> None:
    model, samples = models.make("bert"), models.rows()
    make_store(tmp_path / "s", model, samples, layers="head")
    before = files(tmp_path / "s")
    for other, expected in [
        ({"projection": inf.Projection(dim=(2, 2))}, "projection"),
        ({"layers": "attention"}, "layers"),
        ({"loss": lambda m, b: models.losses(m, b)}, "loss"),
        ({"dtype": "float16"}, "dtype"),
    ]:
        with pytest.raises(inf.StoreError, match=expected):
            make_store(tmp_path / "s", model, samples, **{"layers": "head", **other})
    with pytest.raises(inf.StoreError, match="model"):
        make_store(tmp_path / "s", models.make("bert", seed=5), samples, layers="head")
    changed = [{**samples[0], "input_ids": samples[0]["input_ids"][::-1]}, *samples[1:]]
    with pytest.raises(inf.StoreError, match="data"):
        make_store(tmp_path / "s", model, changed, layers="head")
    assert files(tmp_path / "s") == before


def test_a_gradient_that_is_not_finite_names_layer_and_row(tmp_path: Path) -> None:
    model, samples = models.make("bert"), models.rows()
    ids = [f"s{i}" for i in range(5)]
    model.bert.pooler.register_full_backward_pre_hook(
        lambda module, grads: tuple(g.index_fill(0, torch.tensor([0]), float("nan")) for g in grads)
    )
    with pytest.raises(inf.InputError, match=r"bert\.pooler\.dense.*s\d"):
        make_store(tmp_path / "s", model, samples, layers=["bert.pooler.dense"], ids=ids)
    nn.init.constant_(model.classifier.bias, float("inf"))
    with pytest.raises(inf.InputError, match=r"row 's\d' has a non-finite loss"):
        make_store(tmp_path / "t", model, samples, layers="head", ids=ids)


# --------------------------------------------------------------------------------------------- appending, and streams

_GIVEN = {"loss": integer_loss, "verify": False, "shard_rows": 4}


def rows_of(count: int) -> list[dict]:
    return integer_rows(count)


def test_appended_rows_are_those_of_one_build(tmp_path: Path) -> None:
    model, rows = IntegerModel(), rows_of(15)
    whole = make_store(tmp_path / "whole", model, rows, **_GIVEN)
    make_store(tmp_path / "s", model, rows[:9], **_GIVEN)
    given = {"loss": integer_loss, "verify": False, "progress": False}
    store = inf.append_store(tmp_path / "s", model, rows[9:13], **given)
    store = inf.append_store(tmp_path / "s", model, rows[13:], earlier=rows[:9], **given)
    assert list(store.ids) == list(range(15))
    for name in whole.layers:
        assert torch.equal(store.read(name), whole.read(name))
    assert torch.equal(store.column("loss"), whole.column("loss"))
    before = files(tmp_path / "s" / "segment-00002")
    assert len(inf.append_store(tmp_path / "s", model, rows[13:], **given)) == 15, (
        "they are the last that were appended"
    )
    assert files(tmp_path / "s" / "segment-00002") == before
    store.delete([14])
    store.compact()
    assert list(inf.append_store(tmp_path / "s", model, rows[:1], **given).ids) == [*range(14), 14]


def test_what_does_not_belong_into_a_store_is_not_appended(tmp_path: Path) -> None:
    model, rows = IntegerModel(), rows_of(6)
    make_store(tmp_path / "s", model, rows, ids=list("abcdef"), **_GIVEN)
    given = {"verify": False, "progress": False}
    with pytest.raises(inf.InputError, match="loss of its own, integer_loss; pass it again"):
        inf.append_store(tmp_path / "s", model, rows, ids=list("ghijkl"), **given)
    given["loss"] = integer_loss
    with pytest.raises(inf.InputError, match="have names, such as 'a'; name the new ones too"):
        inf.append_store(tmp_path / "s", model, rows, **given)
    with pytest.raises(inf.InputError, match="ids: 'c' is that of a row"):
        inf.append_store(tmp_path / "s", model, rows, ids=list("ghicjk"), **given)
    with pytest.raises(inf.StoreError, match="another loss"):
        inf.append_store(tmp_path / "s", model, rows, ids=list("ghijkl"), **{**given, "loss": "classification"})
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(inf.StoreError, match="something else than is appended"):
        inf.append_store(tmp_path / "s", model, rows, ids=list("ghijkl"), **given)
    with pytest.raises(inf.StoreError, match="was built by another computation"):
        inf.append_store(tmp_path / "s", model, rows, ids=list("ghijkl"), earlier=rows, **given)
    assert len(inf.GradientStore.open(tmp_path / "s")) == 6


def test_an_append_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = IntegerModel(), rows_of(18)
    make_store(tmp_path / "s", model, rows[:6], **_GIVEN)
    given = {"loss": integer_loss, "verify": False, "progress": False, "shard_rows": 4}
    compute, done = job.Job.compute, []

    def stop(self, span, *rest):
        done.append(span)
        if len(done) == 3:
            raise KeyboardInterrupt
        return compute(self, span, *rest)

    monkeypatch.setattr(job.Job, "compute", stop)
    with pytest.raises(KeyboardInterrupt):
        inf.append_store(tmp_path / "s", model, rows[6:], **given)
    assert len(inf.GradientStore.open(tmp_path / "s")) == 6, "not seen before it is whole"
    done[:] = range(5)
    store = inf.append_store(tmp_path / "s", model, rows[6:], **given)
    assert len(done) < 8, "what was written is not computed again"
    whole = make_store(tmp_path / "whole", model, rows, **_GIVEN)
    assert all(torch.equal(store.read(name), whole.read(name)) for name in whole.layers)


def test_a_stream_is_built_in_segments_and_goes_on_by_its_rows(tmp_path: Path) -> None:
    model, rows = IntegerModel(), rows_of(17)
    whole = make_store(tmp_path / "whole", model, rows, **_GIVEN)
    taken = []

    def stream(last: int):
        for row in rows[:last]:
            taken.append(row)
            yield row
        if last < len(rows):
            raise ConnectionError("the source is away")

    with pytest.raises(ConnectionError):
        make_store(tmp_path / "s", model, stream(11), segment_rows=4, **_GIVEN)
    assert len(inf.GradientStore.open(tmp_path / "s")) == 8
    store = make_store(tmp_path / "s", model, stream(17), segment_rows=4, **_GIVEN)
    assert [part["rows"] for part in store.meta["segments"]] == [4, 4, 4, 4, 1]
    assert list(store.ids) == list(range(17))
    for name in whole.layers:
        assert torch.equal(store.read(name), whole.read(name))
    before = len(taken)
    assert len(make_store(tmp_path / "s", model, stream(17), segment_rows=4, **_GIVEN)) == 17
    assert len(taken) == before + 17
    store.delete([2])
    store.compact()
    more = make_store(tmp_path / "s", model, iter([*rows, *rows[:2]]), segment_rows=4, **_GIVEN)
    assert list(more.ids) == [i for i in range(19) if i != 2], "rows that were deleted are not built again"


def test_a_stream_of_another_order_is_refused(tmp_path: Path) -> None:
    model, rows = IntegerModel(), rows_of(9)
    make_store(tmp_path / "s", model, iter(rows), segment_rows=4, **_GIVEN)
    with pytest.raises(
        inf.StoreError, match="rows 4 to 7 of the stream are others than those that were built; it does not"
    ):
        make_store(tmp_path / "s", model, iter([*rows[:4], *rows[:3:-1]]), segment_rows=4, **_GIVEN)
    with pytest.raises(inf.StoreError, match="the stream has 2"):
        make_store(tmp_path / "s", model, iter(rows[:2]), segment_rows=4, **_GIVEN)
    with pytest.raises(inf.InputError, match="at least one row"):
        make_store(tmp_path / "t", model, iter([]), **_GIVEN)
    with pytest.raises(inf.InputError, match="segment_rows: expected a positive int"):
        make_store(tmp_path / "t", model, iter(rows), segment_rows=0, **_GIVEN)


def test_streaming_data_sets_with_names(tmp_path: Path) -> None:
    from datasets import IterableDataset

    model, rows = IntegerModel(), rows_of(6)
    names = [f"row {i}" for i in range(6)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    store = make_store(tmp_path / "s", model, stream, ids=iter(names), segment_rows=4, **_GIVEN)
    assert list(store.ids) == names
    with pytest.raises(inf.InputError, match="expected one for each of the 4 rows, got 2"):
        make_store(tmp_path / "t", model, stream, ids=names[:2], segment_rows=4, **_GIVEN)
