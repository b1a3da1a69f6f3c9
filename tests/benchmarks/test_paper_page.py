"""The page of the paper's claims is that of the kept runs."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from benchmarks import paper_page


def test_the_committed_page_is_made_from_the_committed_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(paper_page.main, ["--out", str(tmp_path / "page.md")], catch_exceptions=False)
    assert "wrote" in result.output
    made, committed = (tmp_path / "page.md").read_text(), Path("docs/paper.md").read_text()
    figure = re.compile(r"-?\d+\.\d+")
    assert figure.sub("#", made) == figure.sub("#", committed)
    assert "nan" not in made
    # The paper's claims and those of ours stand apart.
    of_paper, of_default = (part for part in made.split("## ")[2:4])
    assert [of_paper.count(whose) for whose in ("| Paper: ", "| Ours: ")] == [6, 0]
    assert [of_default.count(whose) for whose in ("| Paper: ", "| Ours: ")] == [0, 5]
