"""From an audit to a cleaned file: dropped, relabelled, selected, in the input's own form, with a log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from audits import options, read_csv, run, write_rows

import influence_fast as inf
from influence_fast.auditing.cleaning import Audit, count_of

RAW = '{"id": "r%02d",  "text": "%s", "label": %d, "note": "\\u00e9 %d"}\n'


@pytest.fixture(scope="module")
def audit(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit, beside its data: rows with names and a column that no model reads."""
    place = tmp_path_factory.mktemp("audited")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines = [RAW % (i, row["text"], row["label"], i) for i, row in enumerate(rows)]
    (place / "train.jsonl").write_text("".join(lines))
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    write_rows(place / "queries.jsonl", [{**row, "kind": "ab"[i % 2]} for i, row in enumerate(queries)])
    given = options(folder, train=place / "train.jsonl", queries=place / "queries.jsonl", methods="cosine,pool")
    code, _, err = run("audit", *given, "--out", place / "audit")
    assert code == 0, err
    return place / "audit"


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_the_most_harmful_rows_are_dropped(audit: Path, tmp_path: Path) -> None:
    scores = sorted(read_csv(audit / "scores.csv"), key=lambda row: int(row["rank"]))
    code, out, err = run("clean", audit, "--drop", "10%", "--out", tmp_path / "a.jsonl", "--json")
    assert code == 0, err
    before = lines_of(audit.parent / "train.jsonl")
    found = json.loads(out)
    count = round(0.1 * len(before))
    assert (found["rows"], found["dropped"], found["kept"], found["relabelled"]) == (
        len(before), count, len(before) - count, 0,
    )  # fmt: skip
    worst = {row["id"] for row in scores[:count]}
    assert lines_of(tmp_path / "a.jsonl") == [line for line in before if json.loads(line)["id"] not in worst]
    log = read_csv(tmp_path / "a.jsonl.log.csv")
    assert {row["id"] for row in log} == worst
    assert all(row["decision"] == "drop" and "most harmful" in row["why"] for row in log)
    assert [int(row["row"]) for row in log] == sorted(int(row["id"][1:]) for row in log)
    first = (tmp_path / "a.jsonl").read_bytes(), (tmp_path / "a.jsonl.log.csv").read_bytes()
    assert run("clean", audit, "--drop", str(count), "--out", tmp_path / "a.jsonl")[0] == 0
    assert ((tmp_path / "a.jsonl").read_bytes(), (tmp_path / "a.jsonl.log.csv").read_bytes()) == first


def test_improbable_labels_are_dropped_or_replaced(audit: Path, tmp_path: Path) -> None:
    scores = {row["id"]: row for row in read_csv(audit / "scores.csv")}
    assert all(0 <= float(row["label_probability"]) <= 1 for row in scores.values())
    limit = sorted(float(row["label_probability"]) for row in scores.values())[6]
    low = {name for name, row in scores.items() if float(row["label_probability"]) < limit}
    inf_clean = ["clean", audit, "--below", limit, "--out"]
    assert run(*inf_clean, tmp_path / "dropped.jsonl")[0] == 0
    assert {json.loads(line)["id"] for line in lines_of(tmp_path / "dropped.jsonl")} == set(scores) - low
    code, out, err = run(*inf_clean, tmp_path / "relabelled.jsonl", "--relabel", "--json")
    assert code == 0, err
    changed = 0
    for old, new in zip(lines_of(audit.parent / "train.jsonl"), lines_of(tmp_path / "relabelled.jsonl"), strict=True):
        name, row = json.loads(old)["id"], scores[json.loads(old)["id"]]
        if name in low and row["suggested_label"] != row["label"]:
            changed += 1
            assert json.loads(new) == {**json.loads(old), "label": int(row["suggested_label"])}
        else:
            assert new == old
    assert json.loads(out)["relabelled"] == changed


def test_what_a_person_decided_comes_first(audit: Path, tmp_path: Path) -> None:
    order = sorted(read_csv(audit / "scores.csv"), key=lambda row: int(row["rank"]))
    worst, second, best = order[0]["id"], order[1]["id"], order[-1]["id"]
    (tmp_path / "review.csv").write_text(
        f"id,decision,label,why\r\n{worst},keep,,fine\r\n{best},Relabel,2,\r\n{order[5]['id']},,,\r\n"
    )
    given = ["--drop", 2, "--decisions", tmp_path / "review.csv", "--out", tmp_path / "a.jsonl"]
    code, _, err = run("clean", audit, *given)
    assert code == 0, err
    rows = {json.loads(line)["id"]: json.loads(line) for line in lines_of(tmp_path / "a.jsonl")}
    assert worst in rows
    assert second not in rows
    assert rows[best]["label"] == 2
    log = {row["id"]: row for row in read_csv(tmp_path / "a.jsonl.log.csv")}
    assert (log[best]["decision"], log[best]["label"], log[best]["why"]) == ("relabel", "2", "reviewed")
    for wrong, message in (
        ("nobody,drop,", "the audit has no sample 'nobody'"),
        (f"{worst},burn,", "expected keep, relabel, drop, got 'burn'"),
        (f"{worst},relabel,", "relabel needs a label"),
        (f"{worst},relabel,9", "no sample has the label '9'"),
    ):
        (tmp_path / "review.csv").write_text(f"id,decision,label\n{wrong}\n")
        code, _, err = run("clean", audit, "--decisions", tmp_path / "review.csv", "--out", tmp_path / "b.jsonl")
        assert code == 1
        assert message in err
        assert not (tmp_path / "b.jsonl").exists()


def test_rows_that_help_most_are_selected(audit: Path, tmp_path: Path) -> None:
    order = sorted(read_csv(audit / "scores.csv"), key=lambda row: -int(row["rank"]))
    code, _, err = run("select", audit, "--top", 4, "--out", tmp_path / "a.jsonl")
    assert code == 0, err
    assert {json.loads(line)["id"] for line in lines_of(tmp_path / "a.jsonl")} == {row["id"] for row in order[:4]}
    code, _, err = run("select", audit, "--top", "20%", "--per-group", "kind", "--out", tmp_path / "b.jsonl")
    assert code == 0, err
    train, queries = (inf.GradientStore.open(audit / "stores" / name) for name in ("train", "queries"))
    matrix = inf.influence(train, queries, "cosine")
    total = sum(matrix.layer(name).double() for name in matrix.layers)
    groups = [total[torch.arange(len(queries)) % 2 == group].mean(0) for group in range(2)]
    taken: list[int] = []
    while len(taken) < round(0.2 * len(train)):
        for scores in groups:
            if len(taken) < round(0.2 * len(train)):
                taken.append(next(i for i in scores.argsort(descending=True).tolist() if i not in taken))
    assert {json.loads(line)["id"] for line in lines_of(tmp_path / "b.jsonl")} == {train.ids[i] for i in taken}
    code, _, err = run("select", audit, "--top", 3, "--per-group", "color", "--out", tmp_path / "c.jsonl")
    assert code == 1
    assert "queries have no column 'color'" in err


def copied(audit: Path, tmp_path: Path) -> Path:
    """An audit that does not know the bytes of its data, so that other data can stand for them."""
    copy = Path(shutil.copytree(audit, tmp_path / "audit"))
    (copy / "data.json").unlink()
    return copy


def test_a_saved_data_set_stays_one(audit: Path, tmp_path: Path) -> None:
    copy = copied(audit, tmp_path)
    rows = [json.loads(line) for line in lines_of(audit.parent / "train.jsonl")]
    features = datasets.Features(
        {"id": datasets.Value("string"), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    part = datasets.Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)
    datasets.DatasetDict({"train": part, "test": part.select([0])}).save_to_disk(str(tmp_path / "data"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "train": str(tmp_path / "data")}))
    worst = min(read_csv(audit / "scores.csv"), key=lambda row: int(row["rank"]))["id"]
    code, _, err = run("clean", copy, "--drop", 1, "--out", tmp_path / "out")
    assert code == 0, err
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert found["train"]["id"] == [row["id"] for row in rows if row["id"] != worst]
    assert found["train"].features == features
    assert len(found["test"]) == 1


def test_several_files_stay_several(audit: Path, tmp_path: Path) -> None:
    copy = copied(audit, tmp_path)
    lines = lines_of(audit.parent / "train.jsonl")
    for name, part in (("a", lines[:7]), ("b", lines[7:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "train": [str(tmp_path / f"{n}.jsonl") for n in "ab"]}))
    code, _, err = run("clean", copy, "--drop", 3, "--out", tmp_path / "out")
    assert code == 0, err
    whole = tmp_path / "whole.jsonl"
    assert run("clean", audit, "--drop", 3, "--out", whole)[0] == 0
    assert lines_of(tmp_path / "out" / "a.jsonl") + lines_of(tmp_path / "out" / "b.jsonl") == lines_of(whole)


def test_what_cannot_be_is_one_sentence(audit: Path, tmp_path: Path) -> None:
    data = audit.parent / "train.jsonl"
    before = data.read_bytes()
    for given, message in (
        (["--out", tmp_path / "a.jsonl"], "expected one of --drop, --below, --relabel, --decisions"),
        (["--drop", "0", "--out", tmp_path / "a.jsonl"], "drop: expected a number of rows up to"),
        (["--drop", "2", "--out", data], "is the data that was audited"),
        (["--drop", "2", "--out", tmp_path / "a.csv"], "expected a .jsonl file"),
        (["--below", "1.5", "--out", tmp_path / "a.jsonl"], "below: expected a probability"),
    ):
        code, _, err = run("clean", audit, *given)
        assert (code, message in err) == (1, True), err
    assert run("clean", tmp_path, "--drop", 1, "--out", tmp_path / "a.jsonl")[0] == 1
    assert data.read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_counts() -> None:
    assert [count_of("drop", text, 200) for text in ("3", "10%", " 0.5% ", "100%")] == [3, 20, 1, 200]
    for wrong in ("0", "201", "1.5", "x", "-1", "nan", "101%", "0.01%"):
        with pytest.raises(inf.InputError, match="drop: expected"):
            count_of("drop", wrong, 200)


def test_two_rows_of_one_name_are_refused(audit: Path, tmp_path: Path) -> None:
    copy = copied(audit, tmp_path)
    lines = lines_of(audit.parent / "train.jsonl")
    (tmp_path / "train.jsonl").write_text("".join([*lines, lines[0]]))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "train": str(tmp_path / "train.jsonl")}))
    with pytest.raises(inf.InputError, match="two rows have the id 'r00'"):
        _ = Audit(copy).row_of
    (tmp_path / "train.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(inf.InputError, match="no row has the id 'r00'"):
        _ = Audit(copy).row_of


def test_data_that_have_changed_are_refused(audit: Path, tmp_path: Path) -> None:
    """Without names a row is known by its number, which another row may have by now."""
    copy = Path(shutil.copytree(audit, tmp_path / "audit"))
    lines = lines_of(audit.parent / "train.jsonl")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "train": str(tmp_path / "moved.jsonl")}))
    (tmp_path / "moved.jsonl").write_text("".join(lines))
    assert run("clean", copy, "--drop", 1, "--out", tmp_path / "a.jsonl")[0] == 0
    (tmp_path / "moved.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    code, _, err = run("clean", copy, "--drop", 1, "--out", tmp_path / "b.jsonl")
    assert code == 1
    assert "has changed since the audit" in err


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_names_that_look_like_formulas(folder: Path, tmp_path: Path, ending: str) -> None:
    """They stand behind an apostrophe in every CSV that is written, and mean the same rows."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [
        {"id": f"-{i}" if i % 2 else f"=A{i}", "text": row["text"], "label": row["label"]} for i, row in enumerate(rows)
    ]
    source = tmp_path / f"train.{ending}"
    if ending == "csv":
        source.write_text("id,text,label\n" + "".join(f"{r['id']},{r['text']},{r['label']}\n" for r in rows))
    else:
        write_rows(source, rows)
    code, _, err = run("audit", *options(folder, train=source, methods="cosine"), "--out", tmp_path / "audit")
    assert code == 0, err
    worst = min(read_csv(tmp_path / "audit" / "scores.csv"), key=lambda row: int(row["rank"]))["id"]
    assert worst[0] == "'"
    code, _, err = run("clean", tmp_path / "audit", "--drop", 1, "--out", tmp_path / f"a.{ending}")
    assert code == 0, err
    assert lines_of(tmp_path / f"a.{ending}") == [line for line in lines_of(source) if worst[1:] not in line]
    review = f"id,decision\n{worst},keep\n"
    (tmp_path / "review.csv").write_text(review)
    given = ["--drop", 1, "--decisions", tmp_path / "review.csv", "--out", tmp_path / f"b.{ending}"]
    assert run("clean", tmp_path / "audit", *given)[0] == 0
    assert lines_of(tmp_path / f"b.{ending}") == lines_of(source)
