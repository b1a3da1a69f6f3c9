"""``verify``, ``upgrade`` and ``--no-verify`` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from audits import run
from stores import gradients, write_store

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
