"""What doctor finds."""

from __future__ import annotations

import json

from audits import run

import influence_fast as inf

IDENTITY = inf.Projection("identity")


def test_doctor() -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["backends"]["cpu"]["rank"]["takes"] in ("cpu", "reference")
    assert run("doctor")[0] == 0
