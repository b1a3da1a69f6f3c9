"""Shared fixtures: the backends of this machine, one seed per run, outputs that start as NaN."""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: threads of torch would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from backends import BACKENDS, Backend

import influence_fast
from influence_fast.auditing import run
from influence_fast.auditing.findings.evidence import gather

# Whatever is imported stays; looking through it for garbage, again and again, takes a tenth of the suite.
gc.disable()

# The processes that tests start import the package and the helpers that the tests do.
_PATHS = [
    str(Path(influence_fast.__file__).parent.parent),
    str(Path(__file__).parent),
    os.environ.get("PYTHONPATH", ""),
]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

# Inputs are fresh in every run; a failure is repeated with the seed of the report's header.
SEED = int(os.environ.setdefault("INFLUENCE_FAST_TEST_SEED", str(secrets.randbits(32))))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite takes two processes, where pytest-xdist is there and nothing else was said."""
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not (option.usepdb or option.collectonly)
    # Workers run this too.
    if whole and "PYTEST_XDIST_WORKER" not in os.environ and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist = min(2, os.cpu_count() or 1), "worksteal"


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 100)


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_report_header() -> str:
    return f"INFLUENCE_FAST_TEST_SEED={SEED}"


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that do not depend on which other tests run."""
    return torch.Generator().manual_seed((SEED + sum(request.node.nodeid.encode())) % 2**63)


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    """Benchmarks set how many threads there are; the tests behind them would take what is not theirs."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take a third of a small audit, and are looked at in the tests of reports and of the demo."""
    folder = request.path.parent.name
    if folder in ("auditing", "benchmarks", "cli", "findings", "training") and request.path.name != "test_demo.py":
        monkeypatch.setattr("influence_fast.auditing.report.figures._draw", lambda *_: "<svg></svg>")


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with request.param as chosen:
        yield chosen


@pytest.fixture(autouse=True)
def _without_evidence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence on single rows takes half of a small audit, and is looked at in the tests of findings and reports."""
    if request.path.parent.name in ("auditing", "benchmarks", "cli", "training"):
        monkeypatch.setattr(run, "gather", lambda inputs, rows, *rest: gather(inputs, rows[:0], *rest))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``torch.empty`` and ``torch.empty_strided`` is full of NaN, so that an entry nobody wrote is seen."""

    def poisoning(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poison(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = empty(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poison

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter of it, a causal model, and data on disk, made once: no test writes there."""
    import models
    from audits import sentences, tokenizer, write_rows

    path = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    models.make("bert").save_pretrained(path / "model")
    adapted = models.make("bert", lora=True)
    adapted.peft_config["default"].base_model_name_or_path = str(path / "model")
    adapted.save_pretrained(path / "adapter")
    models.make("llama", "causal").save_pretrained(path / "causal")
    for name in ("model", "causal"):
        tokenizer().save_pretrained(path / name)
    write_rows(path / "train.jsonl", sentences(20, 1))
    write_rows(path / "queries.jsonl", sentences(9, 2))
    return path
