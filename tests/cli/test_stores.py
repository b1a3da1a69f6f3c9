"""Build, index and search on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from audits import read_csv, run, write_rows

import influence_fast as inf
from influence_fast.attribution.held_out_damping import GRID, held_out_damping

IDENTITY = inf.Projection("identity")


def test_build_index_search_score_evaluate(folder: Path, tmp_path: Path) -> None:
    stores = {}
    for name in ("train", "queries"):
        stores[name] = tmp_path / name
        code, out, err = run(
            "build", "--model", folder / "model", "--data", folder / f"{name}.jsonl", "--layers", "attention,head",
            "--projection", "rademacher:4x4", "--out", stores[name], "--json",
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["dims"]["classifier"] == 16
    code, out, _ = run("index", stores["train"], "--out", tmp_path / "index", "--json")
    assert json.loads(out)["recall"] == 1.0
    code, out, _ = run("search", tmp_path / "index", "--queries", stores["queries"], "-k", 3, "--harmful", "--json")
    found = json.loads(out)
    assert len(found) == 9
    dense = inf.influence(*(inf.GradientStore.open(stores[n]) for n in ("train", "queries")))
    total = sum(dense.layer(name) for name in dense.layers)
    assert [row["ids"] for row in found] == total.argsort(1)[:, :3].tolist()
    code, out, _ = run(
        "score", "--train", stores["train"], "--queries", stores["queries"], "--aggregation", "vote",
        "--out", tmp_path / "scores.csv",
    )  # fmt: skip
    assert code == 0
    rows = read_csv(tmp_path / "scores.csv")
    code, _, err = run(
        "score", "--train", stores["train"], "--queries", stores["queries"], "--aggregation", "vote",
        "--out", tmp_path / "scores.parquet",
    )  # fmt: skip
    assert code == 0, err
    assert inf.read_scores(tmp_path / "scores.parquet").equals(inf.read_scores(tmp_path / "scores.csv"))
    with open(tmp_path / "noisy.csv", "w") as file:
        file.write("score,noise\n" + "".join(f"{row['score']},{i % 4 == 0}\n" for i, row in enumerate(rows)))
    code, out, err = run("evaluate", tmp_path / "noisy.csv", "--json")
    assert code == 0, err
    assert 0 < json.loads(out)["auc_ndr"] < 1.2


def test_a_text_is_searched_by_the_model_and_tokenizer_of_the_index(folder: Path, tmp_path: Path) -> None:
    given = ["--layers", "head", "--projection", "rademacher:4x4"]
    shutil.copytree(folder / "model", tmp_path / "model")
    model, data = tmp_path / "model", folder / "train.jsonl"
    assert run("build", "--model", model, "--data", data, *given, "--out", tmp_path / "s")[0] == 0
    assert run("index", tmp_path / "s", "--out", tmp_path / "i")[0] == 0
    asked = ["search", tmp_path / "i", "--model", model, "--text", "w1 w2", "--label", "1", "-k", 2]
    code, _, err = run(*asked)
    assert code == 0, err
    (model / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    code, _, err = run(*asked)
    assert (code, "computes something else than the index was made with (tokenizer: template" in err) == (1, True), err
    code, _, err = run("build", "--model", model, "--data", data, *given, "--out", tmp_path / "s")
    assert (code, "was built by another computation (tokenizer: template" in err) == (1, True), err


def test_rows_are_appended_with_the_settings_of_the_store(folder: Path, tmp_path: Path) -> None:
    data = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", data[:4]), ("second", data[4:7])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    given = ["--model", folder / "model", "--out", tmp_path / "store"]
    settings = ["--layers", "head", "--projection", "rademacher:4x4"]
    assert run("build", *given, "--data", tmp_path / "first.jsonl", *settings)[0] == 0
    code, out, err = run("build", *given, "--data", tmp_path / "second.jsonl", "--append", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 7
    code, _, err = run("build", *given, "--data", tmp_path / "second.jsonl", "--append", *settings)
    assert code == 2
    assert "--layers: not with --append, the store has settled that." in err


def test_search_prints_texts_and_labels_that_the_store_remembers(folder: Path, tmp_path: Path) -> None:
    data = shutil.copy(folder / "train.jsonl", tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    given = ["--layers", "head", "--projection", "rademacher:4x4"]
    store, queries = tmp_path / "store", folder / "queries.jsonl"
    assert run("build", "--model", folder / "model", "--data", data, *given, "--out", store)[0] == 0
    # A store is searched as it is, by queries from a file.
    asked = ["search", store, "--model", folder / "model", "--queries", queries, "-k", 3]
    code, out, err = run(*asked, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found) == len(queries.read_text().splitlines())
    for entry in found:
        assert entry["texts"] == [rows[i]["text"] for i in entry["ids"]]
        assert entry["labels"] == [str(rows[i]["label"]) for i in entry["ids"]]
        assert entry["effects"] == ["helpful" if s > 0 else "harmful" if s < 0 else "none" for s in entry["scores"]]
    harmful = json.loads(run(*asked, "--harmful", "--json")[1])
    assert {effect for entry in harmful for effect in entry["effects"]} >= {"harmful"}
    assert "helpful" in run(*asked)[1]
    assert run("index", store, "--out", tmp_path / "index")[0] == 0
    asked[1] = tmp_path / "index"
    assert json.loads(run(*asked, "--json")[1])[0]["texts"] == found[0]["texts"]
    # Moved data are named; changed data are refused, and never shown as what they are not.
    moved = Path(data).rename(tmp_path / "moved.jsonl")
    code, out, err = run(*asked, "--json")
    assert (code, "texts are left out" in err, "texts" in json.loads(out)[0]) == (0, True, False)
    assert json.loads(run(*asked, "--data", moved, "--json")[1])[0]["texts"] == found[0]["texts"]
    write_rows(moved, rows[1:])
    code, _, err = run(*asked, "--data", moved)
    assert (code, "is not what the store was built of" in err) == (1, True)


def test_searches_by_a_method_that_the_index_keeps(folder: Path, tmp_path: Path) -> None:
    store, queries, index = tmp_path / "s", tmp_path / "q", tmp_path / "i"
    for name, out in (("train", store), ("queries", queries)):
        given = ["--layers", "head", "--projection", "identity", "--out", out]
        assert run("build", "--model", folder / "model", "--data", folder / f"{name}.jsonl", *given)[0] == 0
    code, out, err = run(
        "index", store, "--out", index, "--methods", "trackstar,datainf,ekfac", "--model", folder / "model"
    )
    assert code == 0, err
    assert "trackstar: the whole curvature" in out
    opened = [inf.GradientStore.open(path) for path in (store, queries)]
    for method in ("trak", "datainf"):
        code, out, err = run("search", index, "--queries", queries, "-k", 3, "--method", method, "--json")
        assert code == 0, err
        matrix = inf.influence(*opened, method)
        expected = sum(matrix.layer(name) for name in matrix.layers)
        for row, values in zip(json.loads(out), expected, strict=True):
            assert row["method"] == method
            torch.testing.assert_close(torch.tensor(row["scores"]), values.topk(3).values, rtol=1e-4, atol=1e-5)
    code, out, _ = run("search", index, "--queries", queries, "--method", "ekfac")
    assert (code, "ekfac, exact by the whole curvature" in out) == (0, True)
    code, _, err = run("index", store, "--out", tmp_path / "j", "--methods", "ekfac")
    assert (code, "ekfac needs --model" in err) == (2, True)
    # A store is searched as it is, and read for the method.
    assert run("search", store, "--queries", queries, "--method", "trak")[0] == 0


def test_a_damping_that_rows_held_out_choose(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, index = tmp_path / "s", tmp_path / "i"
    data = folder / "train.jsonl"
    given = ["--layers", "head", "--projection", "identity", "--out", store]
    assert run("build", "--model", folder / "model", "--data", data, *given)[0] == 0
    asked = ["index", store, "--out", index, "--methods", "trak,ekfac", "--model", folder / "model", "--damping"]
    seen = {}

    def choose(model: Any, rows: Any, gradients: Any, layers: list[str]) -> dict[str, float]:
        seen.update(held_out_damping(model, rows, gradients, layers, progress=False))
        return seen

    monkeypatch.setattr("influence_fast.attribution.held_out_damping.held_out_damping", choose)
    code, _, err = run(*asked, "held-out")
    assert code == 0, err
    opened = inf.GradientStore.open(store)
    assert list(seen) == opened.layers
    assert set(seen.values()) <= set(GRID)
    assert "damping: " + ", ".join(f"{name} {share:g}" for name, share in seen.items()) in err
    kept = json.loads((index / "index.json").read_text())["curvature"]
    expected = {("ekfac", name): share for name, share in seen.items()}
    expected |= {("trak", name): 0.1 for name in opened.layers}
    assert {(entry["method"], entry["layer"]): entry["damping"] for entry in kept} == expected
    code, _, err = run(*asked, "much")
    assert (code, "'much' is not a valid float" in err) == (2, True)


def test_a_store_of_factors(folder: Path, tmp_path: Path) -> None:
    given = ["--model", folder / "model", "--data", folder / "train.jsonl", "--layers", "attention"]
    given += ["--projection", "rademacher:8x8", "--out", tmp_path / "s", "--factors", 1]
    assert run("build", *given, "--dry-run")[0] == 2
    code, _, err = run("build", *given)
    assert code == 0, err
    assert inf.GradientStore.open(tmp_path / "s").factors == 1
    assert run("build", *given[:4], "--out", tmp_path / "s", "--append", "--factors", 2)[0] == 2
    assert run("verify", tmp_path / "s")[0] == 0
    assert run("index", tmp_path / "s", "--out", tmp_path / "i")[0] == 0
    assert run("search", tmp_path / "i", "--queries", tmp_path / "s", "-k", 2, "--method", "trak")[0] == 0
