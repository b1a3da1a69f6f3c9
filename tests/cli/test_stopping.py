"""Signals that ask to stop end a command as Control-C does, and what the system refuses is one sentence."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from audits import options, run
from stores import gradients, write_store

from influence_fast.attribution import aggregation
from influence_fast.cli.stopping import Stopped, ending, stopping_by_signals


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """As in a shell's foreground: in its background, or under nohup, some of these signals are ignored."""
    ordinary = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in ordinary.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_sentence_and_the_code_of_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    for seed, part in enumerate(("train", "queries")):
        write_store(tmp_path / part, gradients(6, seed))
    monkeypatch.setattr(aggregation, "aggregate_many", lambda *a, **k: os.kill(os.getpid(), getattr(signal, name)))
    given = ["score", "--train", tmp_path / "train", "--queries", tmp_path / "queries", "--out", tmp_path / "s.csv"]
    ended, _, err = run(*given)
    assert ended == code, err
    assert err.strip().startswith(f"stopped by {name}. With --checkpoint the same command goes on")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["queries", "train"]


def _strike(*signals: signal.Signals) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped) as caught, stopping_by_signals():
            _strike(signal.SIGHUP, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, hung_up)
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert ending(caught.value, "build")[1] == 143
    assert ending(KeyboardInterrupt(), "search") == ("stopped by SIGINT", 130)


def test_threads_have_no_signals() -> None:
    def inside() -> None:
        with stopping_by_signals():
            pass

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()


@pytest.mark.parametrize("what", ["a file", "under a file", "a long name", "foreign", "read-only"])
def test_where_an_audit_cannot_be_written(folder: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    out = {
        "a file": tmp_path / "file",
        "under a file": tmp_path / "file" / "out",
        "a long name": tmp_path / ("x" * 300),
        "foreign": tmp_path / "foreign",
        "read-only": tmp_path / "locked" / "out",
    }[what]
    if what == "read-only" and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write anywhere")
    code, shown, err = run("audit", *options(folder), "--out", out)
    assert (code, shown) == (1, "")
    assert err.startswith(f"error: out: {out}")
    assert len(err.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "foreign", "locked"]


def test_what_the_system_refuses_midway(tmp_path: Path) -> None:
    for seed, part in enumerate(("train", "queries")):
        write_store(tmp_path / part, gradients(6, seed))
    given = ["score", "--train", tmp_path / "train", "--queries", tmp_path / "queries", "--out"]
    for out in (tmp_path / "none" / "s.csv", tmp_path / ("x" * 300), tmp_path / "train"):
        code, _, err = run(*given, out)
        assert code == 1, err
        assert err.startswith("error: ")
        assert str(tmp_path) in err
        assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["queries", "train"]


@pytest.mark.parametrize("left", [["config.json.part"], [".lock"], [".lock", "scores.csv.part", "config.json.part"]])
def test_an_audit_that_was_killed_as_it_began_can_begin_again(folder: Path, tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"{")
    code, _, err = run("audit", *options(folder), "--methods", "dot", "--layers", "head", "--out", tmp_path / "a")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        ".lock", "config.json", "data.json", "findings.jsonl", "report.html", "scores.csv", "stores",
    ]  # fmt: skip
