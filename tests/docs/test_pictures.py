"""The pictures of the manual are drawn by their script, and shown with a text for who cannot see them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "pictures.py"))


def test_every_picture_is_shown_once_with_a_text() -> None:
    shown = re.findall(r"!\[(.*)\]\(pictures/(\w+)\.svg\)", (DOCS / "concepts.md").read_text(encoding="utf-8"))
    assert sorted(name for _, name in shown) == sorted(SCRIPT["PICTURES"])
    assert all(len(text) > 40 for text, _ in shown)
    assert sorted(path.stem for path in (DOCS / "pictures").iterdir()) == sorted(SCRIPT["PICTURES"])


@pytest.mark.parametrize("name", ["sign", "cancellation"])
def test_a_picture_is_as_the_script_draws_it(name: str) -> None:
    # All of them: python docs/pictures.py --check.
    text = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert SCRIPT["alike"](text, SCRIPT["draw"](name))


def test_a_picture_that_differs_is_noticed() -> None:
    alike, text = SCRIPT["alike"], (DOCS / "pictures" / "sign.svg").read_text(encoding="utf-8")
    place = re.search(r'<use [^>]*x="(\d+\.\d+)"', text)
    assert place is not None
    moved = [text[: place.start(1)] + f"{float(place[1]) + by:.2f}" + text[place.end(1) :] for by in (0.04, 3)]
    assert alike(text, moved[0])
    assert not alike(text, moved[1])
    assert not alike(text, text.replace("influence", "effluence"))


def test_pictures_are_read_in_the_dark_and_without_the_network() -> None:
    for path in (DOCS / "pictures").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "prefers-color-scheme:dark" in text
        assert "currentColor" in text
        assert SCRIPT["INK"] not in text
        assert 'href="http' not in text
