"""From an audit's ranking to a better training file: what is dropped or relabelled, and a log of why."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import influence_fast._csv as tables
from influence_fast._files import atomic_write
from influence_fast._json import read_object
from influence_fast.attribution.influence import influence
from influence_fast.attribution.influence_matrix import METHODS
from influence_fast.auditing.config import DIGESTS, AuditConfig
from influence_fast.data.forms import is_tokenised, recognise
from influence_fast.data.labels import is_missing
from influence_fast.data.loading import Table, digests, files_of, is_saved, read_table
from influence_fast.data.rewriting import rewrite
from influence_fast.errors import InputError
from influence_fast.gradients.store import GradientStore

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

    @cached_property
    def table(self) -> Table:
        """The data that were audited.

        Raises:
            InputError: they cannot be read, or are no longer what they were.
        """
        data, known = self.config.data, self.folder / DIGESTS
        # Files may have moved since.
        now = list(digests("train", self.source, data.split).values())
        if known.exists() and list(read_object(known, "audit").values()) != now:
            raise InputError(
                f"train: {self.source} has changed since the audit; a row's number may mean another row now"
            )
        return read_table("train", self.source, data.split, data.limit, data.skip_bad)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of the data by sample's id.

        Raises:
            InputError: two rows of one id; data that no longer have a row for each sample.
        """
        found: dict[str, int] = {}
        named = "id" in self.table.columns
        for number, row in enumerate(self.table.rows):
            name = row.get("id") if named else number
            # As a CSV gives it back.
            if not is_missing(name) and found.setdefault(tables.original(tables.cell(str(name))), number) != number:
                raise InputError(f"train: two rows have the id {name!r}, so a decision cannot tell them apart")
        gone = [name for name in self.ids if name not in found]
        if gone:
            raise InputError(f"train: the data have changed since the audit: no row has the id {gone[0]!r}")
        return found


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
    acts = {audit.row_of[name]: (name, act) for name, act in decided.items() if act.action != "keep"}
    column = _label_column(audit)
    if column is None and any(act.action == "relabel" for _, act in acts.values()):
        raise InputError("relabel: the samples of this audit have no single column of labels")
    value_of = _label_values(audit, column)

    def change(number: int) -> Mapping[str, Any] | None:
        if number not in acts:
            return {}
        act = acts[number][1]
        return None if act.action == "drop" else {str(column): value_of(str(act.label))}

    written = _write(audit, Path(out), change)
    log = Path(f"{out}.log.csv")
    lines = [[n, name, act.action, act.label or "", act.why] for n, (name, act) in sorted(acts.items())]
    atomic_write(log, tables.as_text(["row", "id", "decision", "label", "why"], lines))
    dropped = sum(act.action == "drop" for _, act in acts.values())
    return {
        "rows": written,
        "kept": written - dropped,
        "dropped": dropped,
        "relabelled": len(acts) - dropped,
        "not_audited": written - len(audit.table),
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
    kept = {audit.row_of[audit.ids[i]] for i in chosen}
    written = _write(audit, Path(out), lambda number: {} if number in kept else None)
    return {"rows": written, "kept": len(kept), "not_audited": written - len(audit.table), "out": str(out)}


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
    return row["suggested_label"] if row["suggested_label"] != row["label"] else None


def _reviewed(audit: Audit, path: Path) -> dict[str, Decision]:
    known, out = set(audit.ids), {}
    for number, row in enumerate(_read_csv("decisions", path, ("id", "decision")), 1):
        name, action, label = row["id"], row["decision"].strip().lower(), row.get("label") or ""
        where = f"decisions: {path.name}, row {number}"
        if not action:
            continue
        if name not in known:
            raise InputError(f"{where}: the audit has no sample {name!r}")
        if action not in ACTIONS:
            raise InputError(f"{where}: expected {', '.join(ACTIONS)}, got {row['decision']!r}")
        if action == "relabel" and not label:
            raise InputError(f"{where}: relabel needs a label")
        out[name] = Decision(action, label if action == "relabel" else None, row.get("why") or "reviewed")
    return out


def _label_column(audit: Audit) -> str | None:
    """The one column that holds the labels or answers, as the audit recognised it; None where there is no such one."""
    columns, first = audit.table.columns, audit.table.rows[0]
    if is_tokenised(first):
        return "labels"
    task = audit.config.task
    if task == "auto":
        task = "classification" if "label" in audit.rows[0] else "causal-lm"
    targets = recognise("train", columns, first, audit.config.data, task).targets
    return targets[0] if len(targets) == 1 else None


def _label_values(audit: Audit, column: str | None) -> Callable[[str], Any]:
    """From a label as it is shown to the value that the data hold: a number where they hold numbers. Answers are texts."""
    pairs: dict[str, Any] = {}
    for row in audit.rows if column is not None else ():
        if "label" in row:
            pairs.setdefault(row["label"], audit.table.rows[audit.row_of[row["id"]]].get(str(column)))

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
            read = csv.DictReader(file, strict=True)
            rows = [{str(name): tables.original(text or "") for name, text in row.items() if name} for row in read]
            header = list(read.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{argument}: cannot read {path} ({error})") from None
    lacking = [name for name in needed if name not in header]
    if lacking:
        raise InputError(f"{argument}: {path} has no column {lacking[0]!r}; expected {', '.join(needed)}")
    if not rows and argument == "audit":
        raise InputError(f"{argument}: {path} has no rows; the audit is not finished")
    return rows


def _number(argument: str, column: str, text: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise InputError(f"{argument}: column {column!r} of scores.csv: expected a number, got {text!r}") from None
