"""Where rows come from: files, globs, folders, saved data sets, hub names, and what Python code holds in memory."""

from __future__ import annotations

import glob
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from influence_fast._files import sha256
from influence_fast.data.files import BadLine, Row, class_names, feature_names, format_of, read_file
from influence_fast.errors import InputError

# Names of a split that a file of a folder is recognised by.
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
_SPLITS |= {"dev": "validation", "test": "test", "testing": "test", "eval": "test"}
# Problems that a message lists before it only counts them.
SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """A row, or a line that gave none, that no sample can be made of: where it is and what is wrong."""

    where: str
    reason: str
    empty: bool = False

    def __str__(self) -> str:
        return f"{self.where} {self.reason}"


def refuse(argument: str, problems: Sequence[Problem], total: int) -> None:
    """Raise InputError that names the first problems and the way round them, if there are any."""
    if not problems:
        return
    shown = "; ".join(map(str, problems[:SHOWN]))
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    count = "" if len(problems) == 1 else f"{len(problems)} of {total} rows have a problem: "
    raise InputError(f"{argument}: {count}{shown}{more} (--skip-bad leaves such rows out and lists them)")


@dataclass
class Table(Sequence[Row]):
    """Rows in memory, each with its place in the file that it comes from.

    Attributes:
        rows: dicts by column; a column that a row lacks is absent from it.
        columns: names of all columns, in the order that they were met.
        class_names: names of the classes by column, where the source knows them.
        skipped: lines that gave no row.
        sources: first row of each file, and the file's name; ``lines`` has the line of each row.
    """

    rows: list[Row]
    columns: list[str] = field(default_factory=list)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[Problem] = field(default_factory=list)
    sources: list[tuple[int, str, str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.columns:
            self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def where(self, index: int) -> str:
        """A row for a message: its number, and its file and line where it has them."""
        if not self.lines:
            return f"row {index}"
        _, name, unit = self.sources[bisect_right(self.sources, index, key=lambda source: source[0]) - 1]
        return f"row {index} ({name}, {unit} {self.lines[index]})"

    def column(self, name: str) -> list[Any]:
        """One column; None where a row lacks it."""
        return [row.get(name) for row in self.rows]


def read_table(
    argument: str,
    source: Any,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Table:
    """Rows of whatever data come in.

    Args:
        argument: what messages call the source.
        source: a file (JSON lines, JSON, CSV, TSV or Parquet, also compressed), a glob, a folder of such files or of a saved
            data set, a hub name, or several of these; behind a folder or hub name, ``:split``. Or in memory: a sequence or
            iterator of dicts, a ``datasets`` data set (also an iterable one), a pandas frame, a dict of columns.
        split: which split to read of a source with several; ``train`` where there is one, or else the only one. Of several
            sources at least one has splits.
        limit: read no more rows than this.
        skip_bad: leave out lines that cannot be read, and list them in ``skipped``.

    Raises:
        InputError: nothing there, no such split, lines that cannot be read; names file and line.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected a positive number of rows, got {limit}")
    table, parts = Table([]), _parts(argument, source)
    if split is not None and all(isinstance(part, str | Path) and Path(part).is_file() for part in parts):
        raise InputError(f"split: {argument} ({describe(source)}) has no splits, got {split!r}; leave it out")
    for part in parts:
        if isinstance(part, str | Path):
            _read_path(argument, str(part), split, limit, table)
        else:
            _read_object(argument, part, split, limit, table)
    table.columns = list(dict.fromkeys(name for row in table.rows for name in row))
    if not skip_bad and table.skipped:
        problems = [Problem(f"cannot read {problem.where}: it", problem.reason) for problem in table.skipped]
        refuse(argument, problems, len(table) + len(table.skipped))
    if not table.rows:
        raise InputError(f"{argument}: {describe(source)} has no rows")
    return table


def describe(source: Any) -> str | list[str]:
    """A source as settings record it: its path or paths, or what kind of object it was."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Sequence) and source and all(isinstance(part, str | Path) for part in source):
        return [str(part) for part in source] if len(source) > 1 else str(source[0])
    return f"({type(source).__name__} in memory)"


def _parts(argument: str, source: Any) -> list[Any]:
    """Each file, folder, hub name or object of a source."""
    several = isinstance(source, list | tuple) and source and all(isinstance(part, str | Path) for part in source)
    out: list[Any] = []
    for part in source if several else [source]:
        if isinstance(part, str | Path) and not Path(part).exists() and re.search(r"[*?\[]", str(part)):
            found = sorted(glob.glob(str(part), recursive=True))
            if not found:
                raise InputError(f"{argument}: no file matches {str(part)!r}")
            out += found
        else:
            out.append(part)
    return out


def _read_path(argument: str, path: str, split: str | None, limit: int | None, table: Table) -> None:
    path, named = _path_and_split(path)
    split = named or split
    file = Path(path)
    if file.is_dir():
        _read_folder(argument, file, split, limit, table)
    elif file.exists() and named:
        raise InputError(f"{argument}: {path} is one file, which has no split {named!r}")
    elif file.exists():
        _read_files(argument, [file], limit, table)
    elif format_of(path) or file.suffix or path.count("/") > 1:
        raise InputError(f"{argument}: no file {path!r}")
    else:
        _read_hub(argument, path, split, limit, table)


def _by_split(source: Any) -> bool:
    """Whether these are several data sets by name; a dict of lists or arrays is one table by columns."""
    return isinstance(source, Mapping) and bool(source) and all(hasattr(value, "features") for value in source.values())


def _read_files(argument: str, files: Iterable[Path], limit: int | None, table: Table) -> None:
    for file in files:
        unit = "row" if format_of(file.name) in (".parquet", ".json") else "line"
        table.sources.append((len(table.rows), file.name, unit))
        table.class_names |= class_names(file)
        for line, row in read_file(argument, file):
            if limit is not None and len(table.rows) >= limit:
                return
            if isinstance(row, BadLine):
                table.skipped.append(Problem(f"{file.name}, {unit} {line}", row.reason))
            else:
                table.rows.append(row)
                table.lines.append(line)


def files_of(argument: str, source: Any, split: str | None = None) -> list[Path]:
    """The data files that :func:`read_table` reads, in its order.

    Raises:
        InputError: no data files: a saved data set, a hub name, or something in memory.
    """
    out: list[Path] = []
    for part in _parts(argument, source):
        if not isinstance(part, str | Path):
            raise InputError(f"{argument}: expected data files, got a {type(part).__name__} in memory")
        path, named = _path_and_split(str(part))
        file = Path(path)
        if file.is_dir() and not is_saved(file):
            out += _folder_files(argument, file, named or split)
        elif file.is_file():
            out.append(file)
        else:
            raise InputError(f"{argument}: expected data files, and {path!r} is none")
    return out


def digests(argument: str, source: Any, split: str | None = None) -> dict[str, str]:
    """SHA-256 of each file that rows are read from, by name; nothing of a hub name or what is in memory."""
    out: dict[str, str] = {}
    for part in _parts(argument, source):
        folder = Path(_path_and_split(str(part))[0]) if isinstance(part, str | Path) else Path()
        if not isinstance(part, str | Path) or not folder.exists():
            continue
        saved = folder.is_dir() and is_saved(folder)
        files = sorted(folder.rglob("*.arrow")) if saved else files_of(argument, part, split)
        out |= {str(file): sha256(file) for file in files}
    return out


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved a data set in a folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _path_and_split(path: str) -> tuple[str, str | None]:
    place, _, named = path.rpartition(":")
    return (place, named) if place and not Path(path).exists() and re.fullmatch(r"\w+", named) else (path, None)


def _read_folder(argument: str, folder: Path, split: str | None, limit: int | None, table: Table) -> None:
    """A data set that ``datasets`` saved, or data files, which a split's name in their names tells apart."""
    import datasets

    datasets.disable_progress_bars()
    if is_saved(folder):
        try:
            found = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise InputError(f"{argument}: {str(folder)!r} is no folder of a saved data set ({error})") from None
        _read_object(argument, found, split, limit, table, str(folder))
        return
    _read_files(argument, _folder_files(argument, folder, split), limit, table)


def _folder_files(argument: str, folder: Path, split: str | None) -> list[Path]:
    by_split: dict[str, list[Path]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and format_of(path.name)):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if not by_split:
        raise InputError(f"{argument}: {str(folder)!r} is no folder of a saved data set, and has no data files")
    return by_split[_chosen(argument, str(folder), list(by_split), split)]


def _split_of(file: Path) -> str:
    for word in reversed(re.split(r"[^a-z]+", str(file).lower())):
        if word in _SPLITS:
            return _SPLITS[word]
    return "train"


def _chosen(argument: str, name: str, splits: list[str], wanted: str | None) -> str:
    given = wanted if wanted is not None else "train" if "train" in splits else splits[0] if len(splits) == 1 else None
    if given not in splits:
        asked = f"has no split {wanted!r}" if wanted is not None else "has several splits and none is 'train'"
        raise InputError(f"{argument}: {name} {asked}; there are {', '.join(splits)} (--split, or {name}:SPLIT)")
    return given


def _read_hub(argument: str, name: str, split: str | None, limit: int | None, table: Table) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        found = datasets.load_dataset(name, streaming=limit is not None, **_no_code(datasets.__version__))
    except Exception as error:
        raise InputError(f"{argument}: {name!r} is no file, and no data set on the hub ({error})") from None
    _read_object(argument, found, split, limit, table, name)


def _no_code(version: str) -> dict[str, bool]:
    """Versions below 4 may ask whether to run a data set's script; later ones run none, and refuse the argument."""
    return {"trust_remote_code": False} if int(version.split(".")[0]) < 4 else {}


def _read_object(
    argument: str, source: Any, split: str | None, limit: int | None, table: Table, name: str | None = None
) -> None:
    """Rows of what is in memory, with plain Python values."""
    name = name or str(describe(source))
    if isinstance(source, Table) and limit is None:
        table.__dict__ |= source.__dict__
        return
    if _by_split(source):
        _read_object(argument, source[_chosen(argument, name, list(source), split)], None, limit, table, name)
        return
    own = getattr(source, "split", None) if hasattr(source, "features") else None
    if split is not None and str(own) != split:
        raise InputError(
            f"split: {argument} ({name}) has {'none' if own is None else f'{str(own)!r} alone'}, got {split!r}"
        )
    table.class_names |= feature_names(getattr(source, "features", None))
    for number, row in enumerate(_each(argument, source)):
        if limit is not None and number >= limit:
            return
        if not isinstance(row, Mapping):
            raise InputError(f"{argument}: row {number} is a {type(row).__name__}, expected a dict")
        table.rows.append({str(column): plain(value) for column, value in row.items()})


def _each(argument: str, source: Any) -> Iterator[Any]:
    if isinstance(source, Mapping):
        lengths = {len(values) for values in source.values()}
        if len(lengths) > 1:
            raise InputError(f"{argument}: columns of {sorted(lengths)} entries, expected one length")
        return (dict(zip(source, values, strict=True)) for values in zip(*source.values(), strict=True))
    if hasattr(source, "to_dict") and hasattr(source, "iterrows"):
        return iter(source.to_dict("records"))
    if hasattr(source, "to_pylist"):
        return iter(source.to_pylist())
    if hasattr(source, "__iter__"):
        return iter(source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[index] for index in range(len(source)))
    raise InputError(f"{argument}: expected rows, a data set, a frame or paths, got a {type(source).__name__}")


def plain(value: Any) -> Any:
    """NumPy numbers, 0-dimensional tensors and pandas' missing values as Python's own; arrays and tensors stay."""
    if getattr(value, "ndim", None) == 0 or (hasattr(value, "item") and getattr(value, "shape", None) == ()):
        return value.item()
    return None if type(value).__name__ in ("NAType", "NaTType") else value
