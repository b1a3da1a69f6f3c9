"""Questions on a terminal, and the server's command."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from audits import run
from click.testing import CliRunner

from influence_fast.cli import main


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "store"
    given = ["--layers", "head", "--projection", "rademacher:4x4", "--out", path]
    assert run("build", "--model", folder / "model", "--data", folder / "train.jsonl", *given)[0] == 0
    return path


def ask(folder: Path, store: Path, lines: str, *more: object) -> Any:
    given = ["search", store, "--model", folder / "model", "--interactive", "-k", 2, *more]
    return CliRunner().invoke(main, [str(part) for part in given], input=lines)


def test_one_question_after_another(folder: Path, store: Path) -> None:
    asked = "w1 w2\n1\n:row 3\n:method cosine\n:k 1\n:query 2\n:tokens 4\n:help\n"
    found = ask(folder, store, asked, "--queries", folder / "queries.jsonl")
    assert found.exit_code == 0, found.output
    out = found.stdout
    assert out.count("most helpful to") == out.count("most harmful to") == 3
    assert "most helpful to 'w1 w2' 1" in out
    assert "cosine, exact" in out
    assert ":tokens ID" in out
    # What is wrong with a question is said, and the next is read.
    found = ask(
        folder,
        store,
        ":tokens 3\n:row 99\n:nonsense\nw1\nnine\n:k x\n:row 1\n:k 3\n:method nope\n:row 1\n:quit\nw1\n1\n",
    )
    assert found.exit_code == 0
    for message in (
        "ask something first",
        "no row has the id '99'",
        ":nonsense: unknown",
        "nine",
        "k: expected",
        "method: ",
    ):
        assert message in found.stderr
    assert "most helpful" not in found.stdout


def test_what_does_not_go_with_it(folder: Path, store: Path) -> None:
    for more in (["--json"], ["--text", "w1"], ["--harmful"], ["--layers", "head"], ["--label", "1"]):
        found = ask(folder, store, "", *more)
        assert (found.exit_code, "--interactive takes one INDEX" in found.stderr) == (2, True)


def test_serve_listens_and_says_where(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    ports = []

    def running(self: Any, sockets: list[socket.socket]) -> None:
        host, port = sockets[0].getsockname()
        socket.create_connection((host, port), 5).close()
        ports.append((host, port))

    monkeypatch.setattr(uvicorn.Server, "run", running)
    given = [store, "--model", folder / "model", "--port", 0]
    code, out, err = run("serve", *given)
    assert code == 0, err
    assert ports[0][0] == "127.0.0.1"
    assert f"ask at http://127.0.0.1:{ports[0][1]}/" in out
    code, _, err = run("serve", *given, "--host", "0.0.0.0")
    assert (code, "can be reached from other machines; that needs --token" in err) == (1, True)
    assert len(ports) == 1
