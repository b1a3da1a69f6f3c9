"""How far to trust an audit where nobody knows which samples are bad: planted flips, stability, fidelity.

Flips are planted in a copy of some of the samples, and only the copy's gradients are taken again: the model never trained on
the planted labels, so they are easier to find than labels that it has learned. What the figures compare is choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_fast import ops
from influence_fast.attribution.aggregation import Matrix, aggregate
from influence_fast.attribution.influence_matrix import influence
from influence_fast.attribution.method_inputs import FITTED_TO_QUERIES, Settings, Sources
from influence_fast.data import label_noise as noise
from influence_fast.data.batching import IGNORED
from influence_fast.data.models import load_model
from influence_fast.data.samples import Samples
from influence_fast.errors import InputError
from influence_fast.evaluation.comparison import aggregated, compare, ndr_auc
from influence_fast.gradients.build import build_store
from influence_fast.gradients.store import GradientStore
from influence_fast.ops.projections import Projection

FRACTIONS = (0.1, 0.2, 0.3)
DROP = 0.3
ROWS = 4096
_EXACT_ROWS, _EXACT_QUERIES, _EXACT_BYTES = 256, 64, 1 << 30
_REPEATS = 5
Choice = tuple[str, str, str, float, bool]


def plant(rows: Sequence[Mapping[str, Any]], share: float, seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    """A copy of tokenised rows with known noise: another class, or for causal models the targets of another sample (shuffled
    targets where there is no prompt to tell them by).

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
    if not isinstance(rows[0]["labels"], list):
        labels = [row["labels"] for row in rows]
        planted, mask = noise.uniform(labels, share, max(2, max(labels) + 1), seed)
        for row, label in zip(out, planted, strict=True):
            row["labels"] = label
        return out, mask
    random = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(rows), dtype=torch.bool)
    mask[torch.randperm(len(rows), generator=random)[:count]] = True
    for i in mask.nonzero()[:, 0].tolist():
        prompt, targets = _halves(rows[i])
        if prompt:
            other = int(torch.randint(len(rows) - 1, (), generator=random))
            targets = _halves(rows[other + (other >= i)])[1]
        else:
            targets = [targets[j] for j in torch.randperm(len(targets), generator=random).tolist()]
        ids = (prompt + targets)[: len(rows[i]["input_ids"])] if prompt else targets
        out[i] = {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}
    return out, mask


def self_check(
    sources: Sources,
    settings: Settings,
    methods: Sequence[str],
    aggregations: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    main: tuple[str, str, str],
    scores: Tensor,
    *,
    share: float = 0.05,
    fraction: float = 0.2,
    seed: int = 0,
    folder: Path,
    checkpoints: Sequence[str] = (),
) -> dict[str, Any]:
    """``{"planted", "stability", "checkpoints", "fidelity"}``: numbers and text of the functions of these names.

    ``scores`` are those of ``main``; ``checkpoints`` are folders of the model at other times of the same training.
    """
    n = len(sources.train)
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n, generator=random)[:ROWS].sort().values.tolist()
    rows = [sources.samples.rows[i] for i in chosen]
    copy, mask = plant(rows, share, seed)
    store = _build(folder / "train", sources, settings, copy)
    labels = [row["labels"] for row in copy] if sources.task == "classification" else None
    copied = replace(sources, samples=Samples(copy, None, labels, None, None), train=store, folder=folder)
    matrices = {method: copied.matrix(method) for method in methods}
    return {
        "planted": planted(matrices, store, mask, aggregations, groups, main, fraction, random),
        "stability": stability(sources, main, groups, fraction, random),
        "checkpoints": over_checkpoints(sources, settings, checkpoints, scores, main, groups, fraction, folder),
        "fidelity": fidelity(sources, settings, copy, groups, seed, folder),
    }


def planted(
    matrices: Mapping[str, Matrix],
    store: GradientStore,
    mask: Tensor,
    aggregations: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    main: tuple[str, str, str],
    fraction: float,
    random: torch.Generator,
) -> dict[str, Any]:
    """Layers, method, aggregation, a vote's k and the loss as a voter: chosen on one half of the queries and of the planted
    flips, measured on the other half of both."""
    halves = split(max(matrices.values(), key=lambda matrix: matrix.shape[0]), random)
    where = mask.nonzero()[:, 0][torch.randperm(int(mask.sum()), generator=random)]
    seen = [torch.ones(len(mask), dtype=torch.bool) for _ in range(2)]
    for own, other in ((0, where[len(where) // 2 :]), (1, where[: len(where) // 2])):
        seen[own][other] = False
    loss = -store.column("loss").double()
    scores = [_candidates(matrices, half, aggregations, groups, loss) for half in halves]
    quality = [
        {key: ndr_auc(values[rows], mask[rows]) for key, values in found.items()}
        for found, rows in zip(scores, seen, strict=True)
    ]
    best = max(quality[0], key=lambda key: quality[0][key])
    default = (*main, fraction if main[2].startswith("vote") else 0.0, False)
    ordered = sorted(quality[1].values())
    rows = seen[1]
    table = compare(
        {
            ("random", "", ""): torch.rand(int(rows.sum()), generator=random, dtype=torch.float64),
            ("loss", "", ""): loss[rows],
            ("default", "all", ""): _scores(Subset(matrices[main[0]], halves[1]), main, groups, fraction)[rows],
            ("chosen", "all", ""): scores[1][best][rows],
        },
        mask[rows],
    )
    return {
        "samples": len(mask),
        "flips": int(mask.sum()),
        "queries": [int(half.sum()) for half in halves],
        "candidates": len(ordered),
        "chosen": describe(best),
        "default": describe(default),
        "rows": {
            row["method"]: {name: row[name] for name in ("auc_ndr", "low", "high", "ndr@30", "over_loss")}
            for row in table.rows
        },
        "worst": ordered[0],
        "median": ordered[len(ordered) // 2],
        "best_in_hindsight": ordered[-1],
    }


def stability(
    sources: Sources,
    main: tuple[str, str, str],
    groups: Mapping[str, Sequence[str]],
    fraction: float,
    random: torch.Generator,
) -> dict[str, Any]:
    """Share of the filtered set (the lowest 30 %) that two disjoint halves of the queries agree on, over some splits.

    A method that is fitted to the queries is fitted anew to each half.
    """
    if main[0] in FITTED_TO_QUERIES:
        halves = [half for _ in range(_REPEATS) for half in sources.halves(random)]
        parts = sources.fitted(main[0], halves) if halves else []
    else:
        matrix = sources.matrix(main[0])
        splits = [split(matrix, random) for _ in range(_REPEATS)] if matrix.shape[0] > 1 else []
        parts = [Subset(matrix, half) for halves in splits for half in halves]
    if not parts:
        return {"skipped": f"{main[0]} has too few queries, or none that count one by one", "ranking": " ".join(main)}
    overlaps = [
        _agreement(*(_scores(part, main, groups, fraction) for part in pair))
        for pair in zip(parts[::2], parts[1::2], strict=True)
    ]
    return {"drop": DROP, "overlaps": overlaps, "chance": DROP, "ranking": " ".join(main)}


def over_checkpoints(
    sources: Sources,
    settings: Settings,
    checkpoints: Sequence[str],
    scores: Tensor,
    main: tuple[str, str, str],
    groups: Mapping[str, Sequence[str]],
    fraction: float,
    folder: Path,
) -> dict[str, float]:
    """Share of the filtered set that the same ranking at each other checkpoint agrees on."""
    out = {}
    for place, path in enumerate(checkpoints):
        at = folder / f"checkpoint-{place}"
        there = replace(sources, model=load_model(path, sources.task)[0], folder=at)
        there.train, there.queries = (
            _build(at / name, there, settings, part.rows)
            for name, part in (("train", sources.samples), ("queries", sources.trusted))
        )
        out[path] = _agreement(scores, _scores(there.matrix(main[0]), main, groups, fraction))
    return out


def fidelity(
    sources: Sources,
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Spearman correlation of projected, quantised and indexed scores with exact ones, on a few samples and queries.

    Scores are ``dot`` and ``cosine`` over all layers, aggregated by ``rank``; a second projection seed shows how much of the
    filtered set is chance.
    """
    from scipy.stats import spearmanr

    layers = sources.train.layers
    weights = sum(out * in_ for out, in_ in sources.train.shapes.values())
    count = min(_EXACT_ROWS, len(rows), _EXACT_BYTES // (8 * weights))
    if count < 32:
        return {
            "skipped": f"whole gradients of {weights:,} numbers are too large to compare with on at least 32 samples"
        }
    some, asked = list(rows[:count]), [dict(row) for row in sources.trusted.rows[: min(_EXACT_QUERIES, count)]]
    projection = Projection.parse(settings.projection)
    variants = {"exact": ("identity", "float32"), "as configured": (settings.projection, settings.dtype)}
    variants["int8"] = (settings.projection, "int8")
    if projection.kind != "identity":
        again = replace(projection, seed=(projection.seed or 0) + 1)
        variants["another seed"] = (str(again), settings.dtype)
    scores: dict[str, dict[str, Tensor]] = {}
    for name, (kind, dtype) in variants.items():
        at = folder / name.replace(" ", "-")
        pair = [
            _build(at / side, sources, settings, part, kind, dtype)
            for side, part in (("train", some), ("queries", asked))
        ]
        scores[name] = {m: aggregate(influence(pair[0], pair[1], m), "rank") for m in ("dot", "cosine")}
    out: dict[str, Any] = {
        "samples": count,
        "queries": len(asked),
        "layers": len(layers),
        "correlation": {},
        "overlap": {},
    }
    for name in list(variants)[1:]:
        for method, exact in scores["exact"].items():
            found = scores[name][method]
            rho = float(spearmanr(exact, found).statistic) if float(exact.std()) and float(found.std()) else 0.0
            out["correlation"].setdefault(name, {})[method] = rho
            out["overlap"].setdefault(name, {})[method] = _agreement(exact, found)
    out["index"] = _indexed(GradientStore.open(folder / "train"))
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


def describe(choice: Choice) -> str:
    method, group, aggregation, fraction, with_loss = choice
    text = f"{method} {group} {aggregation}" + (f" (k = {fraction:.0%})" if fraction else "")
    return text + (" with the loss as one more voter" if with_loss else "")


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What a self-check says, for a person who has not read the paper."""
    trial, steady, true = found["planted"], found["stability"], found["fidelity"]
    rows = trial["rows"]
    figure = {name: f"{row['auc_ndr']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for name, row in rows.items()}
    out = [
        f"Self-check: {trial['flips']} labels of a copy of {trial['samples']} samples were changed on purpose. The model "
        "never trained on them, so they are easier to find than mistakes it has learned: compare the figures only with "
        "each other.",
        f"Of {trial['candidates']} settings, {trial['chosen']} did best on one half of the queries. On the other it "
        f"has AUC_NDR {figure['chosen']}; the ranking shown here ({trial['default']}) {figure['default']}, the loss alone "
        f"{figure['loss']}, a random order {figure['random']}.",
        f"How much the choice matters: on that half the settings range from {trial['worst']:.3f} (worst) over "
        f"{trial['median']:.3f} (median) to {trial['best_in_hindsight']:.3f} (best, known only afterwards).",
    ]
    if rows["default"]["over_loss"][0] <= 0:
        out.append("For planted flips the ranking shown is not clearly better than sorting by the loss.")
    if "skipped" in steady:
        out.append(f"Stability over queries: not measured, {steady['skipped']}.")
    else:
        mean = sum(steady["overlaps"]) / len(steady["overlaps"])
        out.append(
            f"Stability: two disjoint halves of the queries agree on {mean:.0%} of the {steady['drop']:.0%} that would be "
            f"dropped ({min(steady['overlaps']):.0%} to {max(steady['overlaps']):.0%} over "
            f"{len(steady['overlaps'])} splits; {steady['chance']:.0%} by chance)."
            + (" More queries would help." if mean < 0.7 else "")
        )
    for path, share in found["checkpoints"].items():
        out.append(f"Stability: at the checkpoint {path}, {share:.0%} of what would be dropped is the same.")
    if "skipped" in true:
        return [*out, f"Fidelity: not measured, {true['skipped']}."]
    for name, values in true["correlation"].items():
        text = ", ".join(
            f"{method} {rho:.3f} (same {true['overlap'][name][method]:.0%} dropped)" for method, rho in values.items()
        )
        out.append(f"Fidelity of scores {name}, rank correlation with exact ones on {true['samples']} samples: {text}.")
    if "recall" in true["index"]:
        out.append(f"Fidelity of the index ({true['index']['factory']}): recall@10 {true['index']['recall']:.3f}.")
    return out


def _candidates(
    matrices: Mapping[str, Matrix],
    half: Tensor,
    aggregations: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    loss: Tensor,
) -> dict[Choice, Tensor]:
    found: dict[Choice, Tensor] = {}
    for method, matrix in matrices.items():
        for fraction in FRACTIONS if any(a.startswith("vote") for a in aggregations) else FRACTIONS[:1]:
            for group, aggregation, values in aggregated(Subset(matrix, half), aggregations, groups, fraction):
                k = fraction if aggregation.startswith("vote") else 0.0
                found[method, group, aggregation, k, False] = values
                found[method, group, aggregation, k, True] = _with_loss(values, loss)
    return found


def _scores(matrix: Matrix, main: tuple[str, str, str], groups: Mapping[str, Sequence[str]], fraction: float) -> Tensor:
    return next(values for group, _, values in aggregated(matrix, [main[2]], groups, fraction) if group == main[1])


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


def _build(
    path: Path,
    sources: Sources,
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    projection: str | None = None,
    dtype: str | None = None,
) -> GradientStore:
    return build_store(
        path,
        sources.model,
        rows,
        sources.train.layers,
        projection or settings.projection,
        loss=sources.task,
        batch_tokens=settings.batch_tokens,
        dtype=dtype or settings.dtype,
        precision=settings.precision,
        truncate=settings.truncate,
        progress=sources.progress,
    )


def _indexed(store: GradientStore) -> dict[str, Any]:
    if 4 * len(store) * sum(store.dims.values()) > _EXACT_BYTES:
        return {"skipped": "the copy is too large to index"}
    try:
        from influence_fast.search.influence_index import InfluenceIndex
    except ImportError:
        return {"skipped": "faiss is not installed"}
    index = InfluenceIndex.build(store)
    return {"factory": index.factory, "recall": index.recall}
