"""``verify``, ``upgrade`` and ``--no-verify`` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from audits import run
from stores import append, gradients, write_store

import influence_fast as inf
from influence_fast.gradients.store_records import verifying

FIXTURES = Path(__file__).parent.parent / "fixtures" / "store-0.1" / "float32"


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 2
    path.write_bytes(raw)


def test_verify_names_all_that_is_damaged(tmp_path: Path) -> None:
    store = write_store(tmp_path / "all" / "store", gradients(40, 0), ids=[f"r{i}" for i in range(40)], shard_rows=15)
    inf.InfluenceIndex.build(store, path=tmp_path / "all" / "index")
    code, out, _ = run("verify", tmp_path / "all")
    assert code == 0
    assert sorted(line.split(": ")[1] for line in out.splitlines()) == ["index, whole", "store, whole"]
    for name in (
        "store/shard-00000.safetensors",
        "store/shard-00002.safetensors",
        "store/ids.bin",
        "index/scan-00000.bin",
    ):
        flip(tmp_path / "all" / name, -20)
    code, out, _ = run("verify", tmp_path / "all" / "store", tmp_path / "all" / "index", "--json")
    assert code == 1
    damage = {entry["kind"]: entry["damage"] for entry in json.loads(out)}
    assert len(damage["store"]) == 3
    for line, name, rows in zip(
        damage["store"], ("00000", "00002", "ids.bin"), ("0 to 14", "30 to 39", ""), strict=True
    ):
        assert name in line
        assert rows in line
    assert "scan-00000.bin" in damage["index"][0]
    code, _, err = run("verify", tmp_path / "nothing")
    assert (code, "holds no store, index or checkpoint" in err) == (1, True)


def test_upgrade(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "train", tmp_path / "store")
    code, out, _ = run("upgrade", tmp_path / "store")
    assert (code, out) == (0, f"{tmp_path / 'store'}: rewritten\n")
    assert run("verify", tmp_path / "store")[0] == 0
    code, _, err = run("upgrade", tmp_path / "store")
    assert (code, "of version 2 already" in err) == (1, True)


def test_reading_is_checked_unless_asked_not_to(tmp_path: Path) -> None:
    for name, rows in (("train", 12), ("queries", 3)):
        write_store(tmp_path / name, gradients(rows, rows))
    arguments = ["score", "--train", tmp_path / "train", "--queries", tmp_path / "queries", "--out", tmp_path / "s.csv"]
    assert run(*arguments)[0] == 0
    flip(tmp_path / "train" / "shard-00001.safetensors", -40)
    code, _, err = run(*arguments)
    assert code == 1
    assert "train/shard-00001.safetensors: damaged" in err
    assert "queries" not in err
    assert run(*arguments, "--no-verify")[0] == 0
    assert verifying(), "one command's choice does not outlive it"
    (tmp_path / "noisy.csv").write_text("noise\n" + "1\n0\n0\n" * 4)
    evaluate = ["evaluate", tmp_path / "noisy.csv", *arguments[1:5], "--methods", "dot"]
    code, _, err = run(*evaluate)
    assert (code, "train/shard-00001.safetensors: damaged" in err) == (1, True)
    assert run(*evaluate, "--no-verify")[0] == 0


def test_delete_compact_merge_and_update(tmp_path: Path) -> None:
    write_store(tmp_path / "one", gradients(12, 0))
    append(tmp_path / "one", gradients(3, 1), range(12, 15))
    write_store(tmp_path / "two", gradients(5, 2), ids=[f"b,{i}" for i in range(5)])
    assert run("index", tmp_path / "one", "--out", tmp_path / "index")[0] == 0
    code, out, _ = run("delete", tmp_path / "one", "--ids", "3,13", "--json")
    assert (code, json.loads(out)) == (0, {"path": str(tmp_path / "one"), "deleted": 2, "rows": 13})
    (tmp_path / "names").write_text("b,1\nb,3\n", encoding="utf-8")
    code, out, _ = run("delete", tmp_path / "two", "--file", tmp_path / "names")
    assert (code, out) == (0, f"{tmp_path / 'two'}: 2 rows deleted, 3 are left\n")
    assert run("delete", tmp_path / "two")[0] == 2
    code, _, err = run("delete", tmp_path / "one", "--ids", "x")
    assert (code, err) == (1, "error: ids: the rows of this store are numbered, got 'x'\n")
    code, out, _ = run("verify", tmp_path / "one", "--json")
    assert [(entry["kind"], entry["damage"]) for entry in json.loads(out)] == [("store", [])], "segments are no stores"
    code, out, _ = run("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 16)
    code, out, _ = run("compact", tmp_path / "one", "--json")
    assert (code, json.loads(out)) == (0, [{"path": str(tmp_path / "one"), "rows": 13}])
    code, out, err = run("index", tmp_path / "one", "--out", tmp_path / "index", "--update", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 13), err
    assert inf.InfluenceIndex.load(tmp_path / "index").ids == inf.GradientStore.open(tmp_path / "one").ids[:]
