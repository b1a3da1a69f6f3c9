"""Every loss is the model's own loss of a batch of one row, whatever row lies beside it: float64, without padding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.data.batching import batches, checked_rows
from influence_fast.gradients import losses
from influence_fast.gradients.model_state import as_evaluated
from influence_fast.gradients.row_checks import check_own_loss, settle_batches

V = models.VOCAB
ENCODER = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    # Far from flat outputs, so that one loss is not nearly another.
    "initializer_range": 0.5,
}
DISTIL = {"vocab_size": V, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40}
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "initializer_range": 0.5}
BART = {
    "vocab_size": V,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "init_std": 0.5,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": V,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
MAMBA = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "initializer_range": 0.5}
XLNET = {"vocab_size": V, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "initializer_range": 0.5}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 14,
}
SPANS = {"start_positions": lambda t: t // 3, "end_positions": lambda t: t - 1}


def decoder(**settings: Any) -> dict[str, Any]:
    return {**ENCODER, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}


def some_ignored(ids: list[int], limit: int = V) -> list[int]:
    return [-100 if place % 3 == 1 else token % limit for place, token in enumerate(ids)]


def with_labels(make: Callable[[int, list[int]], Any]) -> Callable[[int, list[int]], dict[str, Any]]:
    return lambda i, ids: {"labels": make(i, ids)}


CLASS, PER_TOKEN = with_labels(lambda i, ids: i % 3), with_labels(lambda i, ids: some_ignored(ids))
SPAN = lambda i, ids: {name: place(len(ids)) for name, place in SPANS.items()}  # noqa: E731
TARGETS = with_labels(lambda i, ids: [*ids[: 2 + i], 2])
FLOATS = with_labels(lambda i, ids: [0.3 * i, -1.0, 2.5])
FLAGS = with_labels(lambda i, ids: [float(i % 2), 1.0, 0.0])

# name: model, what a row has beside its ids, the loss that auto finds.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, list[int]], dict[str, Any]], str]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3)), CLASS, "classification"),
    "bert multi-label": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3)),
        FLAGS,
        "multi-label",
    ),
    "bert regression": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3, problem_type="regression")),
        FLOATS,
        "regression",
    ),
    "roberta one number": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER, num_labels=1)),
        with_labels(lambda i, ids: 0.5 * i),
        "regression",
    ),
    "gpt2 classifier": (
        lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2, num_labels=3, pad_token_id=36)),
        CLASS,
        "classification",
    ),
    "bert masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), PER_TOKEN, "masked-lm"),
    "distilbert masked": (lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTIL)), PER_TOKEN, "masked-lm"),
    "roberta tokens": (
        lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**ENCODER, num_labels=5)),
        with_labels(lambda i, ids: some_ignored(ids, 5)),
        "token-classification",
    ),
    "distilbert tokens": (
        lambda: hf.DistilBertForTokenClassification(hf.DistilBertConfig(**DISTIL, num_labels=5)),
        with_labels(lambda i, ids: some_ignored(ids, 5)),
        "token-classification",
    ),
    "bert answers": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**ENCODER)), SPAN, "question-answering"),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), TARGETS, "seq2seq"),
    "marian": (
        lambda: hf.MarianMTModel(hf.MarianConfig(**BART, pad_token_id=1, decoder_start_token_id=1)),
        TARGETS,
        "seq2seq",
    ),
    "bart decoder": (lambda: hf.BartForCausalLM(hf.BartConfig(**BART, is_decoder=True)), PER_TOKEN, "masked-lm"),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), TARGETS, "seq2seq"),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), PER_TOKEN, "causal-lm"),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**decoder())), PER_TOKEN, "causal-lm"),
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)), PER_TOKEN, "causal-lm"),
    "gemma 3": (
        lambda: hf.Gemma3ForSequenceClassification(
            hf.Gemma3Config(text_config=decoder(head_dim=8), vision_config=VISION, num_labels=3)
        ),
        CLASS,
        "classification",
    ),
    "xlnet": (
        lambda: hf.XLNetForSequenceClassification(hf.XLNetConfig(**XLNET, num_labels=3)),
        CLASS,
        "classification",
    ),
}


def rows_for(targets: Callable[[int, list[int]], dict[str, Any]], lengths: tuple[int, ...] = (4, 9, 6, 9, 12)) -> list:
    random = torch.Generator().manual_seed(1)
    found = [torch.randint(3, V - 1, (length,), generator=random).tolist() for length in lengths]
    return [{"input_ids": ids, **targets(i, ids)} for i, ids in enumerate(found)]


def own_losses(model: nn.Module, dataset: list[dict[str, Any]]) -> Tensor:
    """The model's own loss, a batch of one row at a time."""

    def tensor(value: Any) -> Tensor:
        found = torch.tensor([value])
        return torch.tensor([value], dtype=torch.float64) if found.is_floating_point() else found

    with torch.no_grad():
        return torch.stack([model(**{name: tensor(v) for name, v in row.items()}).loss for row in dataset])


def found_losses(
    model: nn.Module, dataset: list[dict[str, Any]], loss: str = "auto", tokens: int = 200
) -> tuple[Tensor, Any]:
    """Losses as a build takes them, in batches with padding, and the rows that were settled on."""
    rows, kind = checked_rows(model, dataset, loss)
    chosen = losses.named(kind)
    check_own_loss(model, rows, chosen)
    settle_batches(model, rows, chosen, tokens)
    each = torch.empty(len(rows), dtype=torch.float64)
    with as_evaluated(model), torch.no_grad():
        for batch in batches(rows, range(len(rows)), tokens):
            each[batch] = chosen(model, rows.batch(batch, model)).double()
    return each, rows


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[name][0]().double().eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_is_the_models_own_loss_of_one_row(name: str) -> None:
    model, dataset = make(name), rows_for(FAMILIES[name][1])
    want = own_losses(model, dataset)
    each, rows = found_losses(model, dataset)
    assert rows.kind == FAMILIES[name][2]
    # Where labels are tokens, transformers takes cross entropy in float32.
    wide = want.dtype == torch.float64
    torch.testing.assert_close(each, want.double(), rtol=1e-9 if wide else 1e-6, atol=1e-9)
    assert rows.batching == ("padded left" if name == "xlnet" else "padded")


def test_choices() -> None:
    torch.manual_seed(0)
    model = hf.BertForMultipleChoice(hf.BertConfig(**ENCODER)).double().eval()
    plain = rows_for(lambda i, ids: {"labels": i % 2}, (4, 4, 9, 9))
    dataset = [{**row, "input_ids": [row["input_ids"], row["input_ids"][::-1]]} for row in plain]
    want = own_losses(model, dataset)
    each, rows = found_losses(model, dataset)
    assert rows.kind == "multiple-choice"
    torch.testing.assert_close(each, want)
    # A choice that is shorter than the other, padded by the caller or not.
    masked = {"input_ids": [[5, 6, 7], [5, 6, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]], "labels": 1}
    bare = {"input_ids": [[5, 6, 7], [5, 6]], "labels": 1}
    torch.testing.assert_close(found_losses(model, [bare, dataset[2]])[0], own_losses(model, [masked, dataset[2]]))
    with pytest.raises(inf.InputError, match="row 1 has 1 choices, row 0 2"):
        checked_rows(model, [bare, {"input_ids": [[5, 6]], "labels": 0}])


def test_gradients_of_a_task_are_those_of_the_models_own_loss(tmp_path: Path) -> None:
    for name, layers in (("bert answers", "all"), ("bert masked", "mlp"), ("t5", "mlp,lm_head")):
        model, dataset = make(name).float(), rows_for(FAMILIES[name][1])
        store = inf.build_store(tmp_path / name, model, dataset, layers, "identity", progress=False)
        model.double()
        weights = [model.get_submodule(layer).weight.requires_grad_(True) for layer in store.layers]
        for place, row in enumerate(dataset):
            loss = model(**{column: torch.tensor([value]) for column, value in row.items()}).loss
            for layer, grad in zip(store.layers, torch.autograd.grad(loss, weights), strict=True):
                want = (grad.T if isinstance(model.get_submodule(layer), nn.Embedding) else grad).flatten()
                got = store.read(layer, [place])[0].double()
                assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9, (name, layer)


@pytest.mark.parametrize(
    ("loss", "name"),
    [("causal-lm", "bert masked"), ("masked-lm", "gpt2"), ("token-classification", "llama"), ("causal-lm-sum", "gpt2")],
)
def test_a_named_loss_is_taken_at_its_word(loss: str, name: str) -> None:
    model, dataset = make(name), rows_for(FAMILIES[name][1])
    rows, kind = checked_rows(model, dataset, loss)
    each = losses.named(kind)(model, rows.batch(range(len(rows)), model)).detach()
    shift = loss.startswith("causal-lm")
    for row, found in zip(dataset, each, strict=True):
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])
        logits, labels = (logits[:-1], labels[1:]) if shift else (logits, labels)
        want = nn.functional.cross_entropy(logits, labels, reduction="sum" if loss == "causal-lm-sum" else "mean")
        torch.testing.assert_close(found, want.detach())


def test_what_auto_cannot_tell_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(V, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.words(input_ids)

    model, dataset = Own(), rows_for(with_labels(lambda i, ids: some_ignored(ids, 3)))
    with pytest.raises(inf.InputError, match=r"'auto' cannot tell the loss of a Own from labels such as .*token-class"):
        checked_rows(model, dataset)
    rows, kind = checked_rows(model, dataset, "token-classification")
    assert losses.named(kind)(model, rows.batch([0, 1], model)).shape == (2,)
    with pytest.raises(inf.InputError, match="'classification' does not fit labels such as"):
        checked_rows(model, dataset, "classification")
    with pytest.raises(inf.InputError, match=r"start_positions 4, expected an int from 0 to 3"):
        checked_rows(make("bert answers"), [{"input_ids": [3] * 4, "start_positions": 4, "end_positions": 1}])
    with pytest.raises(inf.InputError, match=r"labels \[1.0\], expected 3 numbers for multi-label"):
        checked_rows(make("bert multi-label"), [{"input_ids": [3] * 4, "labels": [1.0]}])


def test_a_loss_that_is_not_the_models_own_is_refused() -> None:
    torch.manual_seed(0)
    model = hf.BertForPreTraining(hf.BertConfig(**ENCODER))
    with pytest.raises(inf.InputError, match="'auto' cannot tell the loss of a BertForPreTraining"):
        checked_rows(model, rows_for(PER_TOKEN))

    class Smoothed(hf.BertForSequenceClassification):
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if labels is not None:
                output.loss = nn.functional.cross_entropy(output.logits, labels, label_smoothing=0.3)
            return output

    smoothed = Smoothed(hf.BertConfig(**ENCODER, num_labels=3)).eval()
    rows, kind = checked_rows(smoothed, rows_for(CLASS))
    with pytest.raises(inf.InputError, match="'auto' takes classification for a Smoothed, whose own loss of row 0"):
        check_own_loss(smoothed, rows, losses.named(kind))


@pytest.mark.parametrize("name", ["bert", "bert answers", "bart", "llama"])
def test_outputs_as_tuples(name: str) -> None:
    model, dataset = make(name), rows_for(FAMILIES[name][1])
    want = own_losses(model, dataset).double()

    class Tuples(Wrapper):
        def forward(self, **batch: Any) -> Any:
            return super().forward(**batch).to_tuple()

    torch.testing.assert_close(found_losses(Tuples(model), dataset)[0], want, rtol=1e-6, atol=1e-9)
    model.config.return_dict = False
    torch.testing.assert_close(found_losses(model, dataset)[0], want, rtol=1e-6, atol=1e-9)
    assert model.config.return_dict is False


def test_logits_wider_than_the_model() -> None:
    model = make("mamba").to(torch.bfloat16)
    each, _ = found_losses(model, rows_for(PER_TOKEN))
    torch.testing.assert_close(each, own_losses(model, rows_for(PER_TOKEN)).double(), rtol=3e-2, atol=1e-2)


def test_rows_that_padding_changes_are_batched_by_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = hf.FNetForSequenceClassification(
        hf.FNetConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_labels=3)
    ).eval()
    dataset = rows_for(CLASS)
    with caplog.at_level(logging.WARNING, "influence_fast"):
        store = inf.build_store(tmp_path / "s", model, dataset, "head", "identity", progress=False)
    assert "FNetForSequenceClassification depends on the padding beside it" in caplog.text
    assert store.meta["settings"]["batching"] == "equal lengths"
    torch.testing.assert_close(store.column("loss"), own_losses(model, dataset), rtol=1e-5, atol=1e-6)
    rows, _ = checked_rows(model, dataset)
    settle_batches(model, rows, losses.classification, 200)
    found = batches(rows, range(len(rows)), 200)
    assert sorted(map(sorted, found)) == [[0], [1, 3], [2], [4]]
    found = batches(rows, range(len(rows)), 9)
    assert sorted(map(sorted, found)) == [[0], [1], [2], [3], [4]]


class Coupled(nn.Module):
    """Words averaged over a row and normalised over the batch, or with noise."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(V, 4), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.noise = noise

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = (self.words(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1)[:, None]
        if self.noise:
            return self.head(x + self.noise * torch.randn_like(x))
        return self.head(self.norm(x) if len(x) > 1 else x)


def test_rows_that_others_change_stay_alone(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    rows, _ = checked_rows(model := Coupled(0), rows_for(CLASS))
    with caplog.at_level(logging.WARNING, "influence_fast"):
        settle_batches(model, rows, losses.classification, 200)
    assert "depends on the other rows: one row a batch" in caplog.text
    assert batches(rows, range(5), 200) == [[4], [1], [3], [2], [0]]
    rows, _ = checked_rows(model := Coupled(0.1), rows_for(CLASS))
    with pytest.raises(inf.InputError, match="loss: that of row 0 differs from one forward of Coupled to the next"):
        settle_batches(model, rows, losses.classification, 200)


def test_a_wrapper_has_the_head_and_the_pads_of_what_is_inside() -> None:
    for name in ("gpt2 classifier", "bert masked"):
        model, dataset = make(name), rows_for(FAMILIES[name][1])
        each, rows = found_losses(Wrapper(model), dataset)
        assert (rows.kind, rows.batching) == (FAMILIES[name][2], "padded")
        torch.testing.assert_close(each, own_losses(model, dataset))


@pytest.mark.parametrize("pad", [None, -1])
def test_no_id_outside_the_vocabulary_is_fed(pad: int | None, caplog: pytest.LogCaptureFixture) -> None:
    model = make("gpt2 classifier")
    model.config.pad_token_id = pad
    dataset = [*rows_for(CLASS), {"input_ids": list(range(V)), "labels": 0}]
    fed: list[Tensor] = []
    model.transformer.wte.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    with caplog.at_level(logging.WARNING, "influence_fast"):
        each, rows = found_losses(model, dataset)
    assert rows.together == "one row"
    assert "every token id is in use" in caplog.text
    torch.testing.assert_close(each, own_losses(model, dataset))
    assert all(int(ids.min()) >= 0 and int(ids.max()) < V for ids in fed)
    assert model.config.pad_token_id == pad
    # With an id to spare it marks the pads.
    each, rows = found_losses(model, dataset[:5])
    assert rows.batching == "padded"
    torch.testing.assert_close(each, own_losses(model, dataset[:5]))
