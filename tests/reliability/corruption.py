"""Damage to every kind of file that is read back, and what comes of it.

A worker process makes one change to a tiny store, index or checkpoint, reads everything back, and puts the file as it was.
Each change follows from a seed and its number, so that one is repeated alone by ``--first N --count 1``. Outcomes:

``right error``   one sentence that names the damaged store, index or checkpoint (with checks off: any sentence)
``same numbers``  the answer of the whole files, to the bit
``silent wrong``  another answer, without a word
``traceback``     an error that is not meant for people or names something else; memory that runs out among them
``crash``         the process died, or did not come back
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTCOMES = ("right error", "same numbers", "silent wrong", "traceback", "crash")
KINDS = ("train", "narrow", "queries", "alive", "factored", "blocks", "flat", "faiss", "whitened", "partial")
_SECONDS = 60
_MEMORY = 1 << 30


def make(folder: Path) -> None:
    """Stores of both widths, one that was changed and two of factors, names and indexes of both kinds, an index with
    curvature, and partial sums."""
    import torch

    import influence_fast as inf
    from influence_fast.attribution import aggregation
    from influence_fast.gradients.store_changes import add_segment
    from tests.stores import write_store

    generator = torch.Generator().manual_seed(0)

    def gradients(rows: int) -> dict[str, Any]:
        return {name: torch.randn(rows, dim, generator=generator) for name, dim in (("a.b", 6), ("c", 700))}

    loss = torch.rand(30, generator=generator)
    names = ["ä" * (row % 5) + f"row {row}" for row in range(30)]
    train = write_store(
        folder / "train", gradients(30), {"loss": loss, "correct": loss > 0.5}, ids=names, shard_rows=13
    )
    narrow = write_store(folder / "narrow", gradients(24), dtype="int8", ids=range(100, 124), shard_rows=13)
    queries = write_store(folder / "queries", gradients(4))
    alive = write_store(folder / "alive", gradients(20), ids=[f"row {row}" for row in range(20)], shard_rows=13)
    write_store(folder / "alive" / "segment-00001", gradients(9), ids=[f"new {row}" for row in range(9)], shard_rows=5)
    add_segment(folder / "alive", "segment-00001")
    alive.delete(["row 3", "row 14", "new 2"])
    write_store(folder / "factored", gradients(12), shapes={"a.b": (2, 3), "c": (25, 28)}, shard_rows=5, factors=1)
    write_store(
        folder / "blocks", gradients(12), shapes={"a.b": (2, 3), "c": (25, 28)}, shard_rows=5, factors=2, dtype="int4"
    )
    inf.InfluenceIndex.build(train, "Flat", path=folder / "flat")
    # Of another store: the document of one index is no right document of the other.
    whitened = inf.InfluenceIndex.build(alive, "Flat")
    whitened.add_curvature("trackstar", rank=8)
    whitened.save(folder / "whitened")
    inf.InfluenceIndex.build(narrow, "SQ8", path=folder / "faiss")
    # Sums of the first blocks of a job that was stopped: as large a memory as holds one row each.
    matrix = inf.influence(train, queries, memory=300 * 30)
    every, aggregation._SAVE_SECONDS = aggregation._SAVE_SECONDS, -1.0
    pieces = type(matrix).pieces
    try:
        type(matrix).pieces = lambda self: pieces(self)[:3]  # type: ignore[method-assign]
        remove, aggregation._Partial.remove = aggregation._Partial.remove, lambda self: None  # type: ignore[method-assign]
        inf.aggregate(matrix, "rank", checkpoint=folder / "partial")
    finally:
        type(matrix).pieces = pieces  # type: ignore[method-assign]
        aggregation._Partial.remove = remove  # type: ignore[method-assign]
        aggregation._SAVE_SECONDS = every


def answer(folder: Path, kind: str) -> str:
    """Everything that is read from one of the folders, as one hash."""
    import torch

    import influence_fast as inf

    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())

    if kind in ("flat", "faiss", "whitened"):
        queries = inf.GradientStore.open(folder / "queries")
        index = inf.InfluenceIndex.load(folder / kind)
        for harmful in (False, True):
            scores, ids = index.search(queries, 5, harmful, **({"method": "trackstar"} if kind == "whitened" else {}))
            add(scores)
            add(ids if isinstance(ids, torch.Tensor) else list(ids))
    elif kind == "partial":
        stores = [inf.GradientStore.open(folder / name) for name in ("train", "queries")]
        add(inf.aggregate(inf.influence(*stores, memory=300 * 30), "rank", checkpoint=folder / "partial"))
    else:
        store = inf.GradientStore.open(folder / kind)
        add(list(store.ids))
        for name in store.layers:
            add(store.read(name))
            add(store.read(name, [3, 1]))
            add(store.sqnorm(name))
        for name in store.columns:
            add(store.column(name))
        train = store if kind != "queries" else inf.GradientStore.open(folder / "train")
        queries = store if kind == "queries" else inf.GradientStore.open(folder / "queries")
        asked = {name: queries.read(name) for name in queries.layers} if kind in ("factored", "blocks") else queries
        matrix = inf.influence(train, asked, "cosine")
        add(inf.aggregate(matrix, "mean"))
    return digest.hexdigest()


def targets(folder: Path) -> list[tuple[str, str]]:
    """Files that may be damaged, with what is then asked: what reads them."""
    found = []
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder)
        if path.is_file() and not path.name.endswith(".lock"):
            found.append((str(part), part.parts[0]))
            if part.parts[0] in ("train", "narrow") and path.name.startswith("shard"):
                found.append((str(part), "flat" if part.parts[0] == "train" else "faiss"))
    return found


CHANGES = ("bit", "bytes", "page", "truncation", "growth", "copy", "swap", "pages swapped", "missing", "lines", "json")


def change(folder: Path, name: str, how: str, dice: random.Random) -> list[str]:
    """Damage a file; names of the files that are not as they were."""
    path = folder / name
    data = bytearray(path.read_bytes())
    size = max(len(data), 1)
    # Half of the changes in what is read first.
    at = dice.randrange(min(size, 400)) if dice.random() < 0.5 else dice.randrange(size)
    changed = [name]
    if how == "bit" and data:
        data[at] ^= 1 << dice.randrange(8)
    elif how == "bytes":
        data[at : at + 8] = dice.choice([b"\xff" * 8, b"\x00" * 8, dice.randbytes(8), b"9" * 8])[: len(data) - at]
    elif how == "page":
        data[at // 64 * 64 : at // 64 * 64 + 512] = bytes(len(data[at // 64 * 64 : at // 64 * 64 + 512]))
    elif how == "truncation":
        del data[at:]
    elif how == "growth":
        data += dice.choice([b"\x00", b"\n", b"{}\n", dice.randbytes(dice.randrange(1, 900))])
    elif how in ("copy", "swap"):
        others = [
            p for p in path.parent.iterdir() if p.is_file() and p != path and p.suffix == path.suffix and p.suffix
        ]
        others += [p for p in folder.rglob(path.name) if p != path]
        other = dice.choice(sorted(others)) if others else path
        data, theirs = bytearray(other.read_bytes()), bytes(data)
        if how == "swap":
            other.write_bytes(theirs)
            changed.append(str(other.relative_to(folder)))
    elif how == "pages swapped":
        step = dice.choice([8, 64, 512])
        one, two = (dice.randrange(max(len(data) // step, 1)) * step for _ in range(2))
        data[one : one + step], data[two : two + step] = data[two : two + step], data[one : one + step]
    elif how == "missing":
        path.unlink()
        return changed
    elif how == "lines":
        lines = bytes(data).splitlines(keepends=True) or [b""]
        one, two = dice.randrange(len(lines)), dice.randrange(len(lines))
        dice.choice(
            [
                lambda: lines.insert(one, lines[two]),
                lambda: lines.pop(one),
                lambda: lines.__setitem__(slice(None), [*lines[one:], *lines[:one]]),
            ]
        )()
        data = bytearray(b"".join(lines))
    elif how == "json":
        data = bytearray(_other_json(bytes(data), dice))
    path.write_bytes(data)
    return changed


_VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 3 * 10**8, 0.5, "", "x", "../../x", "/etc/hosts", [], [[]], {}, {"a": 1}]


def _other_json(data: bytes, dice: random.Random) -> bytes:
    """One value in a file of JSON (a line, a shard's header) becomes another, and seals are made anew."""
    import influence_fast._records as records

    try:
        if data[:1] == b"{" and data.count(b"\n{") == 0:
            document = json.loads(data)
            document.pop("seal", None)
            return records.seal(_with_other_value(document, dice))
        if data[:1] == b"{":
            entries = [json.loads(line) for line in data.splitlines()]
            before, out = entries[0]["before"], []
            number = dice.randrange(len(entries))
            for i, entry in enumerate(entries):
                entry = {key: value for key, value in entry.items() if key not in ("seal", "before")}
                line, before = records.chained(before, _with_other_value(entry, dice) if i == number else entry)
                out.append(line)
            return b"".join(out)
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(_with_other_value(json.loads(data[8 : 8 + size]), dice)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    except (ValueError, KeyError, IndexError):
        return data


def _with_other_value(document: Any, dice: random.Random) -> Any:
    """A copy with one value, at any depth, replaced, taken out, or counted up."""
    document = json.loads(json.dumps(document))
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = dice.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or dice.random() < 0.2:
            break
        place = place[key]
    if isinstance(place, dict) and dice.random() < 0.1:
        del place[key]
    elif isinstance(place[key], int) and dice.random() < 0.5:
        place[key] += dice.choice([1, -1, 8, 2**20])
    else:
        place[key] = dice.choice(_VALUES)
    return document


def work(folder: Path, seed: int, first: int, count: int, checked: bool) -> None:
    """Make changes one after the other; a line for each before and after."""
    import torch

    from influence_fast.errors import InfluenceError
    from influence_fast.gradients.store_records import unverified

    torch.set_num_threads(1)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    expected = {kind: answer(folder, kind) for kind in KINDS}
    _restore(whole)
    chosen = targets(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, -1))
    for number in range(first, first + count):
        dice = random.Random(f"{seed} {number}")
        name, kind = dice.choice(chosen)
        how = dice.choice(CHANGES)
        print(json.dumps([number, name, how, kind]), flush=True)
        changed = change(folder, name, how, dice)
        detail = ""
        try:
            if checked:
                found = answer(folder, kind)
            else:
                with unverified():
                    found = answer(folder, kind)
            outcome = "same numbers" if found == expected[kind] else "silent wrong"
        except InfluenceError as error:
            detail = str(error)
            folders = {str(folder / Path(part).parts[0]) for part in changed}
            # With checks off what is wrong shows where it is used, maybe elsewhere.
            named = not checked or any(place in detail for place in folders)
            outcome = "right error" if named else "traceback"
        except Exception as error:
            outcome, detail = "traceback", f"{type(error).__name__}: {error}"
        _restore(whole)
        print(json.dumps([outcome, detail[:300]]), flush=True)


def _restore(whole: dict[Path, bytes]) -> None:
    for path, data in whole.items():
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def run(seed: int, first: int, count: int, checked: bool = True) -> Iterator[tuple[str, str, str, str, int]]:
    """``(how, outcome, file, detail, number)`` of each change; a worker that dies is replaced by another."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
        base, place = Path(scratch) / "whole", Path(scratch) / "work"
        make(base)
        last = first + count
        while first < last:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(base, place)
            arguments = [str(place), str(seed), str(first), str(last - first), str(int(checked))]
            code = "import sys; from tests.reliability.corruption import main; main(sys.argv[1:])"
            root = str(Path(__file__).parent.parent.parent)
            paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
            process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
            assert process.stdout is not None
            begun: list[Any] | None = None
            for line in _lines(process):
                entry = json.loads(line)
                if len(entry) == 4:
                    begun = entry
                else:
                    assert begun is not None
                    yield begun[2], entry[0], f"{begun[1]} ({begun[3]})", entry[1], begun[0]
                    first, begun = begun[0] + 1, None
            if process.wait() == 0:
                break
            if begun is None:
                raise SystemExit(f"the worker failed before a change was made (exit {process.returncode})")
            yield begun[2], "crash", f"{begun[1]} ({begun[3]})", f"exit {process.returncode}", begun[0]
            first = begun[0] + 1


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Lines of a worker, which is stopped when it says nothing for a minute."""
    from threading import Timer

    assert process.stdout is not None
    while True:
        timer = Timer(_SECONDS, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            return
        yield line


def main(arguments: list[str]) -> None:
    """The worker's."""
    folder, seed, first, count, checked = arguments
    work(Path(folder), int(seed), int(first), int(count), bool(int(checked)))


def table(counts: Counter[tuple[str, str]]) -> str:
    """Counts by change and outcome, in Markdown."""
    hows = [how for how in CHANGES if any(counts[how, outcome] for outcome in OUTCOMES)]
    rows = [[how, *(f"{counts[how, outcome]:,}" for outcome in OUTCOMES)] for how in hows]
    rows.append(["**all**", *(f"{sum(counts[how, outcome] for how in hows):,}" for outcome in OUTCOMES)])
    lines = [["change", *OUTCOMES], ["---"] * (len(OUTCOMES) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
