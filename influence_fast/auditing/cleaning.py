"""From an audit's ranking to a better training file: what is dropped or relabelled, and a log of why."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import influence_fast._csv as tables
from influence_fast._files import atomic_write
from influence_fast._json import read_object
from influence_fast.auditing.config import AuditConfig
from influence_fast.data.forms import is_tokenised, recognise
from influence_fast.data.labels import is_missing
from influence_fast.data.loading import files_of, is_saved, read_table
from influence_fast.data.rewriting import rewrite
from influence_fast.errors import InputError

ACTIONS = ("keep", "relabel", "drop")


@dataclass(frozen=True)
class Decision:
    """What is to become of a sample, ``keep``, ``relabel`` or ``drop``, with its new label and the reason."""

    action: str
    label: str | None = None
    why: str = ""


class Audit:
    """A finished audit's folder: its settings, its table of scores, and which row of the data each sample is.

    Raises:
        InputError: no folder of a finished audit; names what is missing or wrong.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        options = read_object(self.folder / "config.json", "audit")
        model, train, queries = (options.pop(name, None) for name in ("model", "train", "queries"))
        self.config = AuditConfig.from_options(model, train, queries, options)
        if self.config.data.block_size is not None:
            raise InputError("audit: its samples are blocks of several texts, so no row of the data is one of them")
        self.source = self.config.train
        self.rows = _read_csv("audit", self.folder / "scores.csv", ("id", "rank", "score"))
        self.ids = [row["id"] for row in self.rows]
        # Votes tie; ranks do not.
        self.order = sorted(range(len(self.rows)), key=lambda i: _number("audit", "rank", self.rows[i]["rank"]))

    def numbers(self) -> tuple[dict[str, int], int]:
        """Row of the data by sample's id, and how many rows were read."""
        data = self.config.data
        table = read_table("train", self.source, data.split, data.limit, data.skip_bad)
        if "id" not in table.columns:
            return {str(number): number for number in range(len(table))}, len(table)
        found: dict[str, int] = {}
        for number, row in enumerate(table.rows):
            if not is_missing(row.get("id")) and found.setdefault(str(row["id"]), number) != number:
                raise InputError(f"train: two rows have the id {row['id']!r}, so a decision cannot tell them apart")
        return found, len(table)


def decide(
    audit: Audit,
    *,
    drop: str | None = None,
    below: float | None = None,
    relabel: bool = False,
    decisions: str | Path | None = None,
) -> dict[str, Decision]:
    """What becomes of each sample that is not kept as it is, by id.

    Args:
        audit: whose ranking, and whose suggestions.
        drop: leave out so many of the most harmful samples: a number, or a share such as ``10%``.
        below: leave out samples whose label is right with less than this probability.
        relabel: give the samples that ``drop`` or ``below`` names the label that the audit suggests instead; without them,
            every sample for which it suggests another one.
        decisions: a CSV with ``id``, ``decision`` (keep, relabel, drop) and ``label`` for those that are relabelled, as the
            report exports it; it goes before the other rules.

    Raises:
        InputError: nothing to decide by, a rule that this audit has no numbers for, decisions on samples that it lacks.
    """
    if drop is None and below is None and not relabel and decisions is None:
        raise InputError("clean: expected one of --drop, --below, --relabel, --decisions")
    chosen: dict[int, str] = {}
    if drop is not None:
        count = count_of("drop", drop, len(audit.rows))
        ranked = [(i, f"rank {place} of {len(audit.rows)}, most harmful first") for place, i in enumerate(audit.order)]
        chosen |= dict(ranked[:count])
    if below is not None:
        chosen |= _improbable(audit, below)
    if relabel and drop is None and below is None:
        chosen = {i: "the audit suggests another label" for i in range(len(audit.rows)) if _suggested(audit, i)}
    out: dict[str, Decision] = {}
    for i, why in chosen.items():
        label = _suggested(audit, i) if relabel else None
        if not relabel:
            out[audit.ids[i]] = Decision("drop", None, why)
        elif label is not None:
            out[audit.ids[i]] = Decision("relabel", label, why)
    if decisions is not None:
        out |= _reviewed(audit, Path(decisions))
    return out


def clean(folder: str | Path, out: str | Path, **rules: Any) -> dict[str, Any]:
    """Write the audited training data without what is dropped, with what is relabelled, and ``OUT.log.csv`` beside it.

    The format, the columns and the order are those of the input; rows that no decision concerns stay as they are, also
    those that the audit did not read. The same audit and rules give the same bytes.

    Args:
        folder: of the audit.
        out: a file; a folder where the data are a saved data set or several files.
        rules: as of :func:`decide`.

    Returns:
        ``{"rows", "kept", "dropped", "relabelled", "out", "log"}``.

    Raises:
        InputError: as of :func:`decide`; data in memory or on a hub; an output that is there already.
    """
    audit = Audit(folder)
    decided = decide(audit, **rules)
    numbers, rows = audit.numbers()
    column = _label_column(audit)
    acts = {numbers[name]: decision for name, decision in decided.items() if decision.action != "keep"}
    for decision in acts.values():
        if decision.action == "relabel" and column is None:
            raise InputError("relabel: the samples of this audit have no single column of labels")
    names = _label_values(audit, column)

    def change(number: int) -> Mapping[str, Any] | None:
        decision = acts.get(number)
        if decision is None:
            return {}
        return None if decision.action == "drop" else {str(column): names(str(decision.label))}

    written = _write(audit, Path(out), change)
    log = Path(f"{out}.log.csv")
    header = ["row", "id", "decision", "label", "why"]
    by_row = {number: name for name, number in numbers.items()}
    lines = [[n, by_row[n], acts[n].action, acts[n].label or "", acts[n].why] for n in sorted(acts)]
    atomic_write(log, tables.as_text(header, lines))
    dropped = sum(decision.action == "drop" for decision in acts.values())
    return {
        "rows": written,
        "kept": written - dropped,
        "dropped": dropped,
        "relabelled": len(acts) - dropped,
        "not_audited": written - rows,
        "out": str(out),
        "log": str(log),
    }


def select(folder: str | Path, out: str | Path, top: str, per_group: str | None = None) -> dict[str, Any]:
    """Write the rows that help the queries most, in the input's own format, columns and order.

    This is the use of LESS (Xia et al. 2024, arXiv 2402.04333). Without groups the audit's ranking says which rows these
    are. With groups of queries a sample's influence on a group is its mean over it, and the groups take turns: each gets
    the row that helps it most of those that are left.

    Args:
        folder: of an audit, whose queries are the target.
        out: as of :func:`clean`.
        top: how many, or a share such as ``5%``.
        per_group: a column of the queries by which to take the same number of rows for each of its values.

    Raises:
        InputError: as of :func:`clean`; queries without that column.
    """
    audit = Audit(folder)
    count = count_of("top", top, len(audit.rows))
    chosen = audit.order[::-1][:count] if per_group is None else _balanced(audit, count, per_group)
    numbers, rows = audit.numbers()
    kept = {numbers[audit.ids[i]] for i in chosen}
    written = _write(audit, Path(out), lambda number: {} if number in kept else None)
    return {"rows": written, "kept": len(kept), "not_audited": written - rows, "out": str(out)}


def count_of(argument: str, text: str, total: int) -> int:
    """A number of rows from ``"120"`` or ``"10%"``; InputError unless it is 1 or more, and all at most."""
    try:
        share = text.strip().endswith("%")
        value = float(text.strip().removesuffix("%")) * (total / 100 if share else 1)
        count = round(value)
        if count < 1 or count > total or (not share and count != value):
            raise ValueError
    except (ValueError, OverflowError):
        raise InputError(
            f"{argument}: expected a number of rows up to {total}, or a share such as 10%, got {text!r}"
        ) from None
    return count


def _balanced(audit: Audit, count: int, column: str) -> list[int]:
    """Samples in turn for each group of queries, the best that is left for it."""
    from influence_fast.attribution.influence import influence
    from influence_fast.attribution.influence_matrix import METHODS
    from influence_fast.gradients.store import GradientStore

    if audit.config.queries is None:
        raise InputError(f"per_group: the audit had no queries of its own, so none has a column {column!r}")
    queries = read_table("queries", audit.config.queries, skip_bad=audit.config.data.skip_bad)
    if column not in queries.columns:
        raise InputError(f"per_group: queries have no column {column!r}; there are {', '.join(queries.columns)}")
    stores = [GradientStore.open(audit.folder / "stores" / name) for name in ("train", "queries")]
    values = [str(value) for value in queries.column(column)]
    if len(values) != len(stores[1]):
        # Rows that were left out have no gradient; those that stayed are known by their number.
        by_id = {
            str(row.get("id", number)): value
            for number, (row, value) in enumerate(zip(queries.rows, values, strict=True))
        }
        values = [by_id[str(name)] for name in stores[1].ids]
    used = audit.config.methods or ()
    method = next((name for name in used if name in METHODS and name != "dot"), "cosine")
    matrix = influence(stores[0], stores[1], method)
    groups = sorted(set(values))
    import torch

    helped = torch.zeros(len(groups), len(audit.rows), dtype=torch.float64)
    of = torch.tensor([groups.index(value) for value in values])
    for _, rows, block in matrix:
        helped.index_add_(0, of[rows], block.double())
    helped /= torch.bincount(of, minlength=len(groups))[:, None]
    ranked = helped.argsort(dim=1, descending=True, stable=True).tolist()
    taken: dict[int, None] = {}
    places = [iter(order) for order in ranked]
    while len(taken) < count:
        for place in places:
            if len(taken) < count:
                best = next((i for i in place if i not in taken), None)
                if best is not None:
                    taken[best] = None
    return list(taken)


def _improbable(audit: Audit, below: float) -> dict[int, str]:
    if not 0 < below <= 1:
        raise InputError(f"below: expected a probability above 0 and up to 1, got {below}")
    if not audit.rows or "label_probability" not in audit.rows[0]:
        raise InputError(
            "below: this audit has no probability of a label being right; audits of classifiers by the pool have one "
            "(--drop takes a number or share of rows instead)"
        )
    values = [_number("audit", "label_probability", row["label_probability"]) for row in audit.rows]
    return {i: f"the label is right with probability {value:.3f}" for i, value in enumerate(values) if value < below}


def _suggested(audit: Audit, i: int) -> str | None:
    """The label that the audit suggests in place of the given one, if it does."""
    row = audit.rows[i]
    if "suggested_label" not in row:
        raise InputError(
            "relabel: this audit suggests no labels; audits of classifiers do (--decisions takes your own)"
        )
    return tables.original(row["suggested_label"]) if row["suggested_label"] != row["label"] else None


def _reviewed(audit: Audit, path: Path) -> dict[str, Decision]:
    known, out = {tables.original(name): name for name in audit.ids}, {}
    for line, row in enumerate(_read_csv("decisions", path, ("id", "decision")), 2):
        name, action = tables.original(row["id"]), row["decision"].strip().lower()
        if not action:
            continue
        if name not in known:
            raise InputError(f"decisions: {path.name}, row {line}: the audit has no sample {name!r}")
        if action not in ACTIONS:
            raise InputError(
                f"decisions: {path.name}, row {line}: expected {', '.join(ACTIONS)}, got {row['decision']!r}"
            )
        label = tables.original(row.get("label") or "")
        if action == "relabel" and not label:
            raise InputError(f"decisions: {path.name}, row {line}: relabel needs a label")
        out[known[name]] = Decision(action, label if action == "relabel" else None, row.get("why") or "reviewed")
    return out


def _label_column(audit: Audit) -> str | None:
    """The one column that holds the labels or answers, as the audit recognised it; None where there is no such one."""
    data = audit.config.data
    table = read_table("train", audit.source, data.split, 1, True)
    if is_tokenised(table.rows[0]):
        return "labels"
    task = audit.config.task
    if task == "auto":
        task = "classification" if "label" in audit.rows[0] else "causal-lm"
    targets = recognise("train", table.columns, table.rows[0], data, task).targets
    return targets[0] if len(targets) == 1 else None


def _label_values(audit: Audit, column: str | None) -> Callable[[str], Any]:
    """From a label as it is shown to the value that the data hold: a number where they hold numbers. Answers are texts."""
    data = audit.config.data
    if column is None:
        return lambda shown: shown
    table = read_table("train", audit.source, data.split, data.limit, data.skip_bad)
    by_id, _ = audit.numbers()
    pairs: dict[str, Any] = {}
    for row in audit.rows:
        if "label" in row:
            pairs.setdefault(tables.original(row["label"]), table.rows[by_id[row["id"]]].get(column))

    def value(shown: str) -> Any:
        if pairs and shown not in pairs:
            raise InputError(f"relabel: no sample has the label {shown!r}; there are {', '.join(sorted(pairs))}")
        return pairs.get(shown, shown)

    return value


def _write(audit: Audit, out: Path, change: Callable[[int], Mapping[str, Any] | None]) -> int:
    data = audit.config.data
    source = audit.source
    if out.exists() and out.is_dir() and any(out.iterdir()):
        raise InputError(f"out: {out} is a folder that is not empty")
    if isinstance(source, str) and is_saved(Path(source.partition(":")[0])):
        return _write_saved(Path(source.partition(":")[0]), data.split or source.partition(":")[2], out, change)
    files = files_of("train", source, data.split)
    if any(out.absolute() == file.absolute() for file in files):
        raise InputError(f"out: {out} is the data that was audited; choose another name")
    if len(files) == 1 and not out.is_dir():
        return rewrite("train", files[0], out, change)
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise InputError(f"train: several of its files have one name, and {out} can hold it once")
    out.mkdir(parents=True, exist_ok=True)
    first = 0
    for file in files:
        first += rewrite("train", file, out / file.name, change, first)
    return first


def _write_saved(folder: Path, split: str, out: Path, change: Callable[[int], Mapping[str, Any] | None]) -> int:
    """A data set that ``datasets`` saved; other splits are written as they are."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    several = isinstance(found, datasets.DatasetDict)
    name = (split or ("train" if "train" in found else next(iter(found)))) if several else ""
    part = found[name] if several else found
    acts = {number: change(number) for number in range(len(part))}
    cells = {number: act for number, act in acts.items() if act}
    if cells:
        part = part.map(
            lambda row, number: {**row, **cells.get(number, {})},
            with_indices=True,
            features=part.features,
            load_from_cache_file=False,
            keep_in_memory=True,
            new_fingerprint="relabelled",
        )
    kept = part.select([number for number, act in acts.items() if act is not None], new_fingerprint="cleaned")
    (datasets.DatasetDict({**found, name: kept}) if several else kept).save_to_disk(str(out))
    return len(acts)


def _read_csv(argument: str, path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(1 << 30)
            rows = list(csv.DictReader(file, strict=True))
            header = list(rows[0]) if rows else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{argument}: cannot read {path} ({error})") from None
    lacking = [name for name in needed if name not in header]
    if lacking and rows:
        raise InputError(f"{argument}: {path} has no column {lacking[0]!r}; expected {', '.join(needed)}")
    if not rows and argument == "audit":
        raise InputError(f"{argument}: {path} has no rows; the audit is not finished")
    return rows


def _number(argument: str, column: str, text: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise InputError(f"{argument}: column {column!r} of scores.csv: expected a number, got {text!r}") from None
