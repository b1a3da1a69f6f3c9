"""Captured gradients against the literal float64 loop, on every architecture, batch, padding side and projection."""

from __future__ import annotations

import contextlib
import copy

import models
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import influence_fast as inf
from influence_fast import ops
from influence_fast.gradients.model_state import fingerprint

IDENTITY = inf.Projection("identity")


def captured(model: nn.Module, batch: dict[str, Tensor], layers: object = "all", projection=IDENTITY, **kwargs):
    with inf.GradientCapture(model, layers, projection, **kwargs) as capture:
        models.losses(model, batch).sum().backward()
        return capture.pop()


def assert_close(got: dict[str, Tensor], truth: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert list(got) == list(truth)
    for name, expected in truth.items():
        error = (got[name].double() - expected.flatten(1)).norm()
        assert error <= relative * expected.norm(), f"{name}: relative error {error / expected.norm():.1e}"


def projected(truth: dict[str, Tensor], projection: inf.Projection) -> dict[str, Tensor]:
    out = {}
    for name, gradient in truth.items():
        o, i = gradient.shape[1:]
        if projection.two_sided:
            left = projection.side(name, "left", o).matrix(torch.float64)
            right = projection.side(name, "right", i).matrix(torch.float64)
            out[name] = left @ gradient @ right.T
        else:
            out[name] = gradient.flatten(1) @ projection.side(name, "single", o * i).matrix(torch.float64).T
    return out


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(
    ("task", "name"),
    [("classification", n) for n in models.CLASSIFIERS] + [("causal", n) for n in models.CAUSAL],
)
def test_every_layer_equals_the_one_sample_loop(task: str, name: str, lora: bool) -> None:
    model, samples = models.make(name, task, lora), models.rows(task)
    layers = inf.select_layers(model)
    truth = models.oracle(model, samples, layers)
    assert all(gradient.norm() > 0 for gradient in truth.values())
    # BERT reads its answer off the first token, and RoBERTa numbers positions by the pads: neither pads on the left.
    for side in ("right",) if name in ("bert", "roberta") else ("right", "left"):
        assert_close(captured(model, models.collate(samples, side)), truth)


@pytest.mark.parametrize("projection", ["rademacher:5x3", "gaussian:4x6", "sjlt:5x3:seed7", "sjlt:64", "rademacher:9"])
@pytest.mark.parametrize(("name", "task"), [("bert", "classification"), ("gpt2", "causal")])
def test_projected_gradients(name: str, task: str, projection: str) -> None:
    model, samples = models.make(name, task), models.rows(task)
    chosen = inf.Projection.parse(projection)
    truth = models.oracle(model, samples, inf.select_layers(model))
    got = captured(model, models.collate(samples), projection=chosen)
    assert {g.shape[1] for g in got.values()} == {chosen.output_dim((1, 1))}
    assert_close(got, projected(truth, chosen))


def test_batch_mates_do_not_matter() -> None:
    model, samples = models.make("llama"), models.rows(count=6)
    together = captured(model, models.collate(samples))
    for index in (0, 5):
        alone = captured(model, models.collate([samples[index]]))
        for name, gradient in alone.items():
            torch.testing.assert_close(gradient[0], together[name][index], rtol=1e-4, atol=1e-6)


def test_tied_weight_has_the_sum_over_its_uses() -> None:
    model, samples = models.make("gpt2", "causal"), models.rows("causal")
    assert model.lm_head.weight is model.transformer.wte.weight
    got = captured(model, models.collate(samples), ["transformer.wte", "lm_head"])
    head = got["lm_head"].view(len(samples), models.VOCAB, -1)
    torch.testing.assert_close(head, got["transformer.wte"].view(len(samples), -1, models.VOCAB).mT)


def test_bias_is_one_more_input() -> None:
    model, samples = models.make("bert"), models.rows()
    truth = models.oracle(model, samples, ["classifier"])["classifier"]
    got = captured(model, models.collate(samples), ["classifier"], bias=True)["classifier"].view(5, 3, 17)
    torch.testing.assert_close(got[:, :, :16].double(), truth, rtol=1e-4, atol=1e-6)
    probability = model(**{k: v for k, v in models.collate(samples).items() if k != "labels"}).logits.softmax(-1)
    one_hot = nn.functional.one_hot(models.collate(samples)["labels"], 3)
    torch.testing.assert_close(got[:, :, 16], probability - one_hot, rtol=1e-4, atol=1e-6)


def test_float64_model_gives_float64() -> None:
    model, samples = models.make("bert"), models.rows()  # one without rotations, which are float32 always
    truth = models.oracle(model, samples, inf.select_layers(model))
    got = captured(model.double(), models.collate(samples), projection=inf.Projection(dim=(4, 4)))
    assert {g.dtype for g in got.values()} == {torch.float64}
    assert_close(got, projected(truth, inf.Projection(dim=(4, 4))), 1e-12)


def test_frozen_weights_and_an_early_end_of_the_backward() -> None:
    model, samples = models.make("bert"), models.rows()
    truth = models.oracle(model, samples, inf.select_layers(model, "attention[3]"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    visited: list[str] = []
    model.bert.encoder.layer[2].output.register_forward_hook(lambda m, a, out: visited.append(str(out.requires_grad)))
    assert_close(captured(model, models.collate(samples), "attention[3]"), truth)
    assert visited == ["False"], "blocks below the lowest selected layer must keep no graph"


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("projection", ["identity", "rademacher:5x3", "sjlt:5x3", "sjlt:32"])
def test_autocast_lowers_the_model_alone(projection: str, inside: bool) -> None:
    model, batch = models.make("llama", "causal"), models.collate(models.rows("causal"))
    chosen, layers = inf.Projection.parse(projection), inf.select_layers(model, "attention,mlp")
    truth = models.oracle(model, models.rows("causal"), layers)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str):
        def hook(module: nn.Module, grad_in: object, grad_out: tuple[Tensor]) -> None:
            seen[name] = (seen[name][0], grad_out[0].detach())

        return hook

    for name in layers:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args[0].detach(), out)))
        module.register_full_backward_hook(watch(name))
    with inf.GradientCapture(model, layers, chosen) as capture:
        with torch.autocast("cpu", torch.bfloat16):
            loss = models.losses(model, batch).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        got = capture.pop()
    expected = {name: dy.double().mT @ x.double() for name, (x, dy) in seen.items()}
    wanted = expected if projection == "identity" else projected(expected, chosen)
    for name in layers:
        assert got[name].dtype == torch.float32
        # Float32 arithmetic on what bfloat16 forward and backward gave: thousands of times closer than bfloat16 is.
        error = (got[name].double() - wanted[name].flatten(1)).norm() / wanted[name].norm()
        assert error < 1e-5, name
        assert (expected[name].flatten() - truth[name].flatten()).norm() < 0.1 * truth[name].norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, samples = models.make("llama", "causal"), models.rows("causal")
    truth = models.oracle(model, samples, inf.select_layers(model, "attention,mlp"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.model.embed_tokens.weight.requires_grad_(True)
    model.train()  # checkpointing is a habit of training; these models have no dropout
    assert_close(captured(model, models.collate(samples), "attention,mlp"), truth)


def test_the_model_is_left_as_found() -> None:
    model, batch = models.make("bert"), models.collate(models.rows())
    model.classifier.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()], model.training
    captured(model, batch)
    with contextlib.suppress(ZeroDivisionError), inf.GradientCapture(model, "all", IDENTITY):
        models.losses(model, batch).sum().backward()
        raise ZeroDivisionError
    after = model.state_dict(), [p.requires_grad for p in model.parameters()], model.training
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_works_beside_training() -> None:
    model, batch = models.make("bert"), models.collate(models.rows())
    models.losses(model, batch).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = captured(model, batch)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])
    torch.testing.assert_close(got["classifier"].sum(0).view(3, 16), expected["classifier.weight"])


def test_shared_module_called_twice_adds_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.relu(self.inner(x)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 5, 4)
    with inf.GradientCapture(model, "all", IDENTITY) as capture:
        model(x).square().sum().backward()
        got = capture.pop()["inner"]
    for row in range(3):
        (expected,) = torch.autograd.grad(model(x[row : row + 1]).square().sum(), model.inner.weight)
        torch.testing.assert_close(got[row], expected.flatten())


def test_in_place_activation_behind_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).requires_grad_(False)
    x = torch.randn(3, 4)
    with inf.GradientCapture(model, "all", IDENTITY) as capture:
        model(x).square().sum().backward()
        got = capture.pop()
    model.requires_grad_(True)
    for row in range(3):
        grads = torch.autograd.grad(model(x[row : row + 1]).square().sum(), [model[0].weight, model[2].weight])
        for name, expected in zip(("0", "2"), grads, strict=True):
            torch.testing.assert_close(got[name][row], expected.flatten())


def test_unused_layer_has_zeros_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = models.make("bert")
    model.spare = nn.Linear(2, 2)
    got = captured(model, models.collate(models.rows()), ["classifier", "spare"])
    assert got["spare"].abs().sum() == 0
    assert "spare" in caplog.text


def test_errors_name_what_is_wrong() -> None:
    model, batch = models.make("bert"), models.collate(models.rows())
    with pytest.raises(inf.InputError, match=r"no layer is named 'nope'.*classifier"):
        inf.GradientCapture(model, ["nope"], IDENTITY)
    with inf.GradientCapture(model, "head", IDENTITY) as capture:
        with pytest.raises(inf.InputError, match="no gradient has arrived"):
            capture.pop()
        models.losses(model, batch).sum().backward()
        with pytest.raises(inf.InputError, match=r"pop\(\) the gradients"):
            model(batch["input_ids"])
        capture.pop()
        with torch.no_grad():
            model(batch["input_ids"])


@pytest.mark.parametrize("ids", [(5,), (1, 5)])
def test_positions_that_come_once_have_a_gradient_for_each_sample(ids: tuple[int, ...]) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.head(x + self.embed(torch.arange(x.shape[1]).view(ids))))

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(3, 5, 4)
    with inf.GradientCapture(model, "all", IDENTITY) as capture:
        model(x).square().sum().backward()
        got = capture.pop()
    for row in range(3):
        table, head = torch.autograd.grad(
            model(x[row : row + 1]).square().sum(), [model.embed.weight, model.head.weight]
        )
        torch.testing.assert_close(got["embed"][row], table.T.flatten())
        torch.testing.assert_close(got["head"][row], head.flatten())


def test_whole_embedding_gradients_that_cannot_fit_are_refused() -> None:
    embedding = nn.utils.skip_init(nn.Embedding, 500_000, 512)  # a gibibyte that nobody touches
    model = nn.Sequential(embedding, nn.Linear(512, 2)).requires_grad_(False)
    with (
        inf.GradientCapture(model, ["0"], IDENTITY) as capture,
        pytest.raises(inf.InputError, match=r"'0'.*GiB.*rademacher"),
    ):
        model(torch.randint(500_000, (8, 3))).sum().backward()
    assert capture.dims == {"0": 512 * 500_000}


def test_layers_that_share_an_input_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they are known only from the second forward on, and when one is called with another input."""
    widths: list[int] = []
    project = ops.Matrices.project
    monkeypatch.setattr(
        ops.Matrices,
        "project",
        lambda self, x, sides, *rest: (widths.append(len(sides)), project(self, x, sides, *rest))[1],
    )

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
            self.cross = False

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            source = other if self.cross else x
            return torch.softmax(self.q(x) @ self.k(source).mT, -1) @ self.v(source)

    torch.manual_seed(0)
    model, x, other = Attention(), torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    chosen = inf.Projection.parse("rademacher:4x3")
    with inf.GradientCapture(model, "all", chosen, bias=True) as capture:
        for cross, expected in [(False, [3]), (False, [3]), (True, [3, 2]), (True, [1, 2])]:
            model.cross = cross
            widths.clear()
            model(x, other).square().sum().backward()
            assert widths[: len(expected)] == expected
            got = capture.pop()
            for row in range(3):
                loss = model(x[row : row + 1].detach(), other[row : row + 1]).square().sum()
                for name in "qkv":
                    layer = getattr(model, name)
                    weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
                    whole = torch.cat([weight, bias[:, None]], 1)[None].double()
                    torch.testing.assert_close(
                        got[name][row].double(), projected({name: whole}, chosen)[name].flatten(), rtol=1e-4, atol=1e-6
                    )
                capture.clear()


def test_an_input_changed_before_it_was_projected_is_told() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            x.add_(1)
            return self.b(y)

    with (
        inf.GradientCapture(Careless().requires_grad_(False), "all", "rademacher:2x2") as capture,
        pytest.raises(inf.InputError, match="layer 'a': its input was changed in place"),
    ):
        capture.model(torch.randn(3, 5, 4))


@pytest.mark.parametrize("projection", ["identity", "rademacher:5x3", "sjlt:5x3", "sjlt:32"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_samples(name: str, projection: str) -> None:
    model, samples = models.make(name, "causal"), models.rows("causal")
    layers, chosen = inf.select_layers(model), inf.Projection.parse(projection)
    truth = models.oracle(model, samples, layers)
    lengths = [len(s["input_ids"]) for s in samples]
    ids = torch.tensor([[token for s in samples for token in s["input_ids"]]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with inf.GradientCapture(model, layers, chosen) as capture:
        with capture.packed(lengths):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        each = [
            nn.functional.cross_entropy(part[:-1], torch.tensor(s["labels"][1:]), ignore_index=-100)
            for part, s in zip(logits.split(lengths), samples, strict=True)
        ]
        torch.stack(each).sum().backward()
        got = capture.pop()
        with pytest.raises(inf.InputError, match="expected 3 packed tokens"), capture.packed([1, 2]):
            model(input_ids=ids)
        with pytest.raises(inf.InputError, match="lengths: expected positive"), capture.packed([1, 0]):
            pass
    if projection != "identity":
        truth = projected(truth, chosen)
    assert_close(got, truth)


def test_vision_transformer() -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    model = hf.ViTForImageClassification(config).eval()
    pixels, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 0])
    layers = inf.select_layers(model)
    assert len(layers) == 13
    with inf.GradientCapture(model, layers, IDENTITY) as capture:
        nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels, reduction="sum").backward()
        got = capture.pop()
    model.double()
    for row in range(3):
        loss = nn.functional.cross_entropy(
            model(pixel_values=pixels[row : row + 1].double()).logits, labels[row : row + 1]
        )
        grads = torch.autograd.grad(loss, [model.get_submodule(name).weight for name in layers])
        for name, expected in zip(layers, grads, strict=True):
            torch.testing.assert_close(got[name][row].double(), expected.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a block"])
def test_compiled_models_run_eagerly_inside(how: str) -> None:
    model, samples = models.make("bert"), models.rows()
    layers = inf.select_layers(model, "attention[1:],head")
    truth = models.oracle(model, samples, layers)
    whole: nn.Module = model
    if how == "wrapped":
        whole = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.bert.encoder.layer[2] = torch.compile(model.bert.encoder.layer[2], backend="eager")
    whole(**{k: v for k, v in models.collate(samples).items() if k != "labels"})
    assert inf.select_layers(whole, "attention[1:],head") == layers
    assert_close(captured(whole, models.collate(samples), layers), truth)
    assert fingerprint(whole) == fingerprint(models.make("bert"))


def test_float16_autocast() -> None:
    model, samples = models.make("llama", "causal"), models.rows("causal")
    layers = inf.select_layers(model, "attention,mlp")
    truth = models.oracle(model, samples, layers)
    with torch.autocast("cpu", torch.float16):
        got = captured(model, models.collate(samples), layers)
    assert {g.dtype for g in got.values()} == {torch.float32}
    assert_close(got, truth, 0.02)
