"""The self-check: what is planted, how queries are split, and that its figures are those of the definitions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from audits import options, run, write_rows
from audits import sentences as texts

import influence_fast as inf
from influence_fast.auditing.config import RankingPlan
from influence_fast.auditing.report.self_check_text import sentences
from influence_fast.auditing.self_check import Subset, estimate, plant, planted, split, stability
from influence_fast.evaluation.rankings import groups_by_name


def test_planted_labels_and_targets() -> None:
    rows = models.rows(count=60)
    copy, mask = plant(rows, 0.2, seed=0)
    assert [a["labels"] != b["labels"] for a, b in zip(rows, copy, strict=True)] == mask.tolist()
    assert int(mask.sum()) == 12
    assert all(a["input_ids"] == b["input_ids"] for a, b in zip(rows, copy, strict=True))
    rows = models.rows("causal", 60)
    copy, mask = plant(rows, 0.2, seed=0)
    for old, new, hit in zip(rows, copy, mask.tolist(), strict=True):
        assert new["input_ids"][:2] == old["input_ids"][:2]
        assert new["labels"] == [-100, -100, *new["input_ids"][2:]]
        assert (new == old) or hit
    whole = [{**row, "labels": row["input_ids"]} for row in rows]
    copy, mask = plant(whole, 0.2, seed=0)
    assert all(sorted(a["input_ids"]) == sorted(b["input_ids"]) for a, b in zip(whole, copy, strict=True))
    with pytest.raises(inf.InputError, match=r"self_check: 0\.01 of 60 samples plants 1"):
        plant(rows, 0.01, 0)


def test_halves_are_disjoint_and_as_often_correct() -> None:
    # Of integers, whose products rank alike among whichever queries.
    matrix = inf.influence(*({"a": torch.randint(-40, 41, (rows, 3)).float()} for rows in (9, 20)))
    matrix.query_correct = torch.arange(20) % 4 != 0
    one, other = split(matrix, torch.Generator().manual_seed(0))
    assert (one ^ other).all()
    assert abs(int((one & matrix.query_correct).sum()) - int((other & matrix.query_correct).sum())) <= 1
    part = Subset(matrix, one)
    for method in ("mean", "rank-c", "vote-c", "median"):
        keep = one & matrix.query_correct if method.endswith("-c") else one
        expected = inf.aggregate(matrix, method, queries=keep)
        torch.testing.assert_close(inf.aggregate(part, method), expected)


def test_the_better_method_is_chosen_and_held_out_figures_are_its_own(tmp_path: Path) -> None:
    from stores import write_store

    random = torch.Generator().manual_seed(0)
    mask = torch.rand(200, generator=random) < 0.2
    good = torch.randn(12, 200, generator=random) - 2 * mask.float()
    matrices = {"good": {"head": good}, "bad": {"head": torch.randn(12, 200, generator=random)}}
    store = write_store(
        tmp_path / "s", {"head": torch.randn(200, 2)}, columns={"loss": torch.rand(200, generator=random)}
    )
    wrapped = {name: inf.Checkpoints([_wrap(values)]) for name, values in matrices.items()}
    groups, aggregations = groups_by_name(["head"]), ["mean", "rank", "vote"]
    plan = RankingPlan(list(matrices), aggregations, groups, inf.RankingKey("bad", "all", "mean"), 0.2)
    found = planted(wrapped, store, mask, plan, random)
    assert found["chosen"].startswith("good")
    assert found["rows"]["chosen"]["auc_ndr"] > 0.95 > 0.7 > found["rows"]["default"]["auc_ndr"]
    assert found["worst"] < found["median"] < found["best_in_hindsight"]
    assert found["candidates"] == 2 * 2 * 5 * 2


def test_what_is_estimated_of_the_wrong_labels_that_are_there(tmp_path: Path) -> None:
    from stores import write_store

    random = torch.Generator().manual_seed(0)
    wrong, mask = (torch.rand(300, generator=random) < share for share in (0.2, 0.1))
    doubtful = torch.randn(300, generator=random) - 3 * (wrong ^ mask).float()
    plan = RankingPlan(["m"], ["mean"], groups_by_name(["head"]), inf.RankingKey("m", "all", "mean"), 0.2)
    labels = torch.randint(2, (300,), generator=random).tolist()

    def store(name: str, **columns: torch.Tensor) -> inf.GradientStore:
        return write_store(tmp_path / name, {"head": torch.randn(300, 2)}, columns=columns)

    def found(correct: torch.Tensor, said: dict | None) -> dict:
        train = store(f"train {float(correct.float().mean())} {said is None}", correct=correct)
        inputs = SimpleNamespace(train=train, labels=lambda: (labels, labels))
        return estimate(inputs, _wrap({"head": doubtful[None]}), copy, mask, plan, said)

    copy = store("copy", loss=-doubtful + torch.randn(300, generator=random))
    said = {"estimate": 60.0, "low": 45.0, "high": 75.0}
    rows = found(~wrong, said)["rows"]
    truth = inf.ndr_auc(torch.randn(300, generator=random) - 3 * wrong.float(), wrong)
    assert rows["default"]["low"] < truth < rows["default"]["high"]
    assert rows["loss"]["auc_ndr"] < rows["default"]["auc_ndr"]
    assert "learned 100% or more" in found(torch.ones(300, dtype=torch.bool), said)["skipped"]
    assert "not known" in found(~wrong, None)["skipped"]
    assert "say nothing" in found(~wrong, {"estimate": 149.0, "low": 140.0, "high": 150.0})["skipped"]


def test_stability_is_the_overlap_of_what_halves_of_the_queries_would_drop() -> None:
    random = torch.Generator().manual_seed(0)
    plan = RankingPlan(["ready"], ["mean"], groups_by_name(["head"]), inf.RankingKey("ready", "all", "mean"), 0.2)

    def overlap(values: torch.Tensor) -> dict:
        inf.register_method(inf.Method("ready", "influence that is there already", lambda inputs: {"head": values}))
        try:
            return stability(inf.MethodInputs({}, {}), plan, random)
        finally:
            inf.unregister_method("ready")

    sure = overlap(torch.arange(200.0).repeat(6, 1))
    assert sure["overlaps"] == [1.0] * 5
    chance = overlap(torch.randn(6, 200, generator=random))
    assert 0.1 < sum(chance["overlaps"]) / 5 < 0.5
    alone = overlap(torch.randn(1, 200))
    assert "too few queries" in alone["skipped"]


def _wrap(values: dict[str, torch.Tensor]):
    from influence_fast.attribution.influence_matrix import InMemory

    return InMemory(values)


def test_of_an_adapter_whose_head_has_a_bias(folder: Path, tmp_path: Path) -> None:
    """By default its gradient is taken too, and it has no inputs to compare factors of."""
    data = write_rows(tmp_path / "train.jsonl", texts(60, 1))
    queries = str(folder / "queries.jsonl")
    result = inf.audit(str(folder / "adapter"), str(data), queries, self_check=0.2, progress=False)
    biases = [name for name in result.groups["all"] if name.endswith(".bias")]
    assert biases
    found = result.facts["self_check"]["fidelity"]
    assert found["layers"] == len(result.groups["all"]) - len(biases)
    assert found["correlation"]["as configured"] == {"dot": pytest.approx(1), "cosine": pytest.approx(1)}
    alone = inf.audit(str(folder / "adapter"), str(data), queries, self_check=0.2, progress=False, layers=biases)
    assert "weight matrix" in alone.facts["self_check"]["fidelity"]["skipped"]


@pytest.mark.parametrize("projection", ["identity", "rademacher:4x4"])
def test_in_an_audit(folder: Path, tmp_path: Path, projection: str) -> None:
    data = write_rows(tmp_path / "train.jsonl", texts(60, 1))
    given = [
        "--projection",
        projection,
        "--layers",
        "attention,head",
        "--self-check",
        0.2,
        "--methods",
        "dot,cosine,outlier",
    ]
    code, out, err = run("audit", *options(folder, train=data), *given, "--out", tmp_path / "a", "--json")
    assert code == 0, err
    found = json.loads(out)["facts"]["self_check"]
    assert found["planted"]["flips"] == 12
    exact = found["fidelity"]["correlation"]["as configured"]
    if projection == "identity":
        assert exact == {"dot": pytest.approx(1), "cosine": pytest.approx(1)}
        assert "another seed" not in found["fidelity"]["correlation"]
    else:
        assert 0 < exact["dot"] < 1
    assert "not known from trusted rows" in found["estimate"]["skipped"]
    assert found["fidelity"]["correlation"]["int8"]["dot"] > (0.99 if projection == "identity" else 0)
    html = (tmp_path / "a" / "report.html").read_text()
    assert "How much the choice matters" in html
    assert len(sentences(found)) >= 6
    row = {"auc_ndr": 0.91, "low": 0.8, "high": 0.97}
    said = {
        **found,
        "estimate": {"share": 0.13, "learned": 0.0, "rows": {"default": row, "loss": {**row, "auc_ndr": 0.85}}},
    }
    text = " ".join(sentences(said))
    assert "13% of all by the estimate above: AUC_NDR 0.910 (0.800 to 0.970) by the ranking shown, 0.850 (" in text


def test_a_method_of_one_row_goes_beside_those_of_many(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", texts(60, 1))
    given = ["--layers", "attention", "--self-check", 0.2, "--methods", "pool,dot", "--out", tmp_path / "a"]
    code, out, err = run("audit", *options(folder, train=data), *given, "--json")
    assert code == 0, err
    found = json.loads(out)["facts"]["self_check"]
    assert found["planted"]["default"] == "pool all mean"
    assert min(found["planted"]["queries"]) >= 4
    assert len(found["stability"]["overlaps"]) == 5
    assert all(0 <= share <= 1 for share in found["stability"]["overlaps"])
    assert found["checkpoints"] == {}


@pytest.mark.parametrize("method", ["pool", "dot"])
def test_other_checkpoints(folder: Path, tmp_path: Path, method: str) -> None:
    other = models.make("bert")
    with torch.no_grad():
        for weights in other.parameters():
            weights += 0.2 * torch.randn_like(weights)
    other.save_pretrained(tmp_path / "other")
    data = write_rows(tmp_path / "train.jsonl", texts(60, 1))
    same, another = str(folder / "model"), str(tmp_path / "other")
    given = ["--layers", "attention", "--methods", method, "--aggregations", "mean", "--out", tmp_path / "a"]
    given += ["--checkpoints", f"{same},{another}"]
    code, _, err = run("audit", *options(folder, train=data), *given)
    assert (code, "checkpoints: the self-check compares them" in err) == (1, True)
    code, out, err = run("audit", *options(folder, train=data), *given, "--self-check", 0.2, "--json")
    assert code == 0, err
    found = json.loads(out)["facts"]["self_check"]
    assert found["checkpoints"][same] == 1.0
    assert found["checkpoints"][another] < 1.0
    assert "at the checkpoint " + another in " ".join(sentences(found))
    assert len(found["stability"]["overlaps"]) == 5
    lacking = [*given, "--self-check", 0.2, "--checkpoints", folder / "causal"]
    code, _, err = run("audit", *options(folder, train=data), *lacking, "--out", tmp_path / "b")
    assert (code, "checkpoints: " in err) == (1, True), err
    assert not (tmp_path / "b").exists()


def test_too_few_queries_to_fit_on_halves(folder: Path, tmp_path: Path) -> None:
    train, queries = (write_rows(tmp_path / f"{n}.jsonl", texts(n, n)) for n in (60, 3))
    given = ["--layers", "attention", "--methods", "fitted-cosine", "--self-check", 0.2, "--out", tmp_path / "a"]
    code, out, err = run("audit", *options(folder, train=train, queries=queries), *given, "--json")
    assert code == 0, err
    assert "too few queries" in json.loads(out)["facts"]["self_check"]["stability"]["skipped"]


def test_in_an_audit_of_a_causal_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def watched(rows, share, seed, *rest):
        seeds.append(seed)
        return plant(rows, share, seed, *rest)

    monkeypatch.setattr("influence_fast.auditing.self_check.plant", watched)
    data = write_rows(tmp_path / "train.jsonl", texts(40, 1))
    given = ["--layers", "attention[0]", "--projection", "rademacher:4x4", "--self-check", 0.2]
    arguments = options(folder, train=data, model=folder / "causal")
    code, out, err = run("audit", *arguments, *given, "--out", tmp_path / "a", "--json")
    assert code == 0, err
    assert json.loads(out)["facts"]["self_check"]["planted"]["flips"] == 8
    # Labels that a user planted by the audit's seed are not turned back.
    assert seeds
    assert 0 not in seeds
    code, _, err = run("audit", *arguments, "--self-check", 0.01, "--out", tmp_path / "b")
    assert (code, "self_check: 0.01 of 40 samples plants 0" in err) == (1, True)
    assert not (tmp_path / "b").exists()


def test_the_index_is_the_one_that_the_store_would_get(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the exact one that so few rows always get: its figure may be below 1, and is said."""
    monkeypatch.setattr(inf.InfluenceIndex, "choose_factory", lambda store: "IVF4,SQ8")
    monkeypatch.setattr("influence_fast.search.influence_index.InfluenceIndex._widen", lambda *rest: None)
    data = write_rows(tmp_path / "train.jsonl", texts(60, 1))
    given = ["--layers", "attention", "--methods", "dot", "--self-check", 0.2, "--out", tmp_path / "a", "--json"]
    code, out, err = run("audit", *options(folder, train=data), *given)
    assert code == 0, err
    index = json.loads(out)["facts"]["self_check"]["fidelity"]["index"]
    assert (index["factory"], index["rows"]) == ("IVF4,SQ8", 60)
    assert 0 < index["recall"] < 1
    assert f"recall@10 {index['recall']:.3f}" in (tmp_path / "a" / "report.html").read_text()
