"""The whole job on a tiny model saved to disk: results, files, replay, every kind of bad input, the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import models
import pytest
import torch
from audits import options, read_csv, run, sentences, write_rows
from tolerances import rank_range

import influence_fast as inf
from influence_fast.attribution import model_passes
from influence_fast.auditing.run import default_layers, method_inputs
from influence_fast.data.label_noise import uniform
from influence_fast.data.models import load_model
from influence_fast.data.samples import Samples
from influence_fast.evaluation.rivals import has_cleanlab

IDENTITY = inf.Projection("identity")


def bad(folder: Path, tmp_path: Path, what: str) -> tuple[list[object], str]:
    """Arguments of an audit that must fail, and what its message must say."""
    rows = sentences(20, 1)

    written = iter(range(99))

    def data(changed: list[dict]) -> list[object]:
        return options(folder, train=write_rows(tmp_path / f"{next(written)}.jsonl", changed))

    cases = {
        "missing file": (options(folder, train=tmp_path / "none.jsonl"), "train: no file"),
        "missing model": (options(folder, model=tmp_path / "none"), "model: no folder"),
        "missing column": ([*options(folder), "--text-column", "sentence"], "'sentence'; there are text, label, noise"),
        "missing label": ([*options(folder), "--label-column", "y"], "no column 'y'"),
        "empty file": (data([]), "is empty"),
        "one class": (data([{**row, "label": 1} for row in rows]), "all 20 samples have one class"),
        "label out of range": (
            data([*rows, {**rows[0], "label": 7}]),
            r"row 20 \(\d.jsonl, line 21\) has label 7, expected an int from 0 to 2",
        ),
        "label unknown": (data([{**row, "label": "good"} for row in rows]), "label 'good', the model knows LABEL_0"),
        "too long": (
            data([*rows, {**rows[0], "text": "w1 " * 50}]),
            r"row 20 \(.*\) has 50 tokens, the model takes 40",
        ),
        "no text": (data([*rows, {**rows[0], "text": None}]), r"row 20 \(.*\) has no text"),
        "broken json": (options(folder, train=_broken(tmp_path)), "cannot read"),
        "layer": ([*options(folder), "--layers", "nope"], "'nope' is neither a kind"),
        "method": ([*options(folder), "--methods", "dot,nearest"], "methods: expected some of dot, cosine, datainf"),
        "aggregation": ([*options(folder), "--aggregations", "sum"], "aggregations: expected some of mean"),
        "projection": ([*options(folder), "--projection", "fft:3"], "projection: expected|kind: expected"),
        "rank-by": ([*options(folder), "--rank-by", "dot"], "rank_by: expected METHOD:GROUP:AGGREGATION"),
        "dtype": ([*options(folder), "--dtype", "float8"], "dtype: expected one of"),
        "batch": ([*options(folder), "--batch-tokens", "many"], "batch_tokens: expected"),
        "noise": ([*options(folder), "--noise-column", "text"], "noise|true or false"),
    }
    return cases[what]


def _broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n{')
    return tmp_path / "broken.jsonl"


def test_audit_writes_scores_report_and_config(folder: Path, tmp_path: Path) -> None:
    code, out, err = run("audit", *options(folder), "--noise-column", "noise", "--out", tmp_path / "a", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert {row["method"] for row in document["evaluation"]} == {
        "random", "loss", "self-influence", "dot", "cosine", "datainf", "pool", "neighbours agree",
        *(["cleanlab probe"] if has_cleanlab() else []),
    }  # fmt: skip
    rows = read_csv(tmp_path / "a" / "scores.csv")
    assert len(rows) == 20
    assert sorted(int(row["rank"]) for row in rows) == list(range(20))
    by_rank = sorted(rows, key=lambda row: int(row["rank"]))
    assert [float(r["score"]) for r in by_rank] == sorted(float(r["score"]) for r in rows)
    assert [row["text"] for row in rows] == [row["text"] for row in sentences(20, 1)]
    assert {
        "id",
        "neighbours agree",
        "label",
        "noise",
        "loss",
        "self_influence",
        "cosine rank-c: all",
        "cosine rank-c: attention q2",
    } <= set(rows[0])
    html = (tmp_path / "a" / "report.html").read_text()
    assert html.count("<svg") == 3
    replayed = run("audit", "--config", tmp_path / "a" / "config.json", "--out", tmp_path / "b")
    assert replayed[0] == 0, replayed[2]
    for one, other in zip(rows, read_csv(tmp_path / "b" / "scores.csv"), strict=True):
        assert list(one) == list(other)
        for name, value in one.items():
            if name in ("id", "label", "noise", "text", "rank", "kind"):
                assert other[name] == value, name
            else:
                assert float(other[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_scores_equal_a_literal_loop(folder: Path) -> None:
    model, encode = load_model(str(folder / "adapter"))
    trained = default_layers(model)
    assert len(trained) == 18
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    result = inf.audit(
        str(folder / "adapter"),
        str(folder / "train.jsonl"),
        str(folder / "queries.jsonl"),
        aggregations=["mean", "rank", "vote"],
        layers=[name for name in trained if not name.endswith(".bias")],
        progress=False,
    )
    layers = result.groups["all"]
    samples = {}
    for name in ("train", "queries"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        ids = [encode(row["text"])["input_ids"] for row in rows]
        samples[name] = [{"input_ids": i, "labels": row["label"]} for i, row in zip(ids, rows, strict=True)]
    truth = {name: models.oracle(model, rows, layers) for name, rows in samples.items()}
    sides = [(truth["queries"][n].flatten(1), truth["train"][n].flatten(1)) for n in layers]
    dot = torch.stack([queries @ train.T for queries, train in sides])
    scores = result.scores["dot"]["all"]
    torch.testing.assert_close(scores["mean"], dot.mean((0, 1)), rtol=1e-4, atol=1e-4)
    # A gradient is off by 1e-5 of its length at most, as in test_capture.py, and a product by twice that.
    room = torch.stack([2e-5 * queries.norm(dim=1)[:, None] * train.norm(dim=1) for queries, train in sides])
    ranks = torch.stack(rank_range(dot, room)).double()
    assert (ranks[1] - ranks[0]).mean() < 0.01
    votes = -(4 - ranks).clamp_min(0).sum((1, 2))
    for name, (low, high) in (("rank", ranks.mean((1, 2))), ("vote", votes)):
        assert ((low - 1e-9 <= scores[name]) & (scores[name] <= high + 1e-9)).all(), name


def test_without_trusted_rows_a_pool_weighs_as_before_it_sees_any(folder: Path, tmp_path: Path) -> None:
    """Training rows stand for them, which the model knows: weights fitted to these would trust the model alone."""
    rows = write_rows(tmp_path / "train.jsonl", sentences(100, 1))
    out = tmp_path / "out"
    result = inf.audit(str(folder / "adapter"), str(rows), out=out, progress=False)
    weights = result.facts["pool_weights"]
    assert list(weights) == ["model", "neighbours", "nearest neighbours", "probe"]
    assert weights["model"] == 0.5
    assert not (out / "stores" / "mislabelled").exists()
    assert "with weights that no query was asked for: model 0.50, " in (out / "report.html").read_text()


def test_a_model_that_was_trained_whole_is_judged_by_states_before_its_blocks() -> None:
    """Behind its blocks hidden states know the labels, wrong ones too."""
    model, rows, asked = models.make("bert"), models.rows(count=24), models.rows(count=9, seed=2)
    result = inf.audit(model, rows, asked, methods=["pool"], layers="head", progress=False)
    labels, some = (
        [row["labels"] for row in rows],
        torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist(),
    )
    queries = [asked[i] for i in some]
    own = [row["labels"] for row in queries]
    first, of_asked = (next(iter(inf.hidden_states(model, part).values())) for part in (rows, queries))
    given = (first, labels, of_asked)
    parts = [inf.neighbour_estimate(*given, k, query_labels=own) for k in (6, 6)]
    _, weights = inf.stacked([*parts, inf.probe_estimate(*given, query_labels=own)], labels)
    found = list(result.facts["pool_weights"].values())[-3:]
    assert [one / found[0] for one in found] == pytest.approx((weights / weights[0]).tolist(), rel=1e-4)


def test_copies_of_training_rows_are_no_queries(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, others = sentences(40, 1), sentences(12, 2)
    copied = [{**row, "text": f" {row['text'].upper()}"} for row in train[:3]]
    files = [str(write_rows(tmp_path / "train.jsonl", train))]
    given = {"methods": ["dot"], "progress": False, "limit": 40}
    queries = write_rows(tmp_path / "some.jsonl", [*others[:6], *copied, *others[6:]])
    result = inf.audit(str(folder / "adapter"), *files, str(queries), out=tmp_path / "out", **given)
    said = "3 of 15 queries stand among the training rows too, equal or nearly so; they are left out"
    assert (result.facts["queries"], result.facts["copies"]) == (12, said)
    assert f"{said}." in (tmp_path / "out" / "report.html").read_text()
    alone = inf.audit(str(folder / "adapter"), *files, others, **given)
    assert "copies" not in alone.facts
    torch.testing.assert_close(result.scores["dot"]["all"]["mean"], alone.scores["dot"]["all"]["mean"])
    # Where few others are there, all stay, and it is said.
    kept = inf.audit(str(folder / "adapter"), *files, [*copied, others[0]], **given)
    assert kept.facts["queries"] == 4
    assert "the model has learned them" in caplog.text


def test_a_classifier_is_ranked_by_the_pool_of_the_model_before_and_after(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [str(folder / f"{name}.jsonl") for name in ("train", "queries")]
    result = inf.audit(str(folder / "adapter"), *data, progress=False)
    assert result.main == ("pool", "all", "mean")
    model, encode = load_model(str(folder / "adapter"))
    sides = []
    for path in data:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        sides.append([{"input_ids": encode(row["text"])["input_ids"], "labels": row["label"]} for row in rows])
    labels, trusted = ([row["labels"] for row in side] for side in sides)
    own = [inf.class_log_probabilities(model, side) for side in sides]
    adapted = [inf.hidden_states(model, side) for side in sides]
    with model.disable_adapter():
        states = [inf.hidden_states(model, side) for side in sides]
    assert not torch.equal(states[0]["block 1"], adapted[0]["block 1"])
    last, every = [list(s.values())[-1] for s in states], [torch.cat(list(s.values()), 1) for s in states]
    # Half of the queries, in another order, are shown with a wrong label; influence speaks of the label shown alone.
    some = torch.randperm(len(trusted), generator=torch.Generator().manual_seed(0)).tolist()
    back = torch.tensor(some).argsort()
    own_labels = [trusted[i] for i in some]
    parts = [inf.neighbour_estimate(last[0], labels, last[1][some], k, query_labels=own_labels) for k in (5, 5)]
    parts.append(inf.probe_estimate(every[0], labels, every[1][some], query_labels=own_labels))
    stack, of_stack = inf.stacked(parts, labels)
    estimates = [
        (own[0], own[1]),
        (stack[0], stack[1][back]),
        (torch.zeros(len(labels), 3), torch.zeros(len(trusted), 3)),
    ]
    shown, wrong = uniform([trusted[i] for i in some], 0.5, 3)
    asked = [{**sides[1][i], "labels": label} for i, label in zip(some, shown, strict=True)]
    stores = [
        inf.build_store(tmp_path / name, model, rows, default_layers(model), "identity", progress=False)
        for name, rows in (("train", sides[0]), ("shown", asked))
    ]
    by_layer, of_queries = inf.fitted_influence(inf.influence(*stores, "trackstar"), ~wrong)
    for i, label in enumerate(labels):
        estimates[2][0][i, label] = sum(float(scores[0, i]) for scores in by_layer.values())
    for i, label, value in zip(some, shown, of_queries, strict=True):
        estimates[2][1][i, label] = value
    prior = (0.5, 1, 0)
    expected_of_all, weights = inf.pooled(estimates, labels, trusted, prior)
    torch.testing.assert_close(result.scores["pool"]["all"]["mean"], expected_of_all, rtol=1e-5, atol=1e-6)
    shown_weights = torch.stack([weights[0], weights[2], *(weights[1] * of_stack)])
    assert list(result.facts["pool_weights"].values()) == pytest.approx(shown_weights.tolist(), abs=1e-5)
    # Fitted to some of the queries, as the self-check does it.
    whole = [Samples(side, None, None, None, None) for side in sides]
    build = inf.BuildSettings(default_layers(model), IDENTITY, "classification")
    names = ("pool", "fitted-trackstar")
    inputs = method_inputs(model, *whole, stores[0], stores[1], tmp_path, build, names, progress=False)
    half = torch.arange(0, len(trusted), 2)
    by_layer, held_out = inf.fitted_influence(inf.influence(*stores, "trackstar"), ~wrong, half)
    for i, label in enumerate(labels):
        estimates[2][0][i, label] = sum(float(scores[0, i]) for scores in by_layer.values())
    kept = torch.tensor(some)[half]
    estimates[2][1][:] = 0
    for j in half.tolist():
        estimates[2][1][some[j], shown[j]] = held_out[j]
    parts = [(train, queries[kept]) for train, queries in estimates]
    expected, _ = inf.pooled(parts, labels, torch.tensor(trusted)[kept], prior)
    by_method = {
        method: [
            {name: values for name, _, values in given.influence(method)} for given in (inputs.fitted_to(half), inputs)
        ]
        for method in names
    }
    torch.testing.assert_close(by_method["pool"][0]["pool"][0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_method["pool"][1]["pool"][0].double(), result.scores["pool"]["all"]["mean"])
    torch.testing.assert_close(by_method["fitted-trackstar"][0], by_layer)
    assert inf.audit(str(folder / "adapter"), *data, progress=False, methods=["dot"]).main[0] == "dot"
    # States that memory does not take are read from a file, a part of the rows at a time.
    size = 4 * len(labels) * 3 * 16
    monkeypatch.setattr(model_passes, "_IN_MEMORY", size - 1)
    monkeypatch.setattr("influence_fast.attribution.probe._AT_ONCE", 7)
    mapped = inf.audit(str(folder / "adapter"), *data, out=tmp_path / "mapped", progress=False)
    assert mapped.main == ("pool", "all", "mean")
    torch.testing.assert_close(mapped.scores["pool"]["all"]["mean"], expected_of_all, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "what",
    ["missing file", "missing model", "missing column", "missing label", "empty file", "one class", "label out of range",
     "label unknown", "too long", "no text", "broken json", "layer", "method", "aggregation", "projection", "rank-by",
     "dtype", "batch", "noise"],
)  # fmt: skip
def test_bad_input_ends_with_a_message_and_nothing_written(folder: Path, tmp_path: Path, what: str) -> None:
    arguments, message = bad(folder, tmp_path, what)
    code, out, err = run("audit", *arguments, "--out", tmp_path / "out")
    assert code == 1
    assert out == ""
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_every_method_in_one_audit(folder: Path, tmp_path: Path) -> None:
    methods = (
        "trak,trackstar,ekfac,contrast-dot,contrast-cosine,outlier,repsim,we,we_topk,neighbours,fitted-trackstar,pool"
    )
    given = ["--noise-column", "noise", "--layers", "attention,head", "--methods", methods, "--out", tmp_path / "a"]
    code, out, err = run("audit", *options(folder), *given, "--json")
    assert code == 0, err
    cells = {(row["method"], row["group"], row["aggregation"]): row for row in json.loads(out)["evaluation"]}
    for method in methods.split(","):
        assert {a for m, g, a in cells if (m, g) == (method, "all")} == {"mean", "rank-c", "vote-c"}, method
    assert {g for m, g, _ in cells if m == "repsim"} == {"embedding", *(f"block {b}" for b in range(4)), "all"}
    assert all(row["low"] <= row["auc_ndr"] <= row["high"] for row in cells.values())
    stores = [inf.GradientStore.open(tmp_path / "a" / "stores" / name) for name in ("contrast", "queries")]
    expected = inf.aggregate(inf.influence(*stores, "cosine"), "rank-c")
    noise = torch.tensor([row["noise"] for row in sentences(20, 1)])
    assert cells["contrast-cosine", "all", "rank-c"]["auc_ndr"] == pytest.approx(inf.ndr_auc(expected, noise))


def test_methods_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    for given, message in (
        (["--methods", "ekfac", "--projection", "rademacher:2x2"], "ekfac needs whole gradients"),
        (["--methods", "outlier", "--model", folder / "causal"], "outlier needs a classifier"),
    ):
        code, _, err = run("audit", *options(folder), *given, "--out", tmp_path / "out")
        assert (code, message in err) == (1, True), err
        assert not (tmp_path / "out").exists()


def test_what_the_pass_for_gradients_shows_is_not_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = models.rows(count=30, seed=1), models.rows(count=12, seed=2)
    taken, forward = [], model_passes._forward

    def watched(*arguments: object, **named: object) -> object:
        taken.append(arguments[3])
        return forward(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(model_passes, "_forward", watched)

    def audit(**settings: object) -> torch.Tensor:
        taken.clear()
        model = models.make("bert", lora=True)
        result = inf.audit(model, rows, queries, methods=["pool"], progress=False, evidence=0, **settings)
        return result.rankings[result.main]

    first = audit(out=tmp_path / "out")
    assert taken == []
    # What an earlier audit left in its stores gives neither.
    again = audit(out=tmp_path / "out")
    assert sorted(taken) == [False, False, True, True]
    assert torch.allclose(first, again, rtol=1e-4)
    # Nor does a pass in another precision give the model's own.
    audit(precision="bfloat16")
    assert sorted(taken) == [False, False, True, True]


def test_ekfac_leaves_out_what_has_no_factors_unless_it_was_asked_for() -> None:
    rows, model = models.rows(count=12), models.make("bert", lora=True)
    result = inf.audit(model, rows, rows[:4], methods=["ekfac"], aggregations=["mean"], progress=False)
    taken = result.groups["all"]
    assert any("lora_A" in name for name in taken)
    assert not any(name.endswith("bias") for name in taken)
    bias = next(name for name in inf.select_layers(model, default_layers(model)) if name.endswith("bias"))
    with pytest.raises(inf.InputError, match="no weight matrix"):
        inf.audit(
            model, rows, rows[:4], layers=[bias, *taken], methods=["ekfac"], aggregations=["mean"], progress=False
        )
