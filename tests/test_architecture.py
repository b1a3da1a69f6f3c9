"""The house: imports that run one way, at most ten floors, and no private words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = 10


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "influence_fast").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names} & set(known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= (members & set(known)) or {node.module}
    return out


def test_at_most_ten_floors_and_no_circle() -> None:
    """A module stands on the floor above the highest that it imports. A package's face hands on what it imports."""
    known = modules()
    direct = {name: imports(path, known) for name, path in known.items()}
    faces = {name for name, path in known.items() if path.name == "__init__.py"}
    floors: dict[str, int] = {}

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in floors:
            below = max((floor(other, (*above, name)) for other in direct[name] - {name}), default=0)
            floors[name] = below + (name not in faces)
        return floors[name]

    for name in known:
        floor(name)
    highest = max(floors, key=lambda name: floors[name])
    assert floors[highest] <= FLOORS, f"{highest} stands on floor {floors[highest]}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name
        for name, path in modules().items()
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_text_files_are_opened_with_an_encoding() -> None:
    """Otherwise the locale of the machine decides, and ASCII loses what was computed."""
    silent = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            named = called == "TextIOWrapper" and len(node.args) > 1
            if named or called not in (
                "open",
                "read_text",
                "write_text",
                "TextIOWrapper",
                "NamedTemporaryFile",
                "fdopen",
            ):
                continue
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            binary = called == "open" and any("b" in mode for mode in modes)
            # Ours, and os.open.
            other = isinstance(node.func, ast.Attribute) and called == "open"
            if not binary and not other and "encoding" not in {keyword.arg for keyword in node.keywords}:
                silent.append(f"{name}:{node.lineno}")
    assert silent == []


def test_words_are_those_of_the_field() -> None:
    """A stranger can search for what stands here."""
    private = re.compile(r"\b(rooms?|opinions?|heard|tally|taps?|acting)\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [
            *modules().values(),
            *(ROOT / "benchmarks").glob("*.py"),
            ROOT / "README.md",
            ROOT / "CONTRIBUTING.md",
        ]
        if path.name != "_renamed.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        # The old name of an operation is kept for those who call it.
        if private.search(line.replace("tally", "") if path.parent.name == "ops" else line)
    ]
    assert found == []
