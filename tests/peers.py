"""Other libraries' own tests, on stock and on our operations: ``python -m tests.peers [NAME ...]``.

Each library's source distribution is downloaded from the index and unpacked into a temporary folder, whose tests run with
what stands there; ``--copy NAME=FOLDER`` takes a copy that is there already, such as a clone of its repository (captum's
distribution has no tests). What the libraries need is to be installed. Without a GPU the tests' ``cuda`` is the CPU.

``--ours`` leaves stock out, and takes what fails there from the results that are kept; ``--write`` keeps the results in
``benchmarks/results/peer-tests.json``, from which ``docs/dropin.md`` has its table. Exits with 1 where a test fails on ours
that passes on stock. ``--needs`` prints what is to be installed for them, without its own requirements::

    pip install --no-deps $(python -m tests.peers --needs)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peer-tests.json"


@dataclass(frozen=True)
class Peer:
    """A library: its distribution and version, the patches that its tests need, and the files that test what is replaced."""

    distribution: str
    version: str
    patches: tuple[str, ...]
    files: tuple[str, ...]
    marked: str = ""
    """Tests that take part, by pytest's -m; the others need more memory or time than a CPU has."""
    claims_gpu: bool = False
    """Whether its tests are left out unless torch says that there is a GPU."""


PEERS = {
    "bergson": Peer(
        "bergson",
        "2.5.1",
        ("bergson",),
        (
            "tests/test_projection_matrix.py",
            "tests/test_projection_inner_products.py",
            "tests/test_global_projection.py",
        ),
    ),
    "trak": Peer("traker", "0.3.2", ("fast_jl", "trak"), ("tests/test_rademacher.py",)),
    "dattri": Peer(
        "dattri",
        "0.3.0",
        ("sjlt", "dattri"),
        (
            "test/dattri/func/test_proj.py",
            "test/dattri/algorithm/test_*logra*.py",
            "test/dattri/algorithm/test_*factgrass*.py",
            "test/dattri/algorithm/test_dvemb.py",
        ),
        # Among them 64 gradients of 200 million numbers.
        marked="not gpu",
    ),
    "sjlt": Peer("sjlt", "0.1.7", ("sjlt",), ("test/test_sjlt.py",), claims_gpu=True),
    "captum": Peer(
        "captum",
        "0.9.0",
        ("captum",),
        ("tests/influence/_core/test_tracin_*.py", "tests/influence/_core/test_dataloader.py"),
    ),
}
# Not their own requirements, among them torch of other versions.
NEEDS = (
    "assertpy",
    "docstring_parser",
    "jaxtyping",
    "ml_dtypes",
    "parameterized",
    "petname",
    "simple_parsing",
    "wheel",
)
_FACTORIES = ("ones", "zeros", "empty", "eye", "rand", "randn", "randint", "tensor", "arange", "randperm")


class Plugin:
    """Counts outcomes, with the reason of what failed."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}

    def pytest_runtest_setup(self) -> None:
        """Every test draws the same numbers in every run: some hold of most draws alone."""
        import torch

        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures[report.nodeid] = _reason(str(crash.message if crash else report.longrepr))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = _reason(str(report.longrepr))


def _reason(text: str) -> str:
    """What went wrong in one line, without this machine's paths."""
    lines = text.strip().splitlines() or [""]
    told = next((line for line in lines if line.startswith("E ")), lines[0])
    return re.sub(r"/\S*/", "", told.removeprefix("E ").strip())[:160]


def on_cpu(claims_gpu: bool) -> None:
    """Every way in which these tests name a GPU leads to main memory."""
    import torch

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
    original = torch.Generator

    class Generator(original):
        def __new__(cls, device: Any = "cpu") -> Any:
            return original.__new__(original, device=mapped(device))

    torch.Generator = Generator  # type: ignore[misc]
    if claims_gpu:
        torch.cuda.is_available = lambda: True
    torch.testing.make_tensor = wrapped(torch.testing.make_tensor)
    moved, module_moved = torch.Tensor.to, torch.nn.Module.to
    torch.Tensor.to = lambda self, *args, **kwargs: moved(  # type: ignore[method-assign,assignment]
        self,
        *[mapped(a) if isinstance(a, (str, torch.device)) else a for a in args],
        **{k: mapped(v) if k == "device" else v for k, v in kwargs.items()},
    )
    torch.nn.Module.to = lambda self, *args, **kwargs: module_moved(  # type: ignore[method-assign,assignment]
        self, *[mapped(a) if isinstance(a, (str, torch.device)) else a for a in args], **kwargs
    )
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    properties = type("Properties", (), {"multi_processor_count": 108})
    torch.cuda.get_device_properties = lambda *_: properties()  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]


def run_here(name: str, root: Path, stock: bool, rest: list[str]) -> dict[str, Any]:
    """The tests of an unpacked library, in this process, which is theirs afterwards."""
    import pytest
    import torch

    import influence_fast as inf

    if not torch.cuda.is_available():
        on_cpu(PEERS[name].claims_gpu)
    # Their folder is called tests as well, and what is unpacked goes before what is installed.
    sys.path.insert(0, str(root))
    sys.modules.pop("tests", None)
    peer = PEERS[name]
    applied = [] if stock else [inf.patch(patch) for patch in peer.patches]
    plugin = Plugin()
    chosen = [str(path) for file in peer.files for path in sorted(root.glob(file))]
    if not chosen:
        raise SystemExit(f"{name}: {root} has none of {', '.join(peer.files)}; give a copy of the repository by --copy")
    arguments = [*chosen, "-q", "--no-header", "--disable-warnings", "--tb=short", "-p", "no:cacheprovider"]
    arguments += ["-c", os.devnull, f"--rootdir={root}", *rest]
    arguments += ["-m", peer.marked] if peer.marked else []
    begin = time.perf_counter()
    pytest.main(arguments, plugins=[plugin])
    return {
        **plugin.counts,
        "seconds": round(time.perf_counter() - begin, 1),
        "failures": plugin.failures,
        "replaced": [place for patch in applied for place in patch.places],
    }


def unpacked(peer: Peer, folder: Path) -> Path:
    """The source distribution of a library, in a folder."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    subprocess.run([*pip, "-d", str(folder), f"{peer.distribution}=={peer.version}"], check=True)
    [archive] = folder.glob(f"{peer.distribution}-*.tar.gz")
    subprocess.run(["tar", "xzf", str(archive), "-C", str(folder)], check=True)
    [root] = (path for path in folder.glob(f"{peer.distribution}-*") if path.is_dir())
    return root


def run_apart(name: str, root: Path, stock: bool, rest: list[str]) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        flags = ["--stock"] if stock else []
        command = [sys.executable, "-m", "tests.peers", name, "--here", str(root), "--out", str(out), *flags, *rest]
        # Compiled code would hold what the tests' GPU is replaced by.
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # Some of the tests leave files where they run.
        subprocess.run(
            command, cwd=folder, check=True, env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": paths}
        )
        return dict(json.loads(out.read_text(encoding="utf-8")))


def newly_failing(found: dict[str, Any]) -> list[str]:
    """Tests that fail on ours and not on stock."""
    return [name for name in found["ours"]["failures"] if name not in found.get("stock", {}).get("failures", {})]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*PEERS, []], help="libraries; all by default")
    parser.add_argument("--copy", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--ours", action="store_true", help="leave stock out")
    parser.add_argument("--needs", action="store_true", help="print what is to be installed for the tests")
    parser.add_argument("--write", action="store_true", help=f"keep the results in {RESULTS.relative_to(ROOT)}")
    for hidden in ("--here", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.here:
        result = run_here(chosen.names[0], Path(chosen.here), chosen.stock, rest)
        Path(chosen.out).write_text(json.dumps(result), encoding="utf-8")
        return 0
    if chosen.needs:
        print(*NEEDS, f"captum=={PEERS['captum'].version}")
        return 0
    import torch

    copies = dict(text.split("=", 1) for text in chosen.copy)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"peers": {}}
    wrong = []
    for name in chosen.names or PEERS:
        peer = PEERS[name]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(copies[name]).resolve() if name in copies else unpacked(peer, Path(folder))
            ways = {"ours": False} if chosen.ours else {"stock": True, "ours": False}
            found: dict[str, Any] = {"distribution": peer.distribution, "version": peer.version, "files": peer.files}
            found["marked"] = peer.marked
            before = kept["peers"].get(name, {})
            if chosen.ours and "stock" in before and before["version"] == peer.version:
                found["stock"] = before["stock"]
            found |= {way: run_apart(name, root, stock, rest) for way, stock in ways.items()}
        for way in ways:
            told = found[way]
            print(
                f"{name:8} {way:5} {told['passed']} passed, {told['failed']} failed, {told['skipped']} skipped, ",
                end="",
            )
            print(f"{told['seconds']} s")
        for test in newly_failing(found):
            wrong.append(test)
            print(f"  fails on ours alone: {test}: {found['ours']['failures'][test]}")
        kept["peers"][name] = found
        kept |= {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
            "influence_fast": importlib.metadata.version("influence_fast"),
        }
        if chosen.write:
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
