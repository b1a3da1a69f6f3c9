"""How far to trust an audit where nobody knows which samples are bad: planted flips, stability, fidelity.

Flips are planted in a copy of some of the samples, and only the copy's gradients are taken again: the model never trained on
the planted labels, and among the others there are wrong ones. What the figures of ``planted`` compare is choices;
``estimate`` says how well the wrong labels that are there are found, where the model has not learned them by heart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_fast import ops
from influence_fast.attribution.aggregation import aggregate, aggregated
from influence_fast.attribution.exact_influence import METHODS, exact_influence, factor_bytes
from influence_fast.attribution.influence_matrix import Matrix, inner_products
from influence_fast.attribution.method_inputs import AuditInputs, MethodInputs
from influence_fast.attribution.registry import get_method
from influence_fast.auditing.config import SELF_CHECK_ROWS, RankingPlan
from influence_fast.data import label_noise
from influence_fast.data.models import load_model
from influence_fast.data.samples import Samples
from influence_fast.data.tasks import IGNORED
from influence_fast.errors import InfluenceError, InputError
from influence_fast.evaluation.comparison import RankingKey, compare
from influence_fast.evaluation.metrics import ndr_auc
from influence_fast.evaluation.planted import ndr_auc_from_planted
from influence_fast.gradients.build import build_from
from influence_fast.gradients.layers import named_layers
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.search.influence_index import InfluenceIndex

FRACTIONS = (0.1, 0.2, 0.3)
DROP = 0.3
_EXACT_ROWS, _EXACT_QUERIES, _LEAST_EXACT, _LEAST_QUERIES = 256, 64, 32, 4
# Inputs and output gradients of the queries that are held while exact scores are taken; gradients that are indexed.
_HELD_BYTES, _INDEXED_BYTES = 1 << 30, 1 << 30
_REPEATS, _PLANTS = 5, 7919
# Shares: of wrong labels learned by heart, above which planted ones are not like them; of wrong labels, beside all that a
# random label would have, from which planting tells little.
_LEARNED, _MOST_WRONG = 0.25, 0.9


def plant(
    rows: Sequence[Mapping[str, Any]], share: float, seed: int, task: str = ""
) -> tuple[list[dict[str, Any]], Tensor]:
    """A copy of tokenised rows with known noise, by ``task``: another class, other classes of a word or a row, the number of
    another sample, the answers of a pair swapped; of a language model the targets of another sample (shuffled targets where
    there is no prompt to tell them by).

    Raises:
        InputError: a share that leaves fewer than 4 planted samples or as few others.
    """
    out = [dict(row) for row in rows]
    count = round(share * len(rows)) if 0 < share < 1 else 0
    if min(count, len(rows) - count) < 4:
        raise InputError(
            f"self_check: {share!r} of {len(rows)} samples plants {count}; expected a share that plants at least 4 "
            "and leaves as many"
        )
    if not isinstance(rows[0]["labels"], list) and task != "regression":
        labels = [row["labels"] for row in rows]
        planted, mask = label_noise.uniform(labels, share, max(2, max(labels) + 1), seed)
        for row, label in zip(out, planted, strict=True):
            row["labels"] = label
        return out, mask
    random = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(rows), dtype=torch.bool)
    mask[torch.randperm(len(rows), generator=random)[:count]] = True
    classes = 1 + max((max(row["labels"]) for row in rows), default=0) if task == "token-classification" else 0
    for i in mask.nonzero()[:, 0].tolist():
        other = int(torch.randint(len(rows) - 1, (), generator=random))
        other += other >= i
        if task in ("regression", "seq2seq"):
            out[i]["labels"] = rows[other]["labels"]
        elif task == "preference":
            out[i] |= {name: rows[i][name][::-1] for name in ("input_ids", "labels")}
        elif task == "multi-label":
            turned = int(torch.randint(len(rows[i]["labels"]), (), generator=random))
            out[i]["labels"] = [1 - v if place == turned else v for place, v in enumerate(rows[i]["labels"])]
        elif task == "token-classification":
            step = 1 + int(torch.randint(max(1, classes - 1), (), generator=random))
            out[i]["labels"] = [v if v == IGNORED else (v + step) % max(2, classes) for v in rows[i]["labels"]]
        else:
            prompt, targets = _halves(rows[i])
            if prompt:
                targets = _halves(rows[other])[1]
            else:
                targets = [targets[j] for j in torch.randperm(len(targets), generator=random).tolist()]
            ids = (prompt + targets)[: len(rows[i]["input_ids"])] if prompt else targets
            out[i] = {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}
    return out, mask


def self_check(
    inputs: MethodInputs,
    plan: RankingPlan,
    scores: Tensor,
    *,
    share: float = 0.05,
    seed: int = 0,
    folder: Path,
    checkpoints: Sequence[str] = (),
    wrong: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``{"planted", "estimate", "stability", "checkpoints", "fidelity"}``: numbers and text of the functions of these names.

    ``scores`` are those of the main ranking; ``checkpoints`` are folders of the model at other times of the same training;
    ``wrong`` is the audit's estimate of how many labels are wrong.
    """
    random = torch.Generator().manual_seed(seed)
    n = len(inputs.samples.rows)
    chosen = torch.randperm(n, generator=random)[:SELF_CHECK_ROWS].sort().values.tolist()
    # A seed of its own: labels that a user planted by the audit's must not be drawn again, and turned back.
    copy, mask = plant([inputs.samples.rows[i] for i in chosen], share, seed + _PLANTS, inputs.task)
    labels = [row["labels"] for row in copy] if inputs.task == "classification" else None
    samples = Samples(copy, None, labels, None, None)
    if inputs.task == "classification":
        # Labels alone were planted: hidden states and predictions are those of the rows as they were.
        inputs.passes.share(samples, inputs.samples, chosen)
    store = _build(folder / "train", inputs.given, copy)
    copied = inputs.for_samples(samples, store, folder)
    matrices = {method: copied.influence(method) for method in plan.methods}
    return {
        "planted": planted(matrices, store, mask, plan, random),
        "estimate": estimate(inputs, matrices[plan.main.method], store, mask, plan, wrong),
        "stability": stability(inputs, plan, random),
        "checkpoints": over_checkpoints(inputs, checkpoints, scores, plan, folder),
        "fidelity": fidelity(inputs, copy, seed, folder),
    }


def planted(
    matrices: Mapping[str, Matrix], store: GradientStore, mask: Tensor, plan: RankingPlan, random: torch.Generator
) -> dict[str, Any]:
    """Layers, method, aggregation, a vote's k and the loss as a voter: chosen on one half of the queries and of the planted
    flips, measured on the other half of both."""
    halves = split(max(matrices.values(), key=lambda matrix: matrix.shape[0]), random)
    where = mask.nonzero()[:, 0][torch.randperm(int(mask.sum()), generator=random)]
    kept = [torch.ones(len(mask), dtype=torch.bool) for _ in range(2)]
    for own, other in ((0, where[len(where) // 2 :]), (1, where[: len(where) // 2])):
        kept[own][other] = False
    loss = -store.column("loss").double()
    scores = [_candidates(matrices, half, plan, loss) for half in halves]
    quality = [
        {choice: ndr_auc(values[rows], mask[rows]) for choice, values in found.items()}
        for found, rows in zip(scores, kept, strict=True)
    ]
    best = max(quality[0], key=lambda choice: quality[0][choice])
    default = Choice(plan.main, plan.fraction if plan.main.aggregation.startswith("vote") else 0.0)
    ordered = sorted(quality[1].values())
    rows = kept[1]
    table = compare(
        {
            RankingKey("random"): torch.rand(int(rows.sum()), generator=random, dtype=torch.float64),
            RankingKey("loss"): loss[rows],
            RankingKey("default", "all"): _scores(Subset(matrices[plan.main.method], halves[1]), plan)[rows],
            RankingKey("chosen", "all"): scores[1][best][rows],
        },
        mask[rows],
    )
    return {
        "samples": len(mask),
        "flips": int(mask.sum()),
        "queries": [int(half.sum()) for half in halves],
        "candidates": len(ordered),
        "chosen": str(best),
        "default": str(default),
        "rows": {
            row["method"]: {name: row[name] for name in ("auc_ndr", "low", "high", "ndr@30", "over_loss")}
            for row in table.rows
        },
        "worst": ordered[0],
        "median": ordered[len(ordered) // 2],
        "best_in_hindsight": ordered[-1],
    }


def estimate(
    inputs: MethodInputs,
    matrix: Matrix,
    store: GradientStore,
    mask: Tensor,
    plan: RankingPlan,
    wrong: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """AUC_NDR of the main ranking and of the loss on the wrong labels that are there, with intervals.

    Not where the model has learned these by heart: if ``a`` of the training rows are predicted as labelled and ``f`` of the
    labels are wrong, then at least ``(a - (1 - f)) / f`` of the wrong ones are.
    """
    train = inputs.train
    assert isinstance(train, GradientStore)  # an audit's
    if not wrong or wrong.get("low") is None or "correct" not in train.columns:
        return {"skipped": "how many labels are wrong is not known from trusted rows"}
    n, (labels, _) = len(train), inputs.labels()
    share, low, high = (wrong[name] / n for name in ("estimate", "low", "high"))
    classes = int(max(labels)) + 1
    if not 0 < share < _MOST_WRONG * (classes - 1) / classes:
        return {"skipped": f"with {share:.0%} of the labels wrong by its estimate, planted ones say nothing"}
    learned = max(0.0, (float(train.column("correct").double().mean()) - (1 - share)) / share)
    if learned > _LEARNED:
        return {
            "skipped": f"the model has learned {learned:.0%} or more of the wrong labels by heart, so those that it has "
            "never seen are no likeness of them; inf.ndr_auc_from_planted says it of a model that was trained on planted "
            "labels too",
            "learned": learned,
        }
    rankings = {"default": _scores(matrix, plan), "loss": -store.column("loss").double()}
    found = {
        name: ndr_auc_from_planted(values, mask, share, classes, between=(low, high))
        for name, values in rankings.items()
    }
    rows = {name: dict(zip(("auc_ndr", "low", "high"), values, strict=True)) for name, values in found.items()}
    return {"share": share, "learned": learned, "rows": rows}


def stability(inputs: MethodInputs, plan: RankingPlan, random: torch.Generator) -> dict[str, Any]:
    """Share of the filtered set (the lowest 30 %) that two disjoint halves of the queries agree on, over some splits.

    A method that is fitted to the queries is fitted anew to each half.
    """
    method = plan.main.method
    parts: list[Matrix]
    if get_method(method).fitted_to_queries:
        halves = [half for _ in range(_REPEATS) for half in inputs.halves(random)]
        parts = [inputs.fitted_to(half).influence(method) for half in halves]
    else:
        matrix = inputs.influence(method)
        splits = [split(matrix, random) for _ in range(_REPEATS)] if matrix.shape[0] > 1 else []
        parts = [Subset(matrix, half) for halves in splits for half in halves]
    if not parts:
        return {"skipped": f"{method} has too few queries, or none that count one by one", "ranking": str(plan.main)}
    overlaps = [
        _agreement(*(_scores(part, plan) for part in pair)) for pair in zip(parts[::2], parts[1::2], strict=True)
    ]
    return {"drop": DROP, "overlaps": overlaps, "chance": DROP, "ranking": str(plan.main)}


def over_checkpoints(
    inputs: MethodInputs, checkpoints: Sequence[str], scores: Tensor, plan: RankingPlan, folder: Path
) -> dict[str, float]:
    """Share of the filtered set that the same ranking at each other checkpoint agrees on."""
    given, out = inputs.given, {}
    for place, path in enumerate(checkpoints):
        at = folder / f"checkpoint-{place}"
        model = load_model(path, given.task)[0]
        there = replace(given, model=model, folder=at, passes=given.passes.of_model(model))
        train, queries = (
            _build(at / name, there, part.rows) for name, part in (("train", given.samples), ("queries", given.trusted))
        )
        matrix = MethodInputs(train, queries, audit=there).influence(plan.main.method)
        out[path] = _agreement(scores, _scores(matrix, plan))
    return out


def fidelity(inputs: MethodInputs, rows: Sequence[Mapping[str, Any]], seed: int, folder: Path) -> dict[str, Any]:
    """Spearman correlation of projected, quantised and indexed scores with exact ones, on a few samples and queries.

    Exact scores are inner products of whole gradients that are never formed (:func:`~influence_fast.exact_influence`).
    Scores are ``dot`` and ``cosine`` over all layers, aggregated by ``rank``; a second projection seed shows how much of the
    filtered set is chance.
    """
    from scipy.stats import spearmanr

    given = inputs.given
    count = min(_EXACT_ROWS, len(rows))
    if count < _LEAST_EXACT:
        return {"skipped": f"{count} samples are too few to compare on; {_LEAST_EXACT} are the least"}
    # Biases and norms have no factors: the comparison is of weight matrices alone.
    matrices = named_layers(given.model)
    layers = [name for name in given.settings.layers if name in matrices]
    if not layers:
        return {"skipped": "no selected layer is a weight matrix"}
    settings = replace(given.settings, layers=layers)
    some, queries = list(rows[:count]), [dict(row) for row in inputs.trusted.rows[: min(_EXACT_QUERIES, count)]]
    while len(queries) >= _LEAST_QUERIES:
        longest = max(_tokens(row) for row in queries)
        if factor_bytes(given.model, layers, longest * len(queries)) <= _HELD_BYTES:
            break
        queries = queries[: len(queries) // 2]
    if len(queries) < min(_LEAST_QUERIES, len(inputs.trusted.rows)):
        return {"skipped": f"the inputs and gradients of {_LEAST_QUERIES} queries take more than 1 GiB"}
    try:
        exact = exact_influence(
            given.model,
            some,
            queries,
            layers,
            METHODS,
            loss=settings.loss,
            progress=given.progress,
            truncate=settings.truncate,
        )
    except InputError as error:
        return {"skipped": f"whole gradients cannot be compared with: {error}"}
    variants = {"as configured": settings, "int8": replace(settings, dtype="int8")}
    projection = settings.projection
    if projection.kind != "identity":
        again = replace(projection, seed=(projection.seed or 0) + 1)
        variants["another seed"] = replace(settings, projection=again)
    scores = {"exact": {method: aggregate(exact[method], "rank") for method in METHODS}}
    for name, how in variants.items():
        at = folder / name.replace(" ", "-")
        pair = [_build(at / side, given, part, how) for side, part in (("train", some), ("queries", queries))]
        scores[name] = {m: aggregate(inner_products(pair[0], pair[1], m), "rank") for m in METHODS}
    out: dict[str, Any] = {
        "samples": count,
        "queries": len(queries),
        "layers": len(layers),
        "correlation": {},
        "overlap": {},
    }
    for name in variants:
        for method, truth in scores["exact"].items():
            found = scores[name][method]
            rho = float(spearmanr(truth, found).statistic) if float(truth.std()) and float(found.std()) else 0.0
            out["correlation"].setdefault(name, {})[method] = rho
            out["overlap"].setdefault(name, {})[method] = _agreement(truth, found)
    out["index"] = _indexed(inputs)
    return out


def split(matrix: Matrix, random: torch.Generator) -> list[Tensor]:
    """Two disjoint halves of the queries, with as many correctly predicted ones in each."""
    m = matrix.shape[0]
    correct = torch.ones(m, dtype=torch.bool) if matrix.query_correct is None else matrix.query_correct.bool()
    half = torch.zeros(m, dtype=torch.bool)
    for part in (correct, ~correct):
        members = part.nonzero()[:, 0]
        half[members[torch.randperm(len(members), generator=random)[: (len(members) + 1) // 2]]] = True
    return [half, ~half] if m > 1 else [half, half]


class Subset:
    """Some of a matrix's queries, with the face of a matrix."""

    def __init__(self, matrix: Matrix, queries: Tensor) -> None:
        # A method that fits on all queries at once has one row, which stands for any of them.
        self._matrix, self._queries = matrix, queries if len(queries) == matrix.shape[0] else torch.ones(1).bool()
        self.layers = matrix.layers
        self.shape = int(self._queries.sum()), matrix.shape[1]
        correct = matrix.query_correct
        self.query_correct = None if correct is None else correct.bool()[self._queries]

    def __iter__(self) -> Iterator[tuple[str, slice, Tensor]]:
        begin, last = 0, None
        for layer, rows, values in self._matrix:
            begin = begin if layer == last else 0
            kept, last = values[self._queries[rows]], layer
            if len(kept):
                yield layer, slice(begin, begin + len(kept)), kept
            begin += len(kept)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, values in self._matrix.columns():
            yield rows, values[:, self._queries]


class Choice(NamedTuple):
    """A ranking that could have been chosen: which, a vote's share, and whether the loss votes too."""

    key: RankingKey
    fraction: float = 0.0
    with_loss: bool = False

    def __str__(self) -> str:
        text = str(self.key) + (f" (k = {self.fraction:.0%})" if self.fraction else "")
        return text + (" with the loss as one more voter" if self.with_loss else "")


def _candidates(matrices: Mapping[str, Matrix], half: Tensor, plan: RankingPlan, loss: Tensor) -> dict[Choice, Tensor]:
    found: dict[Choice, Tensor] = {}
    for method, matrix in matrices.items():
        for fraction in FRACTIONS if any(a.startswith("vote") for a in plan.aggregations) else FRACTIONS[:1]:
            subset = Subset(matrix, half)
            for group, aggregation, values in aggregated(subset, plan.aggregations, plan.groups, fraction):
                key = RankingKey(method, group, aggregation)
                k = fraction if aggregation.startswith("vote") else 0.0
                found[Choice(key, k)] = values
                found[Choice(key, k, with_loss=True)] = _with_loss(values, loss)
    return found


def _scores(matrix: Matrix, plan: RankingPlan) -> Tensor:
    """Scores of the main ranking."""
    _, group, aggregation = plan.main
    found = aggregated(matrix, [aggregation], plan.groups, plan.fraction)
    return next(values for name, _, values in found if name == group)


def _with_loss(values: Tensor, loss: Tensor) -> Tensor:
    return ops.rank(torch.stack([values, loss]).float()).double().mean(0)


def _agreement(one: Tensor, other: Tensor) -> float:
    """Share of the lowest 30 % by one that are among those by the other."""
    kept = [set(scores.argsort(stable=True)[: int(DROP * len(scores))].tolist()) for scores in (one, other)]
    return len(kept[0] & kept[1]) / max(1, len(kept[0]))


def _halves(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """A causal row's prompt (which may be empty) and its targets."""
    begin = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    return list(row["input_ids"][:begin]), list(row["input_ids"][begin:])


def _tokens(row: Mapping[str, Any]) -> int:
    ids = row["input_ids"]
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def _build(
    path: Path, given: AuditInputs, rows: Sequence[Mapping[str, Any]], settings: BuildSettings | None = None
) -> GradientStore:
    return build_from(path, given.model, rows, settings or given.settings, progress=given.progress)


def _indexed(inputs: MethodInputs) -> dict[str, Any]:
    """Recall of the index that a user of the training store would get, on the trusted queries."""
    train, queries = inputs.train, inputs.queries
    assert isinstance(train, GradientStore)  # an audit's
    rows = min(len(train), _INDEXED_BYTES // (4 * sum(train.dims.values())))
    try:
        factory = InfluenceIndex.choose_factory(train)
        index = InfluenceIndex.build(train, factory, rows=range(rows))
    except InfluenceError as error:
        return {"skipped": str(error)}
    return {"factory": index.factory, "recall": index.measure_recall(queries), "rows": rows}
