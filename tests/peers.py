"""Other libraries' own tests on our operations: ``python -m tests.peers trak COPY [--stock] [pytest arguments]``.

COPY is a fetched or unpacked copy of the library's repository; the library is installed, or PYTHONPATH leads to it.
``--stock`` runs the same tests without ours. Without a GPU the tests' ``cuda`` is the CPU. The last line is JSON: passed,
failed, skipped, the names of what failed, and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf

# Files of each repository that test what is replaced, and the patches that its tests need.
FILES = {
    "dattri": (("sjlt", "dattri"), ("test/dattri/func/test_proj.py",)),
    "trak": (("fast_jl", "trak"), ("tests/test_rademacher.py", "tests/test_jl.py")),
    "bergson": (
        ("bergson",),
        (
            "tests/test_projection_matrix.py",
            "tests/test_projection_inner_products.py",
            "tests/test_global_projection.py",
        ),
    ),
    "captum": (("captum",), ("tests/influence/_core/test_tracin_*.py", "tests/influence/_core/test_dataloader.py")),
}
_FACTORIES = ("ones", "zeros", "empty", "rand", "randn", "tensor", "arange", "Generator")


class Plugin:
    """Counts outcomes; where there is no GPU, gives tests a CPU under its name."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome].append(report.nodeid)


def on_cpu() -> None:
    """Every way in which these tests name a GPU leads to main memory."""

    def mapped(device: Any) -> Any:
        kind = getattr(device, "type", str(device).split(":")[0])
        return "cpu" if kind == "cuda" else device

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = mapped(kwargs["device"])
            return function(*args, **kwargs)

        return call

    for name in _FACTORIES:
        setattr(torch, name, wrapped(getattr(torch, name)))
    torch.testing.make_tensor = wrapped(torch.testing.make_tensor)
    moved = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: moved(  # type: ignore[method-assign,assignment]
        self,
        *[mapped(a) if isinstance(a, (str, torch.device)) else a for a in args],
        **{k: mapped(v) if k == "device" else v for k, v in kwargs.items()},
    )
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    properties = type("Properties", (), {"multi_processor_count": 108})
    torch.cuda.get_device_properties = lambda *_: properties()  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]


def main(name: str, copy: str, *rest: str) -> int:
    stock = "--stock" in rest
    patches, files = FILES[name]
    if not torch.cuda.is_available():
        on_cpu()
    applied = [] if stock else [inf.patch(patch) for patch in patches]
    plugin = Plugin()
    root = Path(copy)
    # Their folder is called tests as well.
    sys.path.insert(0, str(root))
    sys.modules.pop("tests", None)
    chosen = [str(path) for file in files for path in sorted(root.glob(file))]
    arguments = [*chosen, "-q", "--no-header", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={root}"]
    begin = time.perf_counter()
    code = pytest.main([*arguments, *[a for a in rest if a != "--stock"]], plugins=[plugin])
    seconds = time.perf_counter() - begin
    counts = {outcome: len(names) for outcome, names in plugin.outcomes.items()}
    places = [place for patch in applied for place in patch.places]
    failed = plugin.outcomes["failed"]
    print(
        json.dumps(
            {"peer": name, "stock": stock, **counts, "names": failed, "seconds": round(seconds, 1), "places": places}
        )
    )
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
