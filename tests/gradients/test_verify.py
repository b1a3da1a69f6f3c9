"""Whatever a model does with its weights, a store holds each sample's own gradient, or the build refuses."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import influence_fast as inf

WIDTH, CLASSES = 6, 3


class Base(nn.Module):
    """An embedding, something in between, a head; called like a classifier of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.encode(self.embed(input_ids)) * attention_mask[..., None]
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight.tanh(), self.bias)


class ScaledWeight(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = Scaled(WIDTH, WIDTH)


class UserHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(lambda module, args, output: 3 * output)


class UsedElsewhere(Base):
    """The body's weight is used once through its module and once as a matrix; the embedding's is the head's too."""

    def encode(self, x: Tensor) -> Tensor:
        return (
            torch.tanh(nn.functional.linear(self.body(x), self.body.weight)) @ self.embed.weight.T @ self.embed.weight
        )


class NeverCalled(Base):
    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.body.weight.T)


class SequenceFirst(Base):
    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x.transpose(0, 1))).transpose(0, 1)


class TokenMajor(Base):
    def encode(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        return torch.tanh(self.body(x.transpose(0, 1).reshape(t * n, -1))).view(t, n, -1).transpose(0, 1)


class TwoViews(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        both = torch.cat([x, x.flip(1)])
        one, other = self.encode(both).chunk(2)
        return self.head(((one * other) * attention_mask[..., None]).sum(1))


class SharedTable(Base):
    """A table of positions goes through the body once for the whole batch, as relative attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(8, WIDTH))

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.body(self.positions).mean(0))


class Reparametrised(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = weight_norm(nn.Linear(WIDTH, WIDTH))


class OtherLayers(Base):
    """Norms, a convolution, a recurrent cell, attention with one input matrix, a bilinear form, a bare vector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.pair = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def encode(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(x)) * self.gain
        x = self.cell(x)[0] + self.attention(x, x, x, need_weights=False)[0]
        return self.pair(x, self.conv(x.mT).mT)


EQUAL = [SequenceFirst, TokenMajor, OtherLayers]
MODELS = [ScaledWeight, UserHook, UsedElsewhere, NeverCalled, SequenceFirst, TokenMajor, TwoViews, SharedTable]
MODELS += [Reparametrised, OtherLayers]


def rows(kind: Callable[[], nn.Module], count: int = 8, square: bool = False) -> list[dict]:
    """Ragged rows; of one length for models that do not mask, and as many as tokens where the two could be confused."""
    if not square and kind not in EQUAL:
        return models.rows(count=count)
    made = models.rows(count=count, longest=4)
    random = torch.Generator().manual_seed(1)
    for row in made:
        row["input_ids"] = torch.randint(3, models.VOCAB, (count,), generator=random).tolist()
    return made


def literal(model: nn.Module, given: list[dict], names: list[str]) -> dict[str, Tensor]:
    """``autograd.grad`` of one row at a time, in a batch of one."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    weights = [parameters.get(name, getattr(modules.get(name), "weight", None)) for name in names]
    out: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in given:
        ids = torch.tensor([row["input_ids"]])
        loss = nn.functional.cross_entropy(model(ids, torch.ones_like(ids)), torch.tensor([row["labels"]]))
        for name, grad in zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            found = torch.zeros_like(weights[names.index(name)]) if grad is None else grad
            out[name].append((found.T if isinstance(modules.get(name), nn.Embedding) else found).flatten())
    return {name: torch.stack(grads) for name, grads in out.items()}


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_each_sample_has_its_own_gradient(kind: Callable[[], nn.Module], square: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = kind().eval(), rows(kind, square=square)
    store = inf.build_store(tmp_path / "s", model, given, "trained", "identity", progress=False)
    assert (
        store.meta["facts"]["covered"] == store.meta["facts"]["trained"] == sum(p.numel() for p in model.parameters())
    )
    truth = literal(model, given, store.layers)
    for name, expected in truth.items():
        torch.testing.assert_close(store.read(name), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("projection", ["rademacher:2x2", "sjlt:5", "gaussian:3"])
def test_the_slow_way_projects_as_the_fast_one(projection: str, tmp_path: Path) -> None:
    """Hooks and autograd give the same kept numbers, for matrices, vectors and what has more dimensions."""
    torch.manual_seed(0)
    model, given = OtherLayers().eval(), rows(OtherLayers)
    report = inf.verify_capture(model, given, "classification", "trained", projection)
    assert report.ok
    assert {"body", "head", "norm.weight", "body.bias", "conv.weight", "conv.bias"}.isdisjoint(report.exact)
    assert {"cell.weight_ih_l0", "attention.in_proj_weight", "pair.weight", "gain"} <= set(report.exact)
    fast = inf.build_store(tmp_path / "fast", model, given, "body,norm.weight", projection, progress=False)
    slow = inf.build_store(tmp_path / "slow", model, given, "trained", projection, progress=False)
    for name in fast.layers:
        torch.testing.assert_close(fast.read(name), slow.read(name), rtol=1e-4, atol=1e-6)


def test_a_plain_model_takes_the_fast_way_and_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, given = models.make("bert"), models.rows()
    with caplog.at_level(logging.WARNING, "influence_fast"):
        store = inf.build_store(tmp_path / "s", model, given, "trained", progress=False)
    assert caplog.records == []
    assert "one_row" not in store.meta["settings"]
    assert store.meta["facts"]["verified"]["rows"]


def test_the_slow_way_is_said_once_and_can_be_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, given = OtherLayers().eval(), rows(OtherLayers)
    layers = ["body", "head", "cell.weight_ih_l0"]
    with caplog.at_level(logging.WARNING, "influence_fast"):
        store = inf.build_store(tmp_path / "s", model, given, layers, progress=False)
    [said] = [message for message in caplog.messages if "one sample a batch" in message]
    assert re.search(r"1 of 3 layers by autograd, about [\d.e+]+ rows a second: .*torch.func cannot run", said)
    assert store.meta["settings"]["one_row"] is True
    assert store.meta["settings"]["exact"] == ["cell.weight_ih_l0"]
    with pytest.raises(inf.InputError, match="strict: a slower way is needed"):
        inf.build_store(tmp_path / "t", model, given, layers, progress=False, strict=True)
    assert not (tmp_path / "t").exists()


def test_autograd_takes_several_rows_where_torch_func_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, given = ScaledWeight().eval(), rows(ScaledWeight)
    with caplog.at_level(logging.WARNING, "influence_fast"):
        store = inf.build_store(tmp_path / "s", model, given, "all", progress=False)
    [said] = [message for message in caplog.messages if "by autograd" in message]
    assert "1 of 3 layers by autograd, about" in said
    assert "one_row" not in store.meta["settings"]
    assert store.meta["settings"]["exact"] == ["body"]
    with pytest.raises(inf.InputError, match="strict: a slower way is needed, for layer 'body'"):
        inf.build_store(tmp_path / "t", model, given, "all", progress=False, strict=True)


@pytest.mark.parametrize(
    ("kind", "places"),
    [(SequenceFirst, {"body": "second"}), (TokenMajor, {"body": "parts"}), (TwoViews, {"body": "parts"})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_samples_are_found_where_they_are(kind: Callable[[], nn.Module], places: dict[str, str]) -> None:
    torch.manual_seed(0)
    report = inf.verify_capture(kind().eval(), rows(kind), "classification", "body,head", strict=True)
    assert report.layouts == places
    assert not report.one_row
    assert report.exact == []


@pytest.mark.parametrize("kind", [UsedElsewhere, NeverCalled, UserHook], ids=lambda kind: kind.__name__)
def test_uses_of_a_weight_are_followed(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    report = inf.verify_capture(kind().eval(), rows(kind), "classification", "all", strict=True)
    assert "body" in report.followed
    assert not report.one_row
    assert report.exact == []


def test_a_loss_that_is_no_rows_own_is_refused(tmp_path: Path) -> None:
    def noisy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none") * torch.rand(len(logits))

    with pytest.raises(inf.InputError, match=r"loss: that of row \d differs from one forward"):
        inf.build_store(tmp_path / "s", Base().eval(), models.rows(), "body,head", loss=noisy, progress=False)
    assert not (tmp_path / "s").exists()


def test_trained_parameters_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, given = models.make("bert", lora=True), models.rows()
    with caplog.at_level(logging.WARNING, "influence_fast"):
        inf.build_store(tmp_path / "s", model, given, "lora", progress=False)
    [said] = [record.getMessage() for record in caplog.records]
    assert "trained parameters that no selected layer covers: base_model.model.classifier" in said
    with pytest.raises(inf.InputError, match=r"none of the [\d,]+ trained numbers is in the selected layers"):
        inf.build_store(tmp_path / "t", model, given, "embedding", progress=False)
    # Named one by one they are meant.
    caplog.clear()
    inf.build_store(tmp_path / "t", model, given, inf.select_layers(model, "embedding")[:1], progress=False)
    assert "no selected layer covers" in caplog.text


def test_capture_by_hand_tells_what_it_cannot_see() -> None:
    model = ScaledWeight().eval()
    ids = torch.tensor([[3, 4, 5]])
    with (
        inf.GradientCapture(model, "body") as capture,
        pytest.raises(inf.InputError, match=r"layer 'body': the output of its Scaled is not that of a plain layer"),
    ):
        model(ids, torch.ones_like(ids))
    with inf.GradientCapture(model, "body", exact=["body"]) as capture:
        model(ids, torch.ones_like(ids)).sum().backward()
        assert capture.pop()["body"].shape == (1, WIDTH * WIDTH)
        two = ids.repeat(2, 1)
        model(two, torch.ones_like(two)).sum().backward()
        with pytest.raises(inf.InputError, match=r"takes one sample a batch, got 2"):
            capture.pop()
    assert model.body.weight.grad is None


def test_groups_of_parameters() -> None:
    model = OtherLayers()
    assert inf.select_layers(model, "norm") == ["norm.weight", "norm.bias"]
    assert inf.select_layers(model, "conv") == ["conv.weight"]
    assert "body.bias" in inf.select_layers(model, "bias")
    assert "gain" in inf.select_layers(model, "other")
    assert inf.select_layers(model, "body,norm") == ["body", "norm.weight", "norm.bias"]
    model.requires_grad_(False)
    model.gain.requires_grad_(True)
    assert inf.select_layers(model, "trained") == ["gain"]


class Routed(Base):
    """Experts that see the tokens routed to them alone, of whatever sample."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def encode(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = self.body(flat)[:, :3].argmax(1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(flat[rows]))
        return (out + self.body(flat)).view_as(x)


def test_experts_of_a_mixture_take_the_slow_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = Routed().eval(), models.rows(count=6)
    store = inf.build_store(tmp_path / "s", model, given, "all", "identity", progress=False)
    assert {"experts.0", "experts.1", "experts.2"} <= set(store.layers)
    assert store.meta["settings"]["one_row"] is True
    for name, expected in literal(model, given, store.layers).items():
        torch.testing.assert_close(store.read(name), expected, rtol=1e-4, atol=1e-6)
    ids = torch.tensor([[3, 4], [5, 6]])
    with (
        inf.GradientCapture(model, "all"),
        pytest.raises(inf.InputError, match=r"experts.\d.*one expert of a mixture.*takes one sample a batch, got 2"),
    ):
        model(ids, torch.ones_like(ids))
