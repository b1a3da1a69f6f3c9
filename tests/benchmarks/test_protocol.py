"""What all benchmarks promise: help, progress on stderr, results that are whole after every case and survive a kill."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers as hf
from audits import tokenizer, write_rows
from click.testing import CliRunner, Result
from stores import gradients, write_store

import influence_fast as inf
from benchmarks import capture, default_projection, finetune, many_rows, million, naive, protocol
from influence_fast.data.models import load_model
from influence_fast.diagnostics import kernel_bench as bench

BENCHMARKS = (
    "audit_sst2",
    "billion_page",
    "calibration",
    "capture",
    "coverage",
    "cross_fit",
    "default_projection",
    "factors",
    "finetune",
    "generative",
    "gpu_static",
    "lds",
    "lds_peers",
    "million",
    "naive",
    "noise_kinds",
    "paper",
    "paper_page",
    "paper_tables",
    "peer_definitions",
    "peers",
    "relevance",
    "rivals",
    "run",
    "self_check_truth",
    "serving",
    "verification",
)


def invoke(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_every_benchmark_is_listed() -> None:
    """A new one has to pass the tests below too."""
    folder = Path(protocol.__file__).parent
    assert {path.stem for path in folder.glob("*.py") if "@click." in path.read_text()} == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_says_what_happens_to_an_earlier_result(name: str) -> None:
    main = importlib.import_module(f"benchmarks.{name}").main
    for command in main.commands.values() if isinstance(main, click.Group) else [main]:
        result = invoke(command, "--help")
        assert result.exit_code == 0
        text = " ".join(result.stdout.split())
        assert "--out" in text or "--page" in text
        assert any(fate in text for fate in ("replaced", "stay", "goes on"))


def test_a_file_holds_whole_results_and_is_partial_until_the_end(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with protocol.Results(file, {"benchmark": "x"}) as results:
        assert not file.exists()
        results.add(one=1)
        assert json.loads(file.read_text()) == {"benchmark": "x", "partial": True, "one": 1}
        results.add(two=2)
    assert json.loads(file.read_text()) == {"benchmark": "x", "one": 1, "two": 2}
    with contextlib.suppress(KeyboardInterrupt), protocol.Results(file, {}) as results:
        results.add(one=3)
        raise KeyboardInterrupt
    assert json.loads(file.read_text()) == {"partial": True, "one": 3}
    assert list(tmp_path.iterdir()) == [file]


def test_where_results_go(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert protocol.result_file(None, "name") is None
    assert protocol.result_file(tmp_path / "empty", "name") == tmp_path / "empty"
    assert protocol.result_file(tmp_path / "new" / "x.json", "name") == tmp_path / "new" / "x.json"
    assert protocol.result_file(tmp_path / "folder", "name") == tmp_path / "folder" / "name.json"
    assert protocol.result_folder(tmp_path / "empty").is_dir()
    (tmp_path / "text").write_text("mine")
    with pytest.raises(click.UsageError, match="expected a folder"):
        protocol.result_folder(tmp_path / "text")


@pytest.mark.parametrize("text", ["mine", "[1]", '{"benchmark": "other"}', "\xff"])
def test_a_file_of_something_else_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(click.UsageError, match="left as it is"):
        protocol.previous(file, "capture")
    result = CliRunner().invoke(capture.main, ["--out", str(file)])
    assert result.exit_code == 2
    assert file.read_text(encoding="latin-1") == text


def test_progress_has_a_line_for_each_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_QUIET_SECONDS", -1)
    with protocol.Progress(2) as progress:
        with progress.step("one"):
            assert list(progress.each([4, 5], "long")) == [4, 5]
        with progress.step("two"):
            pass
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["long", "long", "[1/2] one", "[2/2] two"]


def test_a_step_that_would_pass_the_time_is_refused() -> None:
    progress = protocol.Progress(seconds=0)
    with pytest.raises(protocol.OutOfTime, match="epoch"), progress.step("fit, epoch 1", "epoch"):
        raise AssertionError("the step was begun")


def test_what_is_kept_is_tensors_and_plain_values(tmp_path: Path) -> None:
    value = {("all", "mean"): torch.arange(3), "epochs": [{"test": 0.5}], "schedule": {"lr_lambdas": [{}]}}
    made = [protocol.kept(tmp_path / "x.pt", lambda: value) for _ in range(2)]
    assert all(str(found) == str(value) for found in made)
    protocol.save(tmp_path / "y.pt", Path("x"))
    with pytest.raises(Exception, match="Weights only load failed"):
        protocol.load(tmp_path / "y.pt")


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.touch()
    program = """if True:
        import os, signal, sys
        from benchmarks import run
        from influence_fast.diagnostics import kernel_bench as bench
        from influence_fast.diagnostics.bench_shapes import RankShape
        bench.SHAPES = {"rank": {"one": RankShape(3, 40), "two": RankShape(3, 50)}}
        bench.ceilings = lambda *args: {}
        run_pass = bench.Measurement.run_pass
        bench.Measurement.run_pass = lambda self, repeats: (
            os.kill(os.getpid(), signal.SIGKILL) if self.case.name == "two" else run_pass(self, repeats)
        )
        run.main(sys.argv[1:])
    """
    arguments = ["--op", "rank", "--no-compile", "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = json.loads(out.read_text())
    assert found["partial"] is True
    assert [row["case"] for row in found["results"]] == ["one"]
    assert "rank one" in killed.stderr
    assert killed.stdout == ""


@pytest.fixture
def tiny_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> torch.nn.Module:
        config = hf.BertConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
        return hf.BertForSequenceClassification(config)

    rows = [{"input_ids": [2 + i, 3, 4][: 2 + i % 2], "labels": i % 2} for i in range(6)]
    work = capture.Work(model, lambda: rows, "attention", None, 16, "rademacher:2x2", single_rows=2)
    monkeypatch.setattr(capture, "WORKS", {"minilm-all": work, "neox-all": work})


def test_capture_adds_to_a_file_as_it_goes(tiny_capture: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "empty"
    out.touch()
    first = invoke(capture.main, "--work", "minilm-all", "--repeats", 1, "--out", out, "--json")
    assert first.exit_code == 0
    assert json.loads(first.stdout) == json.loads(out.read_text())
    assert first.stderr.count("minilm-all: ") == 3
    before = json.loads(out.read_text())["results"]["minilm-all"]
    assert {"ours", "floor", "hooks", "one by one"} <= set(before)

    measure = capture.measure

    def stop(name: str, *args: Any) -> Any:
        return measure(name, *args) if name == "neox-all" else (_ for _ in ()).throw(KeyboardInterrupt)

    monkeypatch.setattr(capture, "measure", stop)
    killed = invoke(capture.main, "--work", "neox-all", "--work", "minilm-all", "--repeats", 1, "--out", out)
    assert killed.exit_code == 1
    found = json.loads(out.read_text())
    assert found["partial"] is True
    assert found["results"]["minilm-all"] == before
    assert set(found["results"]) == {"minilm-all", "neox-all"}

    out.write_text(json.dumps({**found, "machine": {**found["machine"], "device": "another"}}))
    assert "another machine" in invoke(capture.main, "--out", out).stderr


def test_capture_holds_estimates_against_builds(tiny_capture: None, tmp_path: Path) -> None:
    result = invoke(capture.main, "--work", "minilm-all", "--estimates", "--out", tmp_path / "x.json")
    assert result.exit_code == 0
    assert set(json.loads((tmp_path / "x.json").read_text())["estimates"]["minilm-all"]) == {"time", "disk", "memory"}


def test_million(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_rows, "BASE_ROWS", 600)
    monkeypatch.setattr(many_rows, "CLUSTERS", 20)
    monkeypatch.setattr(million, "read_bytes_per_s", lambda: 1e10)
    monkeypatch.setattr(bench, "ceilings", lambda: {})
    here = lambda kind, path, out, memory="64MiB": million.job(kind, path, out, memory)  # noqa: E731
    monkeypatch.setattr(million, "in_process", here)
    out = tmp_path / "empty"
    out.touch()
    given = ["--rows", 1200, "--queries", 4, "--dims", 256, "--out", out]
    result = invoke(million.main, *given, "--faiss", "cosine:IVF4,SQ8", "--folder", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert "partial" not in found
    assert found["million"]["dot"]["recall_at_10"] == found["million"]["cosine"]["recall_at_10"] == 1
    for of in ("dot filtered", "cosine filtered"):
        assert found["million"][of]["recall_at_10"] == 1
    assert found["million"]["dot"]["share_read"] < found["million"]["cosine"]["share_read"] == 1
    assert found["million"]["cosine"]["floor_bytes"] == found["million"]["bytes"]
    assert found["faiss_flat"]["recall_at_10"] == 1
    assert found["faiss"][0]["recall_at_10"] > 0.9
    assert list(found["peak"]["aggregate"]) == ["120", "1200"]
    assert all(
        run["anonymous_peak_bytes"] <= run["peak_bytes"] for runs in found["peak"].values() for run in runs.values()
    )
    assert found["load"].keys() == found["seconds"].keys() > {"rank and vote"}
    assert "| rank + vote, 1200 x 1000 (layer, query) rows |" in result.stdout
    assert "[14/14]" in result.stderr

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(million, "scan", stop)
    assert invoke(million.main, *given).exit_code == 1
    found = json.loads(out.read_text())
    assert found["partial"] is True
    assert found["exact"]["rows"] == 1200
    assert "million" not in found
    assert "expected a multiple of 128, got 200" in invoke(million.main, "--dims", 200).stderr


def test_brute_force_keeps_ties_in_row_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_rows, "_BLOCK", 7)
    data = gradients(40, 0)
    for name in data:
        data[name][20:24] = data[name][3]
    store, asked = write_store(tmp_path / "s", data), many_rows.stacked({n: v[:5] for n, v in gradients(5, 1).items()})
    values, mask = many_rows.stacked(data).double(), torch.arange(40) % 3 > 0
    found = many_rows.brute_force(store, asked, 40, torch.float64, ("dot", "cosine"), {"some": mask})
    for metric in ("dot", "cosine"):
        scores = asked.double() @ (values / values.norm(dim=1, keepdim=True) if metric == "cosine" else values).T
        for key, left in ((metric, scores), (f"{metric} some", scores.masked_fill(~mask, -torch.inf))):
            assert torch.equal(found[key], left.argsort(dim=1, descending=True, stable=True)[:, :10])


def test_an_encoder_is_fine_tuned_and_its_gradients_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    hf.BertModel(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"sentence": f"w{i % 7} w{i % 5} w{i % 3}", "label": i % 2} for i in range(40)]
    data = [write_rows(tmp_path / name, part) for name, part in (("a.jsonl", rows), ("b.jsonl", rows[:9]))]
    out = tmp_path / "run"
    out.touch()
    given = ["--model", tmp_path / "model", "--train", data[0], "--queries", data[1], "--out", out]
    result = invoke(finetune.main, *given, "--samples", 30, "--query-samples", 6, "--epochs", 2)
    assert result.exit_code == 0
    found = json.loads((out / "epochs.json").read_text())
    assert len(found["accuracy_on_queries"]) == 2
    assert "partial" not in found
    assert result.stdout.count("accuracy on the queries") == 2
    assert "[2/2]" in result.stderr
    noisy = [json.loads(line)["noise"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert (len(noisy), sum(noisy)) == (30, 6)

    network, words = load_model(str(out / "adapter"))
    layers = [name for name in inf.select_layers(network, "lora") if "lora_B" in name]
    for name in ("train", "queries"):
        part = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        tokens = [{"input_ids": words(row["sentence"])["input_ids"], "labels": row["label"]} for row in part]
        inf.build_store(out / "audit" / "stores" / name, network, tokens, layers, "identity", progress=False)
    given = ["--model", out / "adapter", "--train", out / "train.jsonl", "--queries", out / "queries.jsonl"]
    (tmp_path / "empty").touch()
    given += ["--text-column", "sentence", "--audit", out / "audit", "--out", tmp_path / "empty"]
    result = invoke(naive.main, *given)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "empty").read_text())
    assert found["gradients"] < 1e-4
    assert set(found["methods"]) == {"dot", "cosine", "datainf"}
    assert result.stdout.startswith("gradients: ")
    assert "datainf: influence " in result.stdout
    assert "[5/5]" in result.stderr
    # Held against the gradients of other labels it says so.
    flipped = [{**json.loads(line), "label": 1} for line in (out / "train.jsonl").read_text().splitlines()]
    write_rows(out / "train.jsonl", flipped)
    assert invoke(naive.main, *given).exit_code == 1


def test_projections_are_held_against_whole_gradients(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
    )
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [{"sentence": f"w{i % 7} w{i % 3}", "label": i % 2} for i in range(60)])
    given = ["--model", tmp_path / "model", "--train", rows, "--queries", rows, "--samples", 40, "--query-samples", 8]
    given += ["--epochs", 1, "--threads", 1, "--out", tmp_path / "a.json", "--json"]
    result = invoke(default_projection.main, *given, "--projections", "identity,sjlt:4,sjlt:128")
    found = json.loads(result.stdout)["projections"]
    assert json.loads((tmp_path / "a.json").read_text())["projections"] == found
    assert found["identity"]["dot"]["spearman"] > 0.999
    assert found["sjlt:4"]["dot"]["spearman"] < found["sjlt:128"]["dot"]["spearman"]
    assert found["sjlt:4"]["bytes"] < found["sjlt:128"]["bytes"] < found["identity"]["bytes"]


@pytest.mark.parametrize("name", ["generative", "noise_kinds", "relevance", "rivals"])
def test_tables_in_the_page_on_quality_are_those_of_the_committed_figures(name: str, tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    page.write_text(Path("docs/quality.md").read_text())
    assert "wrote" in invoke(importlib.import_module(f"benchmarks.{name}").main, "--page", page).output
    assert page.read_text() == Path("docs/quality.md").read_text()
