"""``clean`` and ``select``: from an audit to a better training file."""

from __future__ import annotations

from pathlib import Path

import click

from influence_fast.cli.options import Command, example, json_option, print_document, say


@click.command(cls=Command, epilog=example("influence-fast clean audit --drop 10% --out cleaned.jsonl"))
@click.argument("audit", type=click.Path(path_type=Path))
@click.option("--drop", help="Leave out this many of the most harmful rows, or this share: 120, 10%.")
@click.option("--below", type=float, help="Leave out rows whose label is right with less than this probability.")
@click.option("--relabel", is_flag=True, help="Give those rows the label that the audit suggests instead.")
@click.option(
    "--decisions", type=click.Path(path_type=Path), help="CSV of id, decision (keep, relabel, drop) and label."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File, or folder, of the cleaned data.")
@json_option
def clean(
    audit: Path, drop: str | None, below: float | None, relabel: bool, decisions: Path | None, out: Path, as_json: bool
) -> None:
    """Write the training data that AUDIT ranked without its harmful rows, in their own format and order.

    What was done to which row, and why, stands in a log beside the output.
    """
    from influence_fast.auditing.cleaning import clean as run

    found = run(audit, out, drop=drop, below=below, relabel=relabel, decisions=decisions)

    def show() -> None:
        say(
            f"{found['kept']:,} of {found['rows']:,} rows kept, {found['dropped']:,} dropped, "
            f"{found['relabelled']:,} relabelled"
        )
        if found["not_audited"]:
            say(f"{found['not_audited']:,} rows were not audited, and are kept as they are")
        say(f"wrote {found['out']}\nwrote {found['log']}")

    print_document(found, as_json, show)


@click.command(cls=Command, epilog=example("influence-fast select audit --top 5% --out selected.jsonl"))
@click.argument("audit", type=click.Path(path_type=Path))
@click.option("--top", required=True, help="How many rows, or which share: 500, 5%.")
@click.option("--per-group", help="Column of the queries: as many rows for each of its values.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File, or folder, of the selected data.")
@json_option
def select(audit: Path, top: str, per_group: str | None, out: Path, as_json: bool) -> None:
    """Write the rows that help AUDIT's queries most, in their own format and order."""
    from influence_fast.auditing.cleaning import select as run

    found = run(audit, out, top, per_group)
    print_document(
        found, as_json, lambda: say(f"{found['kept']:,} of {found['rows']:,} rows selected\nwrote {found['out']}")
    )
