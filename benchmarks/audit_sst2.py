"""What an audit of real sentences with flipped labels says, and what the model is worth after ``clean``.

For each seed: draws training rows of SST-2, flips a share of their labels, fine-tunes a pretrained encoder on them (its
last block, by LoRA, and the head), audits it with a trusted set by :func:`influence_fast.audit`, writes the cleaned files as
``influence-fast clean`` does, and fine-tunes again on each from the same start. Beside them: nothing cleaned, random rows
left out, and the flips themselves, which no audit can know. Accuracy is of held-out sentences, after a number of epochs that
is fixed beforehand::

    python -m benchmarks.audit_sst2 --model MODEL_DIR --data DATA_DIR --work runs
    python -m benchmarks.audit_sst2 --model MODEL_DIR --data DATA_DIR --work runs --whole
    python -m benchmarks.audit_sst2 --page docs/audit_sst2.md

``--whole`` audits the training rows of the file, all or the first ``--rows``, with the first seed's model in a process of
its own, and measures that process. Each step is kept in ``--work``: the same command goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoTokenizer

import influence_fast as inf
from benchmarks import last_block, protocol
from benchmarks.paper_tables import interval
from benchmarks.paper_tasks import encoded, make_split
from influence_fast.auditing.cleaning import Audit, clean
from influence_fast.auditing.findings.calibration import reliability
from influence_fast.auditing.result import AuditResult
from influence_fast.data.label_noise import uniform
from influence_fast.evaluation.comparison import RankingKey

TOP = (50, 100, 200)
ARMS = {
    "nothing": "nothing",
    "drop": "`clean --drop N`, N the audit's estimate of wrong labels",
    "relabel": "`clean --relabel`",
    "below": "`clean --below 0.5`",
    "random drop": "as many rows as `--drop N`, at random",
    "oracle drop": "the flipped rows (no audit knows them)",
}


@click.command()
@click.option("--model", help="Folder of the pretrained encoder.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder that holds sst2/.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("audit-runs"), help="Steps of unfinished runs.")
@protocol.out_option("A finished seed stays as it is, an unfinished one goes on.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=800, show_default=True, help="Training rows.")
@click.option("--query-samples", default=300, show_default=True, help="Trusted rows.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Rows a step.")
@click.option("--flip", default=0.2, show_default=True, help="Share of labels to flip.")
@protocol.seconds_option
@click.option("--whole", is_flag=True, help="Audit every training row, and measure time and memory.")
@click.option("--rows", type=int, help="With --whole: so many of them.")
@click.option("--page", type=click.Path(path_type=Path), help="Write the page of the results there are.")
@protocol.threads_option
def main(
    model: str | None,
    data: Path | None,
    work: Path,
    out: Path | None,
    seeds: int,
    seconds: float,
    whole: bool,
    rows: int | None,
    page: Path | None,
    threads: int,
    **settings: Any,
) -> None:
    """Audit sentences with flipped labels, clean, and train again."""
    torch.set_num_threads(threads)
    file = protocol.result_file(out or protocol.RESULTS / "audit_sst2.json", "audit_sst2")
    there = protocol.previous(file, "audit_sst2")
    if page is not None:
        protocol.write_text(page, page_of(there))
        click.echo(f"wrote {page}")
        return
    if model is None or data is None:
        raise click.UsageError("--model and --data are needed (or --page).")
    given = {**settings, "model": model, "data": str(data), "kind": "uniform"}
    shown = {**settings, "model": Path(model).name}
    if there and there.get("settings") != shown:
        raise click.UsageError(f"--out: {file} has other settings ({there.get('settings')}); it is left as it is")
    document = {**protocol.header("audit_sst2"), "settings": shown, "runs": [], **there}
    with protocol.Results(file, document) as results, protocol.Progress(seconds=seconds) as progress:
        try:
            runs = {run["seed"]: run for run in document["runs"] if "partial" not in run}
            for seed in range(seeds):
                if seed not in runs:
                    run = runs[seed] = {"seed": seed, "partial": True}
                    one_seed(
                        seed, work / f"seed{seed}", progress, given, run, lambda: results.add(runs=[*runs.values()])
                    )
                    del run["partial"]
                    results.add()
            if whole:
                found = whole_audit(work, given, rows, progress)
                kept = [one for one in document.get("whole", []) if one["rows"] != found["rows"]]
                results.add(whole=sorted([*kept, found], key=lambda one: one["rows"]))
        except protocol.OutOfTime as error:
            click.echo(f"out of time before the next {error}; the same command goes on")
            raise SystemExit(3) from None
    click.echo(f"wrote {file}")


def one_seed(
    seed: int,
    work: Path,
    progress: protocol.Progress,
    settings: dict[str, Any],
    run: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Train, audit, clean, train again; ``run`` grows, and is kept after every step."""
    work.mkdir(parents=True, exist_ok=True)
    base = settings["model"]
    split = protocol.kept(work / "split.pt", lambda: make_split("sst2", seed, settings))
    noise = torch.tensor([row["noise"] for row in split["train"]])

    def cached() -> dict[str, last_block.Cached]:
        with progress.step(f"seed {seed}: the blocks below", "states"):
            network = last_block.last_block_encoder(base, seed)
            return {part: last_block.below(network, encoded(base, split[part])) for part in ("train", "test")}

    states, adapter = protocol.kept(work / "states.pt", cached), work / "adapter"
    wanted = [row["label"] for row in split["test"]]

    def fit(arm: str, labels: list[int], rows: list[int]) -> dict[str, Any]:
        def train() -> dict[str, Any]:
            with progress.step(f"seed {seed}: {arm}", "training"):
                parts = [states["train"][i] for i in rows]
                how = (settings["epochs"], settings["lr"], settings["batch"])
                network: Any = last_block.fine_tune(base, seed, parts, labels, *how)
                if arm == "nothing":
                    network.save_pretrained(adapter)
                    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
                return {"rows": len(rows), "accuracy": last_block.accuracy(network, states["test"], wanted)}

        return protocol.kept(work / f"arm-{arm.replace(' ', '-')}.pt", train)

    given = [row["label"] for row in split["train"]]
    arms = {"nothing": fit("nothing", given, list(range(len(given)))) | left(noise.tolist())}
    files = {name: work / f"{name}.jsonl" for name in ("train", "queries")}
    for name, file in files.items():
        if not file.exists():
            protocol.write_text(file, "".join(json.dumps(row_of(row)) + "\n" for row in split[name]))
    said = work / "said.json"
    if not said.exists():
        with progress.step("audit", "audit"):
            begin = time.monotonic()
            result = inf.audit(
                str(adapter), str(files["train"]), str(files["queries"]), out=work / "audit", progress=False
            )
            found = {**says(result, noise), "seconds": time.monotonic() - begin}
            protocol.write_text(said, json.dumps(found))
    audit = json.loads(said.read_text())
    run |= {"sizes": {name: len(part) for name, part in split.items()}, "wrong": int(noise.sum())}
    run |= {"audit": audit, "arms": arms}
    keep()
    for name, rows, labels, bad in arms_of(work / "audit", given, noise.tolist(), audit["estimate"], seed):
        arms[name] = fit(name, labels, rows) | left(bad)
        keep()


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a user has it: nothing says which label was flipped."""
    return {"sentence": row["text"][0], "label": row["label"]}


def says(result: AuditResult, noise: torch.Tensor) -> dict[str, Any]:
    """What the audit says, held against the flips that it did not see."""
    order, labels = result.ranking.tolist(), result.facts["wrong_labels"]
    wrong, suggested = result.wrong_probability, result.suggested
    kinds = Counter(finding.kind for finding in result.findings)
    flips = {kind: sum(bool(noise[i]) for i, f in enumerate(result.findings) if f.kind == kind) for kind in kinds}
    out: dict[str, Any] = {
        "estimate": labels["estimate"], "low": labels["low"], "high": labels["high"],
        "calibrated_on": labels["calibrated_on"],
        "precision": {str(top): float(noise[order[:top]].double().mean()) for top in TOP if top <= len(order)},
        "kinds": {kind: {"rows": count, "flipped": flips[kind]} for kind, count in kinds.most_common()},
    }  # fmt: skip
    if wrong is not None:
        ones = np.ones(len(noise))
        out["calibration_error"] = float(reliability(wrong.numpy(), noise.double().numpy(), ones)[1])
    if suggested is not None and result.labels is not None:
        changed = [i for i, (new, old) in enumerate(zip(suggested, result.labels, strict=True)) if new != old]
        out["suggestions"] = {"rows": len(changed), "right": sum(bool(noise[i]) for i in changed)}
    names: dict[RankingKey, str] = {
        result.main: "default",
        **{key: key.method for key in result.rankings if key.is_baseline},
    }
    table = {(row["method"], row["group"], row["aggregation"]): row for row in inf.compare(result.rankings, noise).rows}
    out["auc_ndr"] = {name: table[key]["auc_ndr"] for key, name in names.items()}
    return out


def arms_of(
    audit: Path, given: list[int], flipped: list[bool], estimate: float, seed: int
) -> Iterator[tuple[str, list[int], list[int], list[bool]]]:
    """``(name, rows, their labels, which of these are wrong)`` of every arm; the first three as ``clean`` writes them."""
    n, right = len(given), [label ^ bad for label, bad in zip(given, flipped, strict=True)]
    count = max(1, min(n - 1, round(estimate)))
    rules: dict[str, dict[str, Any]] = {
        "drop": {"drop": str(count)},
        "relabel": {"relabel": True},
        "below": {"below": 0.5},
    }
    for name, rule in rules.items():
        file = audit.parent / f"{name}.jsonl"
        for old in (file, Path(f"{file}.log.csv")):
            old.unlink(missing_ok=True)
        clean(audit, file, **rule)
        dropped = dropped_rows(Path(f"{file}.log.csv"))
        kept = [i for i in range(n) if i not in dropped]
        labels = [int(json.loads(line)["label"]) for line in file.read_text().splitlines()]
        yield name, kept, labels, [label != right[i] for label, i in zip(labels, kept, strict=True)]
    random = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 10_000))[count:].sort().values.tolist()
    for name, kept in (("random drop", random), ("oracle drop", [i for i in range(n) if not flipped[i]])):
        yield name, kept, [given[i] for i in kept], [flipped[i] for i in kept]


def dropped_rows(log: Path) -> set[int]:
    import csv

    with open(log, newline="", encoding="utf-8") as file:
        return {int(line["row"]) for line in csv.DictReader(file) if line["decision"] == "drop"}


def left(bad: list[bool]) -> dict[str, float]:
    return {"wrong_left": int(sum(bad)), "noise_left": float(np.mean(bad))}


def whole_audit(work: Path, settings: dict[str, Any], count: int | None, progress: protocol.Progress) -> dict[str, Any]:
    """Training rows of the file with flips, by the first seed's model: what the process took, and what it said."""
    folder = work / f"whole-{count or 'all'}"
    # An audit that is there already would go on, and take no time.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (Path(settings["data"]) / "sst2" / "train.jsonl").read_text().splitlines()]
    lines = lines[:count]
    labels, noise = uniform([line["label"] for line in lines], settings["flip"], 2, 0)
    rows = [{"sentence": line["sentence"], "label": label} for line, label in zip(lines, labels, strict=True)]
    protocol.write_text(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    model, queries = str(work / "seed0" / "adapter"), str(work / "seed0" / "queries.jsonl")
    train = str(folder / "train.jsonl")
    threads = torch.get_num_threads()
    # What an audit is held against: the gradients of the training rows alone, which it takes too.
    with progress.step(f"gradients of {len(rows):,} rows", "gradients"):
        plain, _ = measured("build", "--model", model, "--data", train, "--out", folder / "plain")
    shutil.rmtree(folder / "plain")
    with progress.step(f"audit of {len(rows):,} rows", "whole"):
        took, used = measured(
            "audit", "--model", model, "--train", train, "--queries", queries, "--out", folder / "audit"
        )
    audit = Audit(folder / "audit")
    wrong = noise.tolist()
    order = [int(audit.ids[i]) for i in audit.order]
    return {
        "rows": len(rows), "wrong": int(noise.sum()), "seconds": took,
        "gradient_seconds": plain,
        "processor_seconds": used.ru_utime + used.ru_stime, "rows_per_second": len(rows) / took,
        "peak_gib": used.ru_maxrss / 2**20, "threads": threads,
        "store_gib": sum(f.stat().st_size for f in (folder / "audit").rglob("*") if f.is_file()) / 2**30,
        "precision": {str(top): float(np.mean([wrong[i] for i in order[:top]])) for top in TOP},
    }  # fmt: skip


def measured(*arguments: str | Path) -> tuple[float, Any]:
    """Seconds that a command of ours takes in a process of its own, and what it used.

    Raises:
        click.ClickException: the command failed.
    """
    command = [sys.executable, "-c", "from influence_fast.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryFile("w+") as log:
        begin = time.monotonic()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, used = os.wait4(child.pid, 0)
        took = time.monotonic() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if child.returncode:
            raise click.ClickException(f"{arguments[0]} failed ({child.returncode}): {log.read()[-2000:]}")
    return took, used


def page_of(document: dict[str, Any]) -> str:
    """The page of a results file."""
    runs = [run for run in document["runs"] if "partial" not in run]
    settings, first = document["settings"], runs[0]
    sizes = first["sizes"]
    lines = [
        "# An audit of sst2",
        "",
        f"{sizes['train']:,} training phrases of SST-2, {100 * settings['flip']:.0f} % of the labels flipped "
        f"({first['wrong']} rows), {settings['model']} fine-tuned on them (last block by LoRA, and head; "
        f"{settings['epochs']} epochs), audited with {sizes['queries']} trusted sentences by `influence-fast audit` with "
        f"its defaults. It is not told which labels were flipped. {len(runs)} seeds, each with rows, flips and weights of "
        "its own; the sets are small, so that many models could be trained. Made by "
        "`python -m benchmarks.audit_sst2`; the figures come from `benchmarks/results/audit_sst2.json`.",
        "",
        "## What the audit says",
        "",
        "| seed | wrong labels | the audit's estimate | 95 % interval | holds the truth | "
        + " | ".join(f"flips among its first {top}" for top in first["audit"]["precision"])
        + " | labels it would change | of these wrong ones | calibration error | AUC_NDR | of the loss |",
        "|" + "---|" * (10 + len(first["audit"]["precision"])),
    ]
    for run in runs:
        a = run["audit"]
        known = a["low"] is not None
        held = "yes" if known and a["low"] <= run["wrong"] <= a["high"] else "no"
        lines.append(
            f"| {run['seed']} | {run['wrong']} | {a['estimate']:.0f} | "
            + (f"{a['low']:.0f} to {a['high']:.0f} | {held}" if known else "- | -")
            + "".join(f" | {value:.2f}" for value in a["precision"].values())
            + f" | {a['suggestions']['rows']} | {a['suggestions']['right']} | "
            + (f"{a['calibration_error']:.3f}" if "calibration_error" in a else "-")
            + f" | {a['auc_ndr']['default']:.3f} | {a['auc_ndr']['loss']:.3f} |"
        )
    lines += ["", "Of each kind of finding, rows and how many of them were flipped, over all seeds:", ""]
    lines += ["| kind | rows | flipped |", "|---|---|---|"]
    for kind in dict.fromkeys(kind for run in runs for kind in run["audit"]["kinds"]):
        rows, flipped = (
            sum(run["audit"]["kinds"].get(kind, {}).get(name, 0) for run in runs) for name in ("rows", "flipped")
        )
        lines.append(f"| {kind} | {rows} | {flipped} |")
    lines += [
        "",
        "## What the model is worth then",
        "",
        f"Accuracy on {sizes['test']} held-out sentences after fine-tuning again from the same start, and the difference to "
        "cleaning nothing with its 95 % interval (Student, over seeds):",
        "",
        "| cleaned | rows | wrong labels left | accuracy | by seed | over nothing | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, text in ARMS.items():
        arms = [run["arms"][name] for run in runs]
        over = [run["arms"][name]["accuracy"] - run["arms"]["nothing"]["accuracy"] for run in runs]
        mean, low, high = interval(over)
        between = "" if name == "nothing" or not math.isfinite(low) else f"{low:+.3f} to {high:+.3f}"
        lines.append(
            f"| {text} | {np.mean([a['rows'] for a in arms]):.0f} | {np.mean([a['wrong_left'] for a in arms]):.0f} | "
            f"{np.mean([a['accuracy'] for a in arms]):.3f} | {', '.join(format(a['accuracy'], '.3f') for a in arms)} | "
            + (f"{mean:+.3f}" if name != "nothing" else "")
            + f" | {between} |"
        )
    lines += ["", *verdicts(runs)]
    if "whole" in document:
        device = document["machine"]["device"]
        lines += ["", "## Many rows at once", ""]
        lines += [
            f"Audits with the first seed's model, from files to report, each in a process of its own, on an {device}; and "
            "`influence-fast build` of the same training rows, which takes their gradients and nothing else.",
            "",
        ]
        lines += [
            "| rows | threads | minutes | times `build` alone | processor minutes | rows a second | peak memory | disk | "
            "flips in the first 200 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for w in document["whole"]:
            times = f"{w['seconds'] / w['gradient_seconds']:.1f}" if "gradient_seconds" in w else "-"
            lines.append(
                f"| {w['rows']:,} | {w['threads']} | {w['seconds'] / 60:.1f} | "
                f"{times} | {w['processor_seconds'] / 60:.1f} | "
                f"{w['rows_per_second']:.0f} | {w['peak_gib']:.2f} GiB | {w['store_gib']:.2f} GiB | "
                f"{100 * w['precision']['200']:.0f} % |"
            )
    return "\n".join(lines) + "\n"


def verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """In words, from the figures alone: which arms are above nothing in every interval, and which is best."""
    means = {name: float(np.mean([run["arms"][name]["accuracy"] for run in runs])) for name in ARMS}
    real = max(("drop", "relabel", "below"), key=lambda name: means[name])
    ranked = sorted(means, key=lambda name: -means[name])
    clear, harmful = [], []
    for name in ("drop", "relabel", "below"):
        over = [run["arms"][name]["accuracy"] - run["arms"]["nothing"]["accuracy"] for run in runs]
        _, low, high = interval(over)
        clear += [name] * (low > 0)
        harmful += [name] * (high < 0)
    mean, low, high = interval(run["arms"][real]["accuracy"] - run["arms"]["random drop"]["accuracy"] for run in runs)
    between = f" ({low:+.3f} to {high:+.3f})" if math.isfinite(low) else ""
    return [
        f"Highest first: {', '.join(f'{name} {means[name]:.3f}' for name in ranked)}. Of what an audit can do, "
        f"`{real}` gives most: {means[real] - means['nothing']:+.3f} over nothing, "
        f"{mean:+.3f}{between} over random rows, "
        f"{means[real] - means['oracle drop']:+.3f} from leaving out the flips "
        f"themselves. Clearly above nothing (interval above 0): {', '.join(clear) or 'none'}; clearly "
        f"below: {', '.join(harmful) or 'none'}."
    ]


if __name__ == "__main__":
    main()
