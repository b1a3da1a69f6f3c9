"""What the package has for other compilers: header and library, as whoever builds on them meets them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import influence_fast as inf
from influence_fast import _c_library, ops

MANUAL = Path(__file__).parents[1] / "docs" / "dropin.md"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_example_of_the_manual_compiles_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("influence_fast_cpu")
    (code,) = re.findall(r"```c\n(.*?)```", MANUAL.read_text(encoding="utf-8"), re.S)
    (tmp_path / "example.c").write_text(code, encoding="utf-8")
    library = Path(inf.get_library())
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{inf.get_include()}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-o", "example"]
    subprocess.run([str(COMPILER), *flags, "example.c", *link], cwd=tmp_path, check=True)
    printed = subprocess.check_output(["./example"], cwd=tmp_path, text=True)
    right, left = ops.Side("rademacher", 1, 16, 768, scale=0.25), ops.Side("rademacher", 2, 16, 3072, scale=0.25)
    x, dy = torch.ones(8, 32, 768), torch.full((8, 32, 3072), 0.5)
    assert float(printed) == pytest.approx(float(ops.project_outer(x, dy, right, left)[0, 0, 0]))


def test_an_install_without_the_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_c_library, "_PACKAGE", tmp_path)
    with pytest.raises(inf.BackendError, match=r"expected .*libinfluence_fast\.(so|dylib); install the package again"):
        inf.get_library()
