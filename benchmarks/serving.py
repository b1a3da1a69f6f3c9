"""How long a person waits for ``influence-fast serve``: until it is up, for the first answer and for later ones::

    python -m benchmarks.serving --model MODEL_DIR --data sst2/train.jsonl --label 1

Builds a store and an index of some rows, starts the server as a process of its own on a free port and asks it over HTTP.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click

from benchmarks import protocol
from benchmarks.many_rows import workspace


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "influence_fast", *map(str, arguments)]


def asked(port: int, question: dict[str, str]) -> float:
    """Seconds until a question is answered."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/api/search", json.dumps(question), {"content-type": "application/json"})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise SystemExit(body.decode())
    return time.perf_counter() - begin


@click.command()
@protocol.out_option("An earlier result is replaced.")
@click.option("--model", required=True, help="Folder of a classifier or a language model.")
@click.option("--data", required=True, help="A file of training rows.")
@click.option("--rows", default=400, show_default=True, help="How many of them are indexed.")
@click.option("--layers", default="attention", show_default=True)
@click.option("--text", default="a film that I would see again", show_default=True, help="What is asked.")
@click.option("--label", help="Its class, where the model is a classifier.")
@click.option("--questions", default=20, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Keep store and index here, and use those that were kept."
)
@protocol.json_option
def main(
    out: Path | None,
    model: str,
    data: str,
    rows: int,
    layers: str,
    text: str,
    label: str | None,
    questions: int,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time the answers of the server."""
    protocol.previous(protocol.result_file(out, "serving"), "serving")
    question = {"text": text, **({"label": label} if label is not None else {})}
    with workspace(folder) as place:
        if not (place / "index").exists():
            given = ["--model", model, "--data", data, "--limit", rows, "--layers", layers]
            subprocess.run(command("build", *given, "--out", place / "store"), check=True, capture_output=True)
            subprocess.run(command("index", place / "store", "--out", place / "index"), check=True, capture_output=True)
        begin = time.perf_counter()
        server = subprocess.Popen(
            command("serve", place / "index", "--model", model, "--port", 0), stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            said = next((line for line in server.stdout if "http://" in line), "")
            up = time.perf_counter() - begin
            if not said:
                raise SystemExit("the server did not start")
            port = int(said.split("http://")[1].split("/")[0].rpartition(":")[2])
            spent = [asked(port, question) for _ in range(1 + questions)]
        finally:
            server.terminate()
            server.wait()
    document = {
        **protocol.header("serving"),
        "rows": rows,
        "up_s": up,
        "first_s": spent[0],
        "later_s": median(spent[1:]),
        "slowest_later_s": max(spent[1:]),
    }
    protocol.Results(protocol.result_file(out, "serving"), document).add()
    if as_json:
        click.echo(json.dumps(document))
    else:
        click.echo(
            f"up after {up:.2f} s; first answer {1e3 * spent[0]:.0f} ms, later ones {1e3 * document['later_s']:.0f} ms "
            f"(slowest {1e3 * document['slowest_later_s']:.0f} ms)"
        )


if __name__ == "__main__":
    main()
