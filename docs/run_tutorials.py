"""Runs the tutorials as a reader would, block by block in one empty folder, and holds what they print against the pages.

    python docs/run_tutorials.py            # exit with 1 where a block fails or prints something else
    python docs/run_tutorials.py --write    # put what they print into the pages

A block ``sh`` or ``python`` is run; a block ``text`` right after it is what it printed. Arithmetic differs a little between
machines, and with it numbers and which rows of a table come first, so neither is compared.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TUTORIALS = HERE / "tutorials"
BLOCK = re.compile(r"```(sh|python)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)


def run(kind: str, code: str, folder: Path) -> str:
    """What one block prints; exits with its error where it fails."""
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    # This tree's command, whichever copy is installed.
    tool = tools / "influence-fast"
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m influence_fast "$@"\n')
    tool.chmod(0o755)
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    given = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    offline = {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **given, **offline}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{code}\n{done.stdout}{done.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def alike(one: str, other: str) -> bool:
    """Whether texts are the same but for numbers, rows of tables and the width of columns."""
    left, right = (re.sub(r"^│.*$|-?\d+(\.\d+)?(e-?\d+)?|[\s━─┴]+", "", text, flags=re.M) for text in (one, other))
    return left == right


def main() -> None:
    write = "--write" in sys.argv[1:]
    stale = []
    with tempfile.TemporaryDirectory() as folder:
        # One folder for all, by name: a later page may use what an earlier one made.
        for page in sorted(TUTORIALS.glob("*.md")):
            begin, text = time.perf_counter(), page.read_text(encoding="utf-8")

            def replaced(match: re.Match[str], page: Path = page) -> str:
                kind, code, shown = match.groups()
                printed = run(kind, code, Path(folder))
                if not alike(printed, shown or ""):
                    stale.append(f"{page.name}: {code.splitlines()[0]}")
                block = f"```{kind}\n{code}```\n"
                return block + (f"\n```text\n{printed}```\n" if printed else "")

            made = BLOCK.sub(replaced, text)
            if write:
                page.write_text(made, encoding="utf-8")
            print(f"{page.name}: {time.perf_counter() - begin:.0f} s")
    if stale and not write:
        sys.exit("prints something else than the page (python docs/run_tutorials.py --write):\n" + "\n".join(stale))


if __name__ == "__main__":
    main()
