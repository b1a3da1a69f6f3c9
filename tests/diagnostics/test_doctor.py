"""What doctor finds."""

from __future__ import annotations

import json
from pathlib import Path

from audits import run


def test_doctor() -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["backends"]["cpu"]["rank"]["takes"] in ("cpu", "reference")
    assert run("doctor")[0] == 0


def test_doctor_verifies_capture_on_a_model(folder: Path) -> None:
    given = ["--model", folder / "adapter", "--data", folder / "train.jsonl"]
    code, out, err = run("doctor", *given, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["ok"]
    assert not found["one_row"]
    assert any("lora_A" in name for name in found["errors"])
    assert max(found["errors"].values()) <= found["tolerance"]
    code, out, _ = run("doctor", *given)
    assert code == 0
    assert "hooks" in out
    assert run("doctor", "--model", folder / "adapter")[0] == 2
