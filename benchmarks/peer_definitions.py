"""``ekfac`` against kronfluence and ``trackstar`` against bergson, term by term: where a name means the same, and where not.

A small Llama with and without biases learns rows of a random grammar, several times from other seeds. Each term is computed
by the other library's own code and by ours on the same rows: first with all settings alike, which has to give the same
numbers, then with one setting changed, which says how much that setting does to the order of the training rows::

    PYTHONPATH=. python -m benchmarks.peer_definitions
    python -m benchmarks.peer_definitions --page docs/quality.md

A library that is not installed is left out, and what an earlier run found of it stays.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from influence_fast.attribution.curvature import LayerCurvature
from influence_fast.data.batching import collate

PEERS = {"kronfluence": "ekfac", "bergson": "trackstar"}
DAMPING, IGNORED = 0.1, -100
Rows = list[dict[str, Any]]
Scores = dict[str, Tensor]


@click.command()
@protocol.out_option("What is in it of a library that is not installed stays; the rest is replaced.")
@click.option("--rows", default=64, show_default=True, help="Training rows.")
@click.option("--queries", default=24, show_default=True)
@click.option("--width", default=16, show_default=True, help="Of the model, of two blocks.")
@click.option("--steps", default=200, show_default=True, help="Steps of Adam.")
@click.option("--seeds", default=3, show_default=True, help="Grammars with a model each.")
@protocol.page_option
@protocol.threads_option
def main(out: Path | None, page: Path | None, threads: int, **settings: Any) -> None:
    """Compare definitions with kronfluence and bergson, whichever are installed."""
    torch.set_num_threads(threads)
    file = protocol.result_file(out or protocol.RESULTS / "peer_definitions.json", "peer_definitions")
    there = protocol.previous(file, "peer_definitions")
    if page is not None:
        protocol.write_section(page, "peer_definitions", tables_of(there))
        click.echo(f"wrote {page}")
        return
    document = {**protocol.header("peer_definitions"), "settings": settings, "peers": dict(there.get("peers", {}))}
    installed = [name for name in PEERS if importlib.util.find_spec(name)]
    with protocol.Results(file, document) as results, protocol.Progress(len(installed) * settings["seeds"]) as progress:
        for name in installed:
            terms = {"kronfluence": of_kronfluence, "bergson": of_bergson}[name]
            found = []
            for seed in range(settings["seeds"]):
                with progress.step(f"{name}, seed {seed}"), quiet():
                    found.append(list(terms(settings, seed)))
            document["peers"][name] = {"version": importlib.metadata.version(name), "terms": over_seeds(found)}
            results.add()
    click.echo(f"wrote {file}")


@contextmanager
def quiet() -> Iterator[None]:
    """Both libraries talk a lot, on stdout too."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, rows that it learned, and queries; ``sampled`` are the rows with labels drawn from the model."""

    model: nn.Module
    rows: Rows
    queries: Rows
    sampled: Rows
    layers: list[str]
    optimizer: torch.optim.Optimizer | None


def make_task(
    settings: Mapping[str, Any], bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Task:
    """Rows of 5 to 12 tokens of a random grammar (each token has three likely followers), and a Llama that learned them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    random = torch.Generator().manual_seed(seed)
    words = 24
    followers = torch.rand(words, words, generator=random).pow(8)

    def row() -> dict[str, Any]:
        ids = [int(torch.randint(words, (), generator=random))]
        for _ in range(int(torch.randint(4, 12, (), generator=random))):
            ids.append(int(followers[ids[-1]].multinomial(1, generator=random)))
        return {"input_ids": ids, "labels": list(ids)}

    rows, queries = ([row() for _ in range(settings[name])] for name in ("rows", "queries"))
    torch.manual_seed(seed)
    width = settings["width"]
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=bias, mlp_bias=bias, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(settings["steps"]):
        chosen = torch.randperm(len(rows), generator=random)[:16].tolist()
        loss = row_losses(model, collate([rows[i] for i in chosen], model)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    # The head is no part of it: bergson leaves it out.
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    return Task(model, rows, queries, draw_labels(model, rows, random), layers, optimizer)


def row_losses(model: nn.Module, batch: Mapping[str, Tensor], reduction: str = "mean") -> Tensor:
    """Cross entropy of each row over its targets, ``(N,)``: our ``causal-lm``, or ``causal-lm-sum``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (targets != IGNORED).sum(1) if reduction == "mean" else losses.sum(1)


def draw_labels(model: nn.Module, rows: Rows, random: torch.Generator) -> Rows:
    """The same inputs, each target drawn from what the model predicts in its place."""
    out = []
    for row in rows:
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].softmax(-1)
        drawn = chances.double().multinomial(1, generator=random)[:, 0].tolist()
        out.append({"input_ids": row["input_ids"], "labels": [IGNORED, *drawn]})
    return out


def of_kronfluence(settings: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """EK-FAC's terms: factors, corrected eigenvalues, damping, labels, biases."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(settings, dtype=torch.float64, seed=seed)
        ours = OurEkfac(task, Path(folder) / "ours")
        given = Kronfluence(task, Path(folder) / "given", sampled=False)
        drawn = Kronfluence(task, Path(folder) / "drawn", sampled=True)
        for theirs, rows, labels in ((given, task.rows, "given labels"), (drawn, task.sampled, "drawn labels")):
            factors = ours.factors(rows)
            inputs, outputs = ({name: pair[side] for name, pair in factors.items()} for side in (0, 1))
            yield alike(f"{labels}: factor of the inputs, `E[x x^T]`", inputs, theirs.factor("activation"))
            yield alike(f"{labels}: factor of the output gradients, `E[dy dy^T]`", outputs, theirs.factor("gradient"))
            yield alike(f"{labels}: corrected eigenvalues", ours.eigenvalues(rows), theirs.eigenvalues())
            text = f"{labels}: scores, damping 0.1 of the mean eigenvalue"
            yield alike(text, ours.scores(rows), theirs.scores(None))
        default = ours.default()
        yield alike("given labels: scores of `influence(..., 'ekfac')`", default, given.scores(None))
        yield apart("damping: theirs 1e-8, ours 0.1 of the mean eigenvalue", default, given.scores(1e-8))
        yield apart("labels of the curvature: theirs drawn from the model, ours given", default, drawn.scores(None))
        yield apart("both: their defaults, ours", default, drawn.scores(1e-8))
        # How far two draws of theirs are apart says how much of this is chance.
        other = dataclasses.replace(
            task, sampled=draw_labels(task.model, task.rows, torch.Generator().manual_seed(seed + 1))
        )
        second = Kronfluence(other, Path(folder) / "second", sampled=True)
        for damping, said in ((None, "0.1 of the mean eigenvalue"), (1e-8, "1e-8")):
            text = f"no setting: two draws of labels, both theirs, damping {said}"
            yield apart(text, second.scores(damping), drawn.scores(damping))
        biased = make_task(settings, bias=True, dtype=torch.float64, seed=seed)
        whole = Kronfluence(biased, Path(folder) / "biased", sampled=False).scores(None)
        default = OurEkfac(biased, Path(folder) / "without").default()
        yield apart("a model with biases: theirs of weights and biases, ours of weights", default, whole)


class OurEkfac:
    """Our EK-FAC of a task, of the rows' own labels or of others."""

    def __init__(self, task: Task, folder: Path) -> None:
        self._task, self._folder = task, folder
        self._stores: dict[int, inf.GradientStore] = {}
        self._factors: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self.train, self.queries = self.store(task.rows), self.store(task.queries)

    def store(self, rows: Rows) -> inf.GradientStore:
        if id(rows) not in self._stores:
            path = self._folder / str(len(self._stores))
            self._stores[id(rows)] = inf.build_store(
                path, self._task.model, rows, self._task.layers, "identity", "causal-lm", progress=False
            )
        return self._stores[id(rows)]

    def factors(self, rows: Rows) -> dict[str, tuple[Tensor, Tensor]]:
        if id(rows) not in self._factors:
            self._factors[id(rows)] = inf.kronecker_factors(self._task.model, rows, self._task.layers, progress=False)
        return self._factors[id(rows)]

    def _curvature(self, name: str, rows: Rows) -> LayerCurvature:
        store, factors = self.store(rows), self.factors(rows)[name]
        dim = store.dims[name]
        return LayerCurvature.made("ekfac", name, dim, dim, DAMPING, lambda: [store.read(name)], factors=factors)

    def eigenvalues(self, rows: Rows) -> Scores:
        found = {name: self._curvature(name, rows) for name in self._task.layers}
        return {name: curvature.tensors["squares"] / curvature.rows for name, curvature in found.items()}

    def scores(self, rows: Rows) -> Scores:
        """Curvature of ``rows``, influence of the task's own on its queries."""
        return {
            name: self._curvature(name, rows).precondition(self.queries.read(name)) @ self.train.read(name).double().T
            for name in self._task.layers
        }

    def default(self) -> Scores:
        factors = self.factors(self._task.rows)
        matrix = inf.influence(self.train, self.queries, "ekfac", factors=factors)
        return {name: matrix.layer(name) for name in self._task.layers}


class Kronfluence:
    """kronfluence's EK-FAC of a task, all in float64; ``sampled`` takes the labels that were drawn."""

    def __init__(self, task: Task, folder: Path, sampled: bool) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task as Base

        class Rule(Base):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                return row_losses(model, {**batch, "labels": batch["drawn" if sample else "labels"]}).sum()

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return task.layers

            def get_attention_mask(self, batch: Any) -> Tensor:
                return batch["attention_mask"]

        rule = Rule()
        double = torch.float64
        arguments = FactorArguments(
            use_empirical_fisher=not sampled, activation_covariance_dtype=double, gradient_covariance_dtype=double,
            per_sample_gradient_dtype=double, lambda_dtype=double,
        )  # fmt: skip
        self._task, self._made = task, 0
        self._analyzer = Analyzer(
            "x",
            prepare_model(copy.deepcopy(task.model), rule),
            rule,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(folder),
        )
        self._rows, self._queries = (
            PaddedRows(task.model, task.rows, task.sampled),
            PaddedRows(task.model, task.queries),
        )
        self._analyzer.fit_all_factors("f", self._rows, per_device_batch_size=16, factor_args=arguments)

    def factor(self, kind: str) -> Scores:
        """``E[x x^T]`` (``activation``) or ``E[dy dy^T]`` (``gradient``)."""
        found = self._analyzer.load_covariance_matrices("f")
        sums, counts = found[f"{kind}_covariance"], found[f"num_{kind}_covariance_processed"]
        return {name: sums[name] / counts[name] for name in self._task.layers}

    def eigenvalues(self) -> Scores:
        found = self._analyzer.load_lambda_matrices("f")
        return {name: found["lambda_matrix"][name] / found["num_lambda_processed"][name] for name in self._task.layers}

    def scores(self, damping: float | None) -> Scores:
        from kronfluence.arguments import ScoreArguments

        double = torch.float64
        arguments = ScoreArguments(
            damping_factor=damping, compute_per_module_scores=True, per_sample_gradient_dtype=double,
            precondition_dtype=double, score_dtype=double,
        )  # fmt: skip
        self._made += 1
        self._analyzer.compute_pairwise_scores(
            f"s{self._made}", "f", self._queries, self._rows, per_device_query_batch_size=8,
            per_device_train_batch_size=16, score_args=arguments,
        )  # fmt: skip
        found = self._analyzer.load_pairwise_scores(f"s{self._made}")
        return {name: found[name] for name in self._task.layers}


class PaddedRows(torch.utils.data.Dataset):
    """Rows as tensors of one length, with the labels that were drawn beside their own."""

    def __init__(self, model: nn.Module, rows: Rows, drawn: Rows | None = None) -> None:
        self._columns = dict(collate(rows, model))
        self._columns["drawn"] = collate(drawn or rows, model)["labels"]

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {name: column[place] for name, column in self._columns.items()}


def of_bergson(settings: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """TrackStar's terms: gradients, Gram matrices, their mixture, lengths, the optimizer's second moments, the loss."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(settings, seed=seed)
        theirs = Bergson(task, Path(folder) / "theirs")
        ours = OurTrackstar(task, Path(folder) / "ours")
        yield alike("gradients of the training rows", ours.train, theirs.train)
        grams = {name: grads.double().T @ grads.double() / len(grads) for name, grads in ours.train.items()}
        yield alike("Gram matrix of the training rows", grams, theirs.gram(theirs.index))
        index = inf.InfluenceIndex.build(ours.stores[0], "Flat")
        found, ids = index.search(ours.stores[1], len(task.rows), method="trackstar")
        places = torch.tensor([[int(name) for name in row] for row in ids])
        searched = torch.zeros(found.shape).scatter_(1, places, found)
        plain, share = theirs.scores(theirs.index), theirs.mix()
        mixed, joint = theirs.scores(theirs.mixed), ours.scores(0.0)
        yield alike("scores of a search by `trackstar`: Gram matrix of the training rows", searched, plain)
        yield {
            **alike("scores: {share} of the Gram matrix from the queries", ours.scores(share), mixed),
            "share": share,
        }
        moments = Bergson(task, Path(folder) / "moments", normalise=True)
        divided = OurTrackstar(task, Path(folder) / "divided", normalise=True)
        normalised = moments.scores(moments.index)
        yield alike("gradients over the root of Adam's second moments", divided.train, moments.train)
        yield alike("scores of such gradients", divided.scores(0.0), normalised)

        default = ours.default()
        text = "unit length: theirs, and our search, of all layers together, `influence` of each layer"
        yield apart(text, default, plain)
        text = "Gram matrix: theirs with {share} of the queries', ours of the training rows"
        yield {**apart(text, joint, mixed), "share": share}
        yield apart("optimizer: theirs, where asked for, over the root of Adam's second moments", joint, normalised)
        sums = Bergson(task, Path(folder) / "sums", reduction="sum")
        yield apart("a row's loss: theirs the sum over tokens, ours the mean", joint, sums.scores(sums.index))
        product = theirs.scores(theirs.index, unit=False)
        yield apart("unit length: theirs only where asked for, ours always (else it is `trak`)", joint, product)
        sums.mix()
        command = sums.scores(sums.mixed, unit=False)
        yield apart("all defaults: their command `trackstar`, our `influence`", default, command)
        paper = Bergson(task, Path(folder) / "paper", normalise=True, reduction="sum")
        paper.mix()
        text = "the paper's settings by bergson (mixed, over second moments, unit length), our `influence`"
        yield apart(text, default, paper.scores(paper.mixed))


class OurTrackstar:
    """Our whitened cosine of a task's whole gradients."""

    def __init__(self, task: Task, folder: Path, normalise: bool = False) -> None:
        self.stores = [
            inf.build_store(folder / name, task.model, part, task.layers, "identity", "causal-lm", progress=False)
            for name, part in (("train", task.rows), ("queries", task.queries))
        ]
        moments = second_moments(task) if normalise else {}
        self.train, self.queries = (
            {
                name: store.read(name) / (moments[name].sqrt() + 1e-8).flatten() if moments else store.read(name)
                for name in task.layers
            }
            for store in self.stores
        )

    def default(self) -> Tensor:
        matrix = inf.influence(self.train, self.queries, "trackstar")
        return torch.stack([matrix.layer(name) for name in matrix.layers]).mean(0)

    def scores(self, share: float) -> Tensor:
        """Unit length of all layers together; ``share`` of the Gram matrix is the queries'."""
        products, lengths = torch.zeros(()), [torch.zeros(()), torch.zeros(())]
        for name, train in self.train.items():
            queries = self.queries[name]
            # The mean over both is the mixture.
            total = len(train) + len(queries)
            blocks = [
                train * ((1 - share) * total / len(train)) ** 0.5,
                queries * (share * total / len(queries)) ** 0.5,
            ]
            curvature = LayerCurvature.made(
                "trak", name, train.shape[1], train.shape[1], DAMPING, partial(iter, blocks)
            )
            products = products + curvature.precondition(queries) @ train.double().T
            lengths = [
                total + curvature.squares_of([part]) for total, part in zip(lengths, (queries, train), strict=True)
            ]
        return products / (lengths[0].sqrt()[:, None] * lengths[1].sqrt())


class Bergson:
    """bergson's TrackStar by what its ``trackstar`` command calls, of whole gradients or of projected ones.

    A projection of k leaves k x k numbers of each layer.
    """

    def __init__(
        self, task: Task, folder: Path, normalise: bool = False, reduction: str = "mean", projection: int | None = None
    ) -> None:
        from bergson.gradients import AdamNormalizer

        prefix = f"{task.model.base_model_prefix}."
        self._task, self._reduction, self._prefix, self._projection = task, reduction, prefix, projection
        self._names = [name.removeprefix(prefix) for name in task.layers]
        moments = second_moments(task) if normalise else {}
        self._normalizers = {name.removeprefix(prefix): AdamNormalizer(value) for name, value in moments.items()}
        self.index, self.of_queries, self.mixed = folder / "train.part", folder / "queries.part", folder / "mixed"
        self.train, self._queries = (
            self._collected(path, rows) for path, rows in ((self.index, task.rows), (self.of_queries, task.queries))
        )

    def _collected(self, path: Path, rows: Rows) -> Scores:
        """Gradients, and the Gram matrix beside them."""
        from bergson import collect_gradients
        from bergson.collector.collector import CollectorComputer
        from bergson.config.config import HessianConfig, IndexConfig
        from bergson.config.config_io import save_run_config
        from bergson.data import column_offsets, load_gradients
        from bergson.gradients import GradientProcessor
        from bergson.hessians.autocorrelation import AutocorrelationCollector
        from datasets import Dataset

        path.mkdir(parents=True)
        run = str(path).removesuffix(".part")
        settings = IndexConfig(run_path=run, loss_reduction=self._reduction, projection_dim=self._projection or 0)
        data = Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])
        batches = [list(range(i, min(i + 16, len(rows)))) for i in range(0, len(rows), 16)]
        names, model = set(self._names), self._task.model
        processor = GradientProcessor(self._normalizers, projection_dim=self._projection)
        collect_gradients(model, data, processor, settings, batches=batches, target_modules=names)
        collector = AutocorrelationCollector(
            model=model.base_model, data=data, path=str(path), processor=processor, target_modules=names
        )
        CollectorComputer(model, data, collector=collector, batches=batches, cfg=settings).run_with_collector_hooks()
        # As its command `hessian` writes, whose module needs further packages.
        kind = {"hessian_cfg": HessianConfig(method="autocorrelation").to_dict()}
        save_run_config(SimpleNamespace(to_dict=lambda: kind), path)
        found = load_gradients(path)
        sizes = {
            name: self._projection**2 if self._projection else weight_of(self._task, self._prefix + name).numel()
            for name in self._names
        }
        return {
            self._prefix + name: torch.from_numpy(found[:, begin:end].copy())
            for name, (begin, end) in column_offsets(sizes).items()
        }

    def gram(self, path: Path) -> Scores:
        from bergson.gradients import GradientProcessor

        return {self._prefix + name: gram for name, gram in GradientProcessor.load(path).hessians.items()}

    def mix(self) -> float:
        """Mix both Gram matrices; the share of the queries' that was found."""
        from bergson.gradients import GradientProcessor
        from bergson.process_grads import mix_autocorrelation_matrices
        from bergson.utils.math import compute_lambda

        # The paper turns down about a thousand of 65 thousand numbers, and so does bergson; the same share of ours.
        components = max(1, sum(grads.shape[1] for grads in self.train.values()) // 65)
        mix_autocorrelation_matrices(self.of_queries, self.index, self.mixed, components)
        sides = [GradientProcessor.load(path).hessians_eigen for path in (self.of_queries, self.index)]
        return compute_lambda(sides[0], sides[1], components)

    def scores(self, gram: Path, unit: bool = True) -> Tensor:
        from bergson.query.attributor import Attributor

        attributor = Attributor(self.index, unit_norm=unit, hessian_path=gram)
        queries = {name.removeprefix(self._prefix): grads.clone() for name, grads in self._queries.items()}
        found, rows = attributor.search(queries, None)
        return torch.zeros_like(found).scatter_(1, rows, found)


def second_moments(task: Task) -> Scores:
    """Adam's running mean of squared gradients, of the layers' weights."""
    assert task.optimizer is not None
    state = task.optimizer.state
    return {name: state[weight_of(task, name)]["exp_avg_sq"].float() for name in task.layers}


def weight_of(task: Task, name: str) -> Tensor:
    return task.model.get_parameter(f"{name}.weight")


def alike(what: str, ours: Scores | Tensor, theirs: Scores | Tensor) -> dict[str, Any]:
    """A term that is the same: the largest relative difference (Frobenius) of any layer."""
    one, other = ({"all": scores} if isinstance(scores, Tensor) else scores for scores in (ours, theirs))
    pairs = [(one[name], other[name]) for name in other]
    away = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
    return {"what": what, "relative_difference": max(away)}


def apart(what: str, ours: Scores | Tensor, theirs: Scores | Tensor) -> dict[str, Any]:
    """A term that is not: how alike the orders of the training rows are, by query and of the mean over queries."""
    from scipy.stats import spearmanr

    one, other = (
        (torch.stack([*scores.values()]).double().sum(0) if isinstance(scores, dict) else scores.double()).numpy()
        for scores in (ours, theirs)
    )
    by_query = [float(spearmanr(a, b).statistic) for a, b in zip(one, other, strict=True)]
    lowest = [set(scores.mean(0).argsort()[: round(0.3 * one.shape[1])].tolist()) for scores in (one, other)]
    return {
        "what": what,
        "spearman": sum(by_query) / len(by_query),
        "least": min(by_query),
        "lowest": len(lowest[0] & lowest[1]) / len(lowest[0]),
    }


def over_seeds(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Terms of several seeds as one list: the largest difference, means and standard deviations of correlations, the worst
    query of all. What each seed gave stays beside them, and goes by its order."""
    out = []
    for terms in zip(*found, strict=True):
        lists = {key: [term[key] for term in terms] for key in terms[0] if key != "what"}
        merged: dict[str, Any] = {"what": terms[0]["what"]}
        for key, values in lists.items():
            if key in ("spearman", "lowest"):
                merged |= {key: statistics.fmean(values), f"{key}_sd": statistics.stdev(values) if values[1:] else 0.0}
            elif key != "share":
                merged[key] = min(values) if key == "least" else max(values)
        out.append({**merged, "seeds": lists})
    return out


def small(value: float) -> str:
    return f"{value:.0e}" if value else "0, to the bit"


def said(term: Mapping[str, Any]) -> str:
    """What a term is, with the shares that the seeds found."""
    shares = [f"{share:.2f}" for share in term["seeds"].get("share", [])]
    return term["what"].replace("{share}", " to ".join(dict.fromkeys([min(shares), max(shares)])) if shares else "")


def tables_of(document: Mapping[str, Any]) -> list[str]:
    """By library: what is the same, and what each difference does."""
    lines: list[str] = []
    for name, method in PEERS.items():
        if name not in document["peers"]:
            continue
        found = document["peers"][name]
        same = [term for term in found["terms"] if "relative_difference" in term]
        differs = [term for term in found["terms"] if "spearman" in term]
        lines += [f"`{method}` and {name} {found['version']}:", ""]
        lines += ["| the same, with settings alike | largest relative difference of a layer |", "|---|---|"]
        lines += [f"| {said(term)} | {small(term['relative_difference'])} |" for term in same]
        lines += ["", "| one setting changed | Spearman, mean over queries | of the worst query | lowest 30 % agree |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {said(term)} | {term['spearman']:.3f} ({term['spearman_sd']:.3f}) | {term['least']:.3f} "
            f"| {term['lowest']:.2f} ({term['lowest_sd']:.2f}) |"
            for term in differs
        ]
        lines.append("")
    return lines[:-1]


if __name__ == "__main__":
    main()
