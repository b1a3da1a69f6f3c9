"""``serve``."""

from __future__ import annotations

from pathlib import Path

import click

from influence_fast.cli.options import DATA, Command, example, say, verify_option


@click.command(cls=Command, epilog=example("influence-fast serve store.index --model my-model --data train.jsonl"))
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The model of the store.")
@click.option("--data", multiple=True, help=f"The training data; by default where they were. {DATA}")
@click.option("--queries", help="A file of held-out queries to choose from.")
@click.option("--host", default="127.0.0.1", help="Address to listen on; any but the loopback needs --token.")
@click.option("--port", default=8765, type=click.IntRange(0, 65535), help="Port to listen on; 0 for a free one.")
@click.option(
    "--token",
    envvar="INFLUENCE_FAST_TOKEN",
    help="What whoever asks must know, 16 characters or more; better from the environment, INFLUENCE_FAST_TOKEN.",
)
@click.option(
    "--timeout", default=30.0, type=click.FloatRange(0.1, 3600), help="Seconds after which a question is given up."
)
@verify_option
def serve(
    index: Path,
    model: str,
    data: tuple[str, ...],
    queries: str | None,
    host: str,
    port: int,
    token: str | None,
    timeout: float,
) -> None:
    """Ask in a browser: a page where a text's most helpful and most harmful training rows are shown, and calls for programs.

    INDEX is an index, or a store that is searched as it is. Nothing is sent to or loaded from other machines.
    """
    from influence_fast.serving.app import check_address
    from influence_fast.serving.app import serve as listen
    from influence_fast.serving.lookup import Lookup

    check_address(host, token)
    lookup = Lookup.open(index, model, data, queries)
    if lookup.note:
        say(f"texts are left out: {lookup.note}", err=True)
    listen(lookup, host, port, token=token, seconds=timeout, ready=lambda url: say(f"ask at {url} (Control-C ends)"))
