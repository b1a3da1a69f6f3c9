"""Situations of training that people met: each a small model, its rows and the loss of one row alone.

Most stand around a tiny classifier whose middle (``encode``) is what the situation is about.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import influence_fast as inf

from .cases import LENGTHS, SQUARE, task_rows
from .check import Captured, Case, Rows, own_loss, row_batch
from .configs import CLASSES, VOCAB, make_model

WIDTH = 8
SITUATIONS: dict[str, tuple[str, Callable[[], Case]]] = {}


def situation(text: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        SITUATIONS[make.__name__] = (text, make)
        return make

    return add


def situation_case(name: str, part: str = "") -> Case:
    torch.manual_seed(0)
    return SITUATIONS[name][1]()


def texts() -> dict[str, str]:
    """What each situation is, by its name."""
    return {name: text for name, (text, _) in SITUATIONS.items()}


class Base(nn.Module):
    """Words, something in between, a mean over the row's tokens, a head; called like a classifier of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.encode(self.embed(input_ids)) * attention_mask[..., None]
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True))


def class_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of a row's class; one value a row, so that it is also a loss to hand to a build."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    found = model(**inputs)
    found = found[0] if isinstance(found, tuple) else getattr(found, "logits", found)
    return nn.functional.cross_entropy(found, batch["labels"], reduction="none")


def one_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return class_loss(model, batch).sum()


def small(model: nn.Module, equal: bool = False, **given: Any) -> Case:
    """A case of a model like :class:`Base` in float64; ``equal`` for models that do not mask: rows of one length."""
    rows = task_rows("sequence", lengths=(6, 6, 6, 6, 6) if equal else LENGTHS)
    settings = {"truth": one_loss, "square": task_rows("sequence", lengths=SQUARE, seed=2), **given}
    return Case(model.double().eval(), settings.pop("rows", rows), **settings)


def encoder(encode: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> nn.Module:
    """:class:`Base` with ``encode(model, x)`` and further parts."""

    class Encoder(Base):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def encode(self, x: Tensor) -> Tensor:
            return encode(self, x)

    return Encoder()


def hugging(family: str, task: str, **given: Any) -> Case:
    """A tiny model of transformers."""
    rows = given.pop("rows", None) or task_rows(task, family)
    return Case(make_model(family, task), rows, square=task_rows(task, family, SQUARE, seed=2), **given)


# Weights that are trained, or are not.


@situation("frozen embeddings and first block of a BERT")
def frozen_parts() -> Case:
    case = hugging("bert", "sequence")
    case.model.bert.embeddings.requires_grad_(False)
    case.model.bert.encoder.layer[0].requires_grad_(False)
    return case


@situation("everything frozen but the head")
def head_alone() -> Case:
    case = hugging("bert", "sequence")
    case.model.requires_grad_(False)
    case.model.classifier.requires_grad_(True)
    case.layers = ("trained", "head", "trained")
    return case


@situation("LayerNorms alone are trained")
def norms_alone() -> Case:
    case = hugging("roberta", "sequence")
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
    case.layers = ("trained", "norm", "trained")
    return case


@situation("BitFit: biases alone are trained")
def biases_alone() -> Case:
    case = hugging("bert", "sequence")
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    case.layers = ("trained", "trained", "trained")
    return case


@situation("a gradient hook on a weight that keeps part of it")
def hook_on_a_weight() -> Case:
    model = Base()
    keep = (torch.arange(VOCAB) % 2).double()[:, None]
    model.embed.weight.register_hook(lambda grad: grad * keep)
    return small(model)


@situation("bias=True: a bias as one more column of its layer")
def biases_as_columns() -> Case:
    return hugging("gpt2", "sequence", layers=("all",), settings={"bias": True})


# Weights used more than once, or elsewhere.


@situation("embedding and head tied by the library (GPT-2)")
def tied_head() -> Case:
    return hugging("gpt2", "causal")


@situation("embedding and head of a causal model tied, embedding scaled (Gemma)")
def tied_scaled_head() -> Case:
    return hugging("gemma", "causal")


@situation("logits are x @ embedding.weight.T")
def functional_tied_head() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        return torch.tanh(model.body(x)) @ model.embed.weight.T @ model.embed.weight / VOCAB

    return small(encoder(encode))


@situation("F.linear with a layer's weight beside a call of it")
def functional_beside_a_call() -> Case:
    return small(encoder(lambda m, x: torch.tanh(nn.functional.linear(m.body(x), m.body.weight))))


@situation("a layer whose weight is used and that is never called")
def never_called() -> Case:
    return small(encoder(lambda m, x: torch.tanh(x @ m.body.weight.T)))


@situation("one layer called three times")
def reused_layer() -> Case:
    return small(encoder(lambda m, x: torch.tanh(m.body(torch.tanh(m.body(torch.tanh(m.body(x))))))))


@situation("two layers that share one weight")
def shared_weight() -> Case:
    model = encoder(lambda m, x: torch.tanh(m.other(torch.tanh(m.body(x)))), other=nn.Linear(WIDTH, WIDTH))
    model.other.weight = model.body.weight
    return small(model)


@situation("blocks of an ALBERT that share all weights")
def shared_blocks() -> Case:
    return hugging("albert", "sequence")


@situation("torch.func.functional_call with scaled weights in the forward")
def functional_call() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        scaled = {name: 2 * parameter for name, parameter in model.body.named_parameters()}
        return torch.tanh(torch.func.functional_call(model.body, scaled, (x,)))

    return small(encoder(encode))


@situation("torch.vmap over samples in the forward")
def vmap_inside() -> Case:
    return small(encoder(lambda m, x: torch.tanh(torch.vmap(lambda row: row @ m.body.weight.T)(x))))


@situation("a detached branch beside the trained one")
def detached_branch() -> Case:
    return small(encoder(lambda m, x: torch.tanh(m.body(x)) + m.body(x).detach()))


@situation("a branch under no_grad beside the trained one")
def branch_without_gradient() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = model.body(x)
        return torch.tanh(model.body(x)) * target

    return small(encoder(encode))


@situation("a layer that the loss does not depend on")
def unused_layer() -> Case:
    return small(encoder(lambda m, x: torch.tanh(m.body(x)), spare=nn.Linear(3, 2)))


# Layers that do not what they are named for.


class ScaledWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight.tanh(), self.bias)


class ScaledOutput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class NormalisedInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class TupleOutput(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def _with_body(layer: nn.Module) -> nn.Module:
    model = Base()
    model.body = layer
    return model


@situation("a Linear that squashes its weight")
def squashed_weight() -> Case:
    return small(_with_body(ScaledWeight(WIDTH, WIDTH)))


@situation("a Linear that scales its output")
def scaled_output() -> Case:
    return small(_with_body(ScaledOutput(WIDTH, WIDTH)))


@situation("a Linear that normalises its input")
def normalised_input() -> Case:
    return small(_with_body(NormalisedInput(WIDTH, WIDTH)))


@situation("a Linear that returns a tuple")
def tuple_output() -> Case:
    model = encoder(lambda m, x: torch.tanh(m.other(x)[0]), other=TupleOutput(WIDTH, WIDTH))
    return small(model)


@situation("a forward hook of the user's that scales the output")
def hook_that_scales() -> Case:
    model = Base()
    model.body.register_forward_hook(lambda module, args, output: 3 * output)
    return small(model)


@situation("a forward pre-hook of the user's that changes the input")
def hook_before() -> Case:
    model = Base()
    model.body.register_forward_pre_hook(lambda module, args: (args[0] * args[0],))
    return small(model)


@situation("a backward hook of the user's that scales the gradient")
def hook_behind() -> Case:
    model = Base()
    model.body.register_full_backward_hook(lambda module, into, out: (2 * into[0],))
    return small(model)


@situation("a gradient reversal between two layers")
def reversed_gradient() -> Case:
    return small(encoder(lambda m, x: ReversedGradient.apply(torch.tanh(m.body(x)))))


@situation("weight norm")
def weight_norm() -> Case:
    return small(_with_body(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))))


@situation("spectral norm")
def spectral_norm() -> Case:
    return small(_with_body(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))))


@situation("an orthogonal parametrisation")
def orthogonal() -> Case:
    return small(_with_body(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))))


@situation("pruning by a mask")
def pruned() -> Case:
    return small(_with_body(prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", amount=0.4)))


# Layers that are no plain matrix.


@situation("an embedding with scale_grad_by_freq")
def scaled_by_frequency() -> Case:
    model = Base()
    model.embed = nn.Embedding(VOCAB, WIDTH, scale_grad_by_freq=True)
    return small(model)


@situation("an embedding with padding_idx that rows use")
def padding_index() -> Case:
    model = Base()
    model.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=2)
    return small(model)


@situation("an embedding with max_norm, which changes its own weights")
def largest_norm() -> Case:
    model = Base()
    model.embed = nn.Embedding(VOCAB, WIDTH, max_norm=1.0)
    case = small(model)
    # A word is cut down when it is first seen, whoever calls the model.
    case.model.embed(torch.arange(VOCAB))
    return case


@situation("an embedding with sparse gradients")
def sparse_embedding() -> Case:
    model = Base()
    model.embed = nn.Embedding(VOCAB, WIDTH, sparse=True)
    return small(model)


class Bag(Base):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(VOCAB, WIDTH, mode="sum")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, per_sample_weights=attention_mask.to(self.embed.weight.dtype))
        return self.head(torch.tanh(self.body(x)))


@situation("EmbeddingBag")
def embedding_bag() -> Case:
    return small(Bag())


@situation("Conv1d over tokens")
def conv1d() -> Case:
    conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    return small(encoder(lambda m, x: torch.tanh(m.conv(m.body(x).mT).mT), conv=conv), equal=True)


@situation("depthwise Conv1d, rows of several lengths")
def depthwise() -> Case:
    conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
    return small(encoder(lambda m, x: torch.tanh(m.conv(m.body(x).mT).mT), conv=conv))


@situation("Conv2d over tokens and features")
def conv2d() -> Case:
    conv = nn.Conv2d(1, 2, 3, padding=1)
    return small(encoder(lambda m, x: torch.tanh(m.conv(m.body(x)[:, None]).sum(1)), conv=conv), equal=True)


@situation("LSTM, rows of several lengths")
def lstm() -> Case:
    cell = nn.LSTM(WIDTH, WIDTH, batch_first=True)
    return small(encoder(lambda m, x: m.cell(m.body(x))[0], cell=cell))


@situation("GRU in two directions, rows of several lengths")
def gru() -> Case:
    cell = nn.GRU(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
    return small(encoder(lambda m, x: m.cell(m.body(x))[0], cell=cell))


@situation("an RNN cell in a loop over tokens")
def recurrent_loop() -> Case:
    def encode(model: nn.Module, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for place in range(x.shape[1]):
            state = model.cell(model.body(x[:, place]), state)
            states.append(state)
        return torch.stack(states, 1)

    return small(encoder(encode, cell=nn.RNNCell(WIDTH, WIDTH)))


class Packed(Base):
    """An LSTM over packed sequences, sorted by length inside."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.body(self.embed(input_ids))
        packed = nn.utils.rnn.pack_padded_sequence(
            x, attention_mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(torch.tanh(self.cell(packed)[1][0][-1]))


@situation("an LSTM over packed sequences, sorted by length inside")
def packed_lstm() -> Case:
    return small(Packed())


@situation("MultiheadAttention with one input matrix, batch first")
def attention() -> Case:
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    return small(encoder(lambda m, x: m.layer(m.body(x), x, x, need_weights=False)[0], layer=layer), equal=True)


@situation("MultiheadAttention, sequence first")
def attention_sequence_first() -> Case:
    def encode(model: nn.Module, x: Tensor) -> Tensor:
        y = model.body(x.transpose(0, 1))
        return model.layer(y, y, y, need_weights=False)[0].transpose(0, 1)

    return small(encoder(encode, layer=nn.MultiheadAttention(WIDTH, 2)), equal=True)


@situation("nn.TransformerEncoder, batch first")
def transformer_encoder() -> Case:
    block = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.1, batch_first=True)
    return small(encoder(lambda m, x: m.blocks(m.body(x)), blocks=nn.TransformerEncoder(block, 2)), equal=True)


@situation("nn.TransformerEncoder, sequence first")
def transformer_sequence_first() -> Case:
    block = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.1)
    parts = {"blocks": nn.TransformerEncoder(block, 1)}
    return small(encoder(lambda m, x: m.blocks(m.body(x).transpose(0, 1)).transpose(0, 1), **parts), equal=True)


@situation("Bilinear")
def bilinear() -> Case:
    return small(encoder(lambda m, x: m.pair(x, torch.tanh(m.body(x))), pair=nn.Bilinear(WIDTH, WIDTH, WIDTH)))


@situation("bare parameters: a vector, a matrix and a number")
def bare_parameters() -> Case:
    parts = {
        "gain": nn.Parameter(torch.randn(WIDTH)),
        "mix": nn.Parameter(torch.randn(WIDTH, WIDTH)),
        "scale": nn.Parameter(torch.tensor(1.3)),
    }
    return small(encoder(lambda m, x: torch.tanh(m.body(x) * m.gain) @ m.mix * m.scale, **parts))


@situation("RMSNorm and GroupNorm")
def other_norms() -> Case:
    def encode(model: nn.Module, x: Tensor) -> Tensor:
        y = model.rms(model.body(x))
        return model.group(y.flatten(0, 1)).view_as(y)

    return small(encoder(encode, rms=nn.RMSNorm(WIDTH), group=nn.GroupNorm(2, WIDTH)))


@situation("batch norm with running statistics")
def batch_norm() -> Case:
    norm = nn.BatchNorm1d(WIDTH)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
    return small(encoder(lambda m, x: torch.tanh(m.norm(m.body(x).mT).mT), norm=norm))


@situation("batch norm over the batch: a row depends on the others")
def batch_norm_of_the_batch() -> Case:
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
    return small(encoder(lambda m, x: torch.tanh(m.norm(m.body(x).mT).mT), norm=norm))


# Tensors whose rows are not samples.


@situation("sequence-first tensors")
def sequence_first() -> Case:
    return small(encoder(lambda m, x: torch.tanh(m.body(x.transpose(0, 1))).transpose(0, 1)), equal=True)


@situation("tokens flattened, token by token")
def token_major() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        return torch.tanh(model.body(x.transpose(0, 1).reshape(t * n, -1))).view(t, n, -1).transpose(0, 1)

    return small(encoder(encode), equal=True)


@situation("tokens flattened, row by row")
def row_major() -> Case:
    return small(encoder(lambda m, x: torch.tanh(m.body(x.flatten(0, 1))).view_as(x)))


@situation("tokens that are not masked gathered into one list")
def gathered() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        real = x[..., 0] > -0.5
        out = torch.zeros_like(x)
        out[real] = torch.tanh(model.body(x[real]))
        return out

    return small(encoder(encode))


@situation("two views of a row in one batch, one behind the other")
def two_views() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        one, other = torch.tanh(model.body(torch.cat([x, x.flip(2)]))).chunk(2)
        return one * other

    return small(encoder(encode))


@situation("two views of a row, beside each other")
def views_side_by_side() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        both = torch.stack([x, x.flip(2)], 1).flatten(0, 1)
        return torch.tanh(model.body(both)).view(len(x), 2, *x.shape[1:]).prod(1)

    return small(encoder(encode))


class Siamese(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, other_ids: Tensor) -> Tensor:
        x = self.encode(self.embed(torch.cat([input_ids, other_ids]))).mean(1)
        one, other = x.chunk(2)
        return self.head(one * other)


@situation("Siamese: two texts of a row through one encoder in one batch")
def siamese() -> Case:
    random = torch.Generator().manual_seed(3)
    rows = task_rows("sequence", lengths=(6,) * 5)
    for row in rows:
        row["other_ids"] = torch.randint(6, VOCAB - 8, (6,), generator=random).tolist()
    return small(Siamese(), rows=rows, square=None)


@situation("rows sorted by their content inside the model")
def sorted_inside() -> Case:
    def encode(model: Base, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort()
        return torch.tanh(model.body(x[order]))[order.argsort()]

    return small(encoder(encode))


@situation("a loop over the rows inside the model")
def loop_over_rows() -> Case:
    return small(encoder(lambda m, x: torch.stack([torch.tanh(m.body(row)) for row in x])))


@situation("a table of positions through a layer, once a batch")
def shared_table() -> Case:
    table = nn.Parameter(torch.randn(5, WIDTH))
    return small(encoder(lambda m, x: torch.tanh(x * m.body(m.table).mean(0)), table=table))


@situation("a table of as many rows as the batch has")
def shared_table_of_the_batch_size() -> Case:
    table = nn.Parameter(torch.randn(6, WIDTH))
    return small(encoder(lambda m, x: torch.tanh(x * m.body(m.table).mean(0)), table=table))


@situation("the batch's mean taken off: a row depends on the others")
def coupled_rows() -> Case:
    return small(encoder(lambda m, x: torch.tanh(m.body(x - x.mean((0, 1))))))


@situation("relative positions at N = T (T5)")
def relative_positions() -> Case:
    case = hugging("t5", "seq2seq")
    case.rows = case.square
    return case


@situation("experts that see routed tokens alone")
def routed() -> Case:
    def encode(model: nn.Module, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = model.body(flat)[:, :3].argmax(1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(model.experts):
            place = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, place, expert(flat[place]))
        return (out + model.body(flat)).view_as(x)

    return small(encoder(encode, experts=nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))))


# Rows and masks.


@situation("masks with holes")
def holes() -> Case:
    rows = task_rows("sequence")
    for row in rows:
        row["attention_mask"] = [int(place % 3 != 1) for place in range(len(row["input_ids"]) - 1)] + [1]
    return hugging("bert", "sequence", rows=rows)


@situation("rows padded at the left in the data set")
def padded_left() -> Case:
    rows = task_rows("causal")
    case = hugging("llama", "causal", rows=[_padded(row, left=True) for row in rows])
    return _alone(case, rows)


@situation("rows padded at the right in the data set")
def padded_right() -> Case:
    rows = task_rows("sequence")
    case = hugging("bert", "sequence", rows=[_padded(row, left=False) for row in rows])
    return _alone(case, rows)


def _padded(row: dict[str, Any], left: bool, width: int = 14) -> dict[str, Any]:
    gap = width - len(row["input_ids"])

    def pad(values: Any, fill: int) -> Any:
        if not isinstance(values, list):
            return values
        return [fill] * gap + values if left else values + [fill] * gap

    padded = {"input_ids": pad(row["input_ids"], 0), "labels": pad(row["labels"], -100)}
    return padded | {"attention_mask": pad([1] * len(row["input_ids"]), 0)}


def _alone(case: Case, rows: list[dict[str, Any]]) -> Case:
    """The truth is of the rows without their pads, which the case's padded rows stand for."""
    plain = {tuple(token for token in row["input_ids"] if token): row for row in rows}
    inner = case.truth

    def truth(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        row = plain.get(tuple(token for token in batch["input_ids"][0].tolist() if token))
        return (inner or own_loss)(model, batch if row is None else row_batch(model, row))

    case.truth = truth
    return case


@situation("one row a batch by batch_tokens=1")
def one_row() -> Case:
    return hugging("distilbert", "sequence", settings={"batch_tokens": 1})


@situation("a single row")
def single_row() -> Case:
    return hugging("bert", "sequence", rows=task_rows("sequence")[:1])


@situation("rows that are all the same")
def same_rows() -> Case:
    return hugging("gpt2", "sequence", rows=task_rows("sequence", lengths=(6,)) * 5)


@situation("a wrapper without a config around a GPT-2 classifier that looks for pads")
def wrapped() -> Case:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **batch: Tensor) -> Any:
            return self.inner(**batch)

    case = hugging("gpt2", "sequence")
    case.model = Wrapper(case.model)
    return case


@situation("nn.DataParallel around a BERT")
def data_parallel() -> Case:
    case = hugging("bert", "sequence")
    case.model = nn.DataParallel(case.model)
    return case


@situation("torch.compile around a BERT")
def compiled() -> Case:
    case = hugging("bert", "sequence")
    case.model = torch.compile(case.model, backend="eager")
    return case


@situation("torch.compile of each block of a Llama")
def compiled_blocks() -> Case:
    case = hugging("llama", "causal")
    for block in case.model.model.layers:
        block.compile(backend="eager")
    return case


@situation("a model that returns tuples (return_dict=False)")
def tuples() -> Case:
    case = hugging("bert", "token")
    case.model.config.return_dict = False
    return case


@situation("DistributedDataParallel around a BERT, one process")
def distributed() -> Case:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    case = hugging("bert", "sequence")
    case.model = nn.parallel.DistributedDataParallel(case.model)
    return case


# By hand, with GradientCapture.


def _by_hand(case: Case, rows: Rows, projection: str, layers: str, padded: bool) -> Captured:
    """Rows of a causal model in one forward: padded at the left, or packed behind each other into one."""
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)
    if padded:
        ids = torch.tensor([[0] * (width - n) + row["input_ids"] for n, row in zip(lengths, rows, strict=True)])
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    else:
        sample = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
        seen = (sample[:, None] == sample).tril()
        batch = {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "attention_mask": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)[None, None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        }
    with inf.GradientCapture(case.model, layers, projection) as capture:
        with nullcontext() if padded else capture.packed(lengths):
            logits = case.model(**batch).logits
        each = logits.unbind() if padded else logits[0].split(lengths)
        total = torch.zeros((), dtype=torch.float64)
        for row, n, found in zip(rows, lengths, each, strict=True):
            targets = torch.tensor(row["labels"][1:])
            total = total + nn.functional.cross_entropy(found[-n:-1], targets, ignore_index=-100)
        total.backward()
        return Captured(capture.pop(), batches="padded left" if padded else "packed")


@situation("a batch padded at the left by hand, with positions")
def padded_by_hand() -> Case:
    return hugging("llama", "causal", collect=partial(_by_hand, padded=True))


@situation("several rows packed into one, with positions and a block-diagonal mask")
def packed_by_hand() -> Case:
    return hugging("llama", "causal", collect=partial(_by_hand, padded=False))


# Precision, modes, memory.


def _lower(case: Case, dtype: torch.dtype) -> Case:
    case.model = case.model.to(dtype)
    case.dtype = str(dtype).removeprefix("torch.")
    return case


@situation("a Llama in bfloat16")
def bfloat16_causal() -> Case:
    return _lower(hugging("llama", "causal"), torch.bfloat16)


@situation("a BERT in bfloat16")
def bfloat16_classifier() -> Case:
    return _lower(hugging("bert", "sequence"), torch.bfloat16)


@situation("a Mamba in bfloat16")
def bfloat16_mamba() -> Case:
    return _lower(hugging("mamba", "causal"), torch.bfloat16)


@situation("a Llama in float16")
def float16_causal() -> Case:
    return _lower(hugging("llama", "causal"), torch.float16)


@situation("a Llama in float32")
def float32_causal() -> Case:
    case = hugging("llama", "causal")
    case.model = case.model.float()
    return case


@situation("a float32 BERT under bfloat16 autocast")
def autocast() -> Case:
    case = hugging("bert", "sequence", settings={"precision": "bfloat16"})
    case.model = case.model.float()
    case.dtype = "bfloat16"
    return case


@situation("float32 LoRA on a bfloat16 Llama")
def mixed_precision_adapter() -> Case:
    case = hugging("llama", "causal", layers=("trained", "lora", "trained"))
    base = case.model.to(torch.bfloat16)
    case.model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in case.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() + 0.1 * torch.randn(parameter.shape)
    case.dtype = "bfloat16"
    return case


@situation("a BERT in train mode, with dropout")
def train_mode() -> Case:
    case = hugging("bert", "sequence")
    case.model.train()
    return case


@situation("dropout that is always on: the loss is random")
def always_random() -> Case:
    return small(encoder(lambda m, x: nn.functional.dropout(torch.tanh(m.body(x)), 0.3, training=True)))


def _checkpointed(reentrant: bool) -> Case:
    def encode(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda y: torch.tanh(model.body(y)), x, use_reentrant=reentrant)

    return small(encoder(encode))


@situation("gradient checkpointing, reentrant")
def checkpointed() -> Case:
    return _checkpointed(True)


@situation("gradient checkpointing, not reentrant")
def checkpointed_without_reentry() -> Case:
    return _checkpointed(False)


@situation("reentrant checkpointing over a frozen embedding, whose output is made to require gradients")
def checkpointed_over_frozen() -> Case:
    case = _checkpointed(True)
    case.model.embed.requires_grad_(False)
    case.model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return case


@situation("gradient checkpointing of a Llama by transformers, in train mode")
def checkpointed_llama() -> Case:
    case = hugging("llama", "causal")
    case.model.gradient_checkpointing_enable()
    case.model.train()
    return case


@situation("an activation that works in place")
def in_place_activation() -> Case:
    return small(encoder(lambda m, x: nn.functional.relu_(m.body(x))))


@situation("a layer's output changed in place")
def in_place_output() -> Case:
    return small(encoder(lambda m, x: torch.tanh(m.body(x).mul_(2).add_(x))))


# Losses.


@situation("a callable: label smoothing")
def smoothed() -> Case:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = model(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(found, batch["labels"], reduction="none", label_smoothing=0.2)

    return small(Base(), loss=loss, truth=lambda model, batch: loss(model, batch).sum())


@situation("a callable: rows weighted by their class")
def weighted() -> Case:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return class_loss(model, batch) * torch.tensor([0.5, 2.0, 1.0])[batch["labels"]]

    return small(Base(), loss=loss, truth=lambda model, batch: loss(model, batch).sum())


@situation("a callable that compares a row with the others (contrastive)")
def contrastive() -> Case:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = model(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(found @ found.T, torch.arange(len(found)), reduction="none")

    return small(Base(), loss=loss, truth=lambda model, batch: loss(model, batch).sum())


@situation("regression by problem_type, three outputs")
def regression() -> Case:
    rows = task_rows("sequence")
    for i, row in enumerate(rows):
        row["labels"] = [0.3 * i, -1.0, 2.5]
    case = hugging("bert", "sequence", rows=rows)
    case.square = None
    case.model.config.problem_type = "regression"
    return case


@situation("multi-label")
def multi_label() -> Case:
    rows = task_rows("sequence")
    for i, row in enumerate(rows):
        row["labels"] = [float(i % 2), 1.0, 0.0]
    case = hugging("roberta", "sequence", rows=rows)
    case.square = None
    return case


@situation("the sum over a row's tokens (causal-lm-sum)")
def causal_sum() -> Case:
    def truth(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(found[0, :-1], batch["labels"][0, 1:], reduction="sum", ignore_index=-100)

    return hugging("gpt2", "causal", loss="causal-lm-sum", truth=truth)
