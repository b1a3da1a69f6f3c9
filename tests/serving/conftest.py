"""One index with hostile texts, and a server of it on a free port."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from audits import run, sentences, write_rows

from influence_fast.serving.lookup import Lookup

HOSTILE = ["<script>window.ran = 1</script> w1 w2", '"><img src=x onerror="window.ran = 2"> w3', "</li><b>w4</b>"]


def rows() -> list[dict]:
    made = sentences(20, 1)
    for number, row in enumerate(made):
        row["id"] = f"row/{number}"
    for number, text in enumerate(HOSTILE):
        made[number] |= {"text": text, "id": f"<i>{number}</i>&row=1"}
    return made


@pytest.fixture(scope="session")
def indexed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_rows(path / "train.jsonl", rows())
    write_rows(path / "queries.jsonl", [{**row, "text": f"{row['text']} {HOSTILE[0]}"} for row in sentences(5, 2)])
    given = ["--layers", "attention,head", "--projection", "rademacher:4x4", "--out", path / "store"]
    assert run("build", "--model", folder / "model", "--data", path / "train.jsonl", *given)[0] == 0
    assert run("index", path / "store", "--out", path / "index", "--methods", "trackstar")[0] == 0
    return path


@pytest.fixture(scope="session")
def lookup(indexed: Path, folder: Path) -> Lookup:
    return Lookup.open(indexed / "index", str(folder / "model"), queries=str(indexed / "queries.jsonl"))


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """A context of a server, which gives its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    from influence_fast.serving.app import make_app

    @contextmanager
    def start(lookup: Any, **settings: Any) -> Iterator[str]:
        config = uvicorn.Config(make_app(lookup, **settings), "127.0.0.1", 0, log_level="warning", ws="none")
        server = uvicorn.Server(config)
        config.load()
        listening = config.bind_socket()
        listening.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    return start
