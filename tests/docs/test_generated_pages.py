"""The generated pages say what the code says, and the written ones point to files that are there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import influence_fast as inf
from influence_fast import ops
from influence_fast.attribution.registry import method_names

ROOT = Path(__file__).parents[2]
DOCS = runpy.run_path(str(ROOT / "docs" / "generate.py"))
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_no_page_is_stale() -> None:
    assert DOCS["stale"]() == [], "run python docs/generate.py"


def test_every_public_name_and_method_is_on_the_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    expected = [f"inf.{name}" for name in inf.__all__ if name not in ("ops", "compat", "__version__")]
    expected += [f"inf.ops.{name}" for name in ops.__all__]
    assert [name for name in expected if f"### {name}\n" not in page and f"`{name}`" not in page] == []
    assert [name for name in method_names() if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {DOCS["_anchor"](title) for title in titles}, f"{page.name}: {target}"


def test_a_docstring_becomes_markdown() -> None:
    doc = """One ``line`` of :class:`~influence_fast.Projection`.

Example::

    with a as b:
        b()

Args:
    x: ``(N, T)``,
        float32; dy: the same.
    a, b: both.

Raises:
    InputError: always.

====  =====
name  what
====  =====
a     |g|
      more
====  =====

Behind."""
    expected = """One `line` of `Projection`.

Example:

```python
with a as b:
    b()
```

**Args**

- `x`: `(N, T)`,
  float32; dy: the same.
- `a`, `b`: both.

**Raises**

- `InputError`: always.

| name | what |
| --- | --- |
| a | \\|g\\| more |

Behind."""
    assert DOCS["markdown"](doc) == expected
