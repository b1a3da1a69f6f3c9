"""Every page of the manual is in its contents, and the blocks of its tutorials can be run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.S)


def test_the_contents_list_every_page_once() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_links_between_pages_lead_somewhere() -> None:
    gone = [
        (page.name, link)
        for page in DOCS.rglob("*.md")
        for link in re.findall(r"\]\(([^)#:]+\.md)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert gone == []


def test_tutorials_have_blocks_that_parse() -> None:
    for page in (DOCS / "tutorials").glob("*.md"):
        blocks = BLOCK.findall(page.read_text())
        assert {kind for kind, _ in blocks} == {"sh", "python", "text"}
        for kind, code in blocks:
            if kind == "python":
                ast.parse(code)
