"""Scores of other libraries on the models of ``benchmarks.lds``, for its ``--others``.

Each by its own API on the rows, queries, layers and checkpoints that our methods get: kronfluence's EK-FAC, TRAK by traker
and by dattri, dattri's DataInf and EK-FAC, bergson's TrackStar; those of them that are installed and can run the model::

    python -m benchmarks.lds_peers --task digits --out digits-peers.safetensors
    python -m benchmarks.lds --task digits --others digits-peers.safetensors

``models.pt`` has to be in ``--work``, where ``benchmarks.lds`` leaves it. What a library cannot run is said with its error,
here and in the results.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks import lds, peer_definitions, protocol
from influence_fast.data.batching import collate

IGNORED, BATCH = -100, 20
Scores = dict[str, Tensor]
Columns = dict[str, Tensor]
Method = Callable[["Checkpoints", Path], Scores]


@dataclass(frozen=True)
class Checkpoints:
    """Models of one task in evaluation mode, with rows and queries as tensors of one length each."""

    task: lds.Task
    models: list[nn.Module]
    layers: list[str]
    rows: Columns
    queries: Columns

    @property
    def linear(self) -> list[nn.Module]:
        """The models with linear layers where theirs are ``Conv1D``, which most libraries don't know."""
        return [with_linear(model) for model in self.models]

    @property
    def mapped(self) -> Checkpoints:
        """For ``vmap``, through which the masks that transformers makes do not go.

        Pads stand at the right: a causal model does not see them, to others the mask is given as what is added to attention.
        """
        parts = []
        for part in (self.rows, self.queries):
            mask = part.get("attention_mask")
            others = {name: column for name, column in part.items() if name != "attention_mask"}
            if mask is not None and self.task.kind != "causal-lm":
                added = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
                others["attention_mask"] = added.expand(-1, 1, mask.shape[1], -1)
            parts.append(others)
        return replace(self, rows=parts[0], queries=parts[1])

    @property
    def parameters(self) -> list[str]:
        """Of the layers, biases too, in the model's order."""
        owned = [name for name, _ in self.models[0].named_parameters()]
        return [name for name in owned if name.rpartition(".")[0] in self.layers]


@click.command()
@click.option("--task", type=click.Choice(list(lds.TASKS)), required=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets (gpt, mrpc).")
@click.option("--model", help="Folder of the pretrained encoder (mrpc).")
@click.option("--samples", type=int, help="As given to benchmarks.lds.")
@click.option("--query-samples", type=int, help="As given to benchmarks.lds.")
@click.option("--epochs", type=int, help="As given to benchmarks.lds.")
@click.option("--only", help="Some of the libraries, by comma.")
@click.option("--seconds", default=math.inf, help="Begin nothing after that; run again to add it.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("lds-runs"), help="As given to benchmarks.lds.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File for --others of benchmarks.lds; an earlier one is replaced.",
)
def main(task: str, work: Path, out: Path, only: str | None, seconds: float, **settings: Any) -> None:
    """Score the rows of one task by every library that is installed."""
    from safetensors.torch import save_file

    if not (work / task / "models.pt").exists():
        raise click.UsageError(f"{work / task}: there is no models.pt; run benchmarks.lds first.")
    unknown = set(only.split(",") if only else ()) - set(PEERS)
    if unknown:
        raise click.UsageError(f"--only: {', '.join(sorted(unknown))} given; expected some of {', '.join(PEERS)}.")
    chosen = only.split(",") if only else [name for name in PEERS if importlib.util.find_spec(MODULES[name])]
    kept = protocol.load(work / task / "models.pt")
    found: Scores = {}
    not_run: dict[str, str] = {}
    begin = time.monotonic()
    with protocol.Progress() as progress:
        for name in chosen:
            for where, places in lds.checkpoints_of(kept).items():
                weights = [(seed, kept[seed][place]) for seed, place in places]
                make = lambda w=weights, n=name: scored(lds.TASKS[task](settings), w, n)  # noqa: E731
                file = work / task / f"peer-{name}-{where}.pt"
                if not file.exists() and time.monotonic() - begin >= seconds:
                    not_run[f"{name}, {where}"] = "left out for want of time"
                    continue
                with progress.step(f"{name}, {where}"):
                    result = protocol.kept(file, make)
                not_run |= result["errors"]
                found |= {f"{method}, {where}": scores for method, scores in result["scores"].items()}
    for method, error in not_run.items():
        click.echo(f"{method}: {error}", err=True)
    versions = {name: importlib.metadata.version(name) for name in chosen}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, out, {"versions": json.dumps(versions), "not_run": json.dumps(not_run)})
    click.echo(f"wrote {out}")


def scored(task: lds.Task, weights: list[tuple[int, lds.Weights]], name: str) -> dict[str, Any]:
    """``scores`` by method of one library, and the ``errors`` of those that did not run."""
    models = [lds.model_at(task, seed, part) for seed, part in weights]
    rows, queries = (dict(collate(part, models[0])) for part in (task.rows, task.queries))
    if task.kind == "classification" and not takes_mask(models[0]):
        rows, queries = ({k: v for k, v in part.items() if k != "attention_mask"} for part in (rows, queries))
    checkpoints = Checkpoints(task, models, lds.layers_of(task, models[0]), rows, queries)
    out: dict[str, Any] = {"scores": {}, "errors": {}}
    for method, score in PEERS[name].items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                with peer_definitions.quiet():
                    found = score(checkpoints, Path(folder))
            except Exception as error:
                out["errors"][method] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
        for setting, scores in found.items():
            full = f"{method}{setting and f' ({setting})'}"
            if scores.isfinite().all():
                out["scores"][full] = scores.detach().float().contiguous()
            else:
                out["errors"][full] = "scores that are not finite"
    return out


def takes_mask(model: nn.Module) -> bool:
    """Rows of pixels are no tokens."""
    return not isinstance(model, lds.Digits)


def with_linear(model: nn.Module) -> nn.Module:
    """A copy with ``nn.Linear`` for each ``Conv1D`` of transformers: the same function, weights transposed."""
    from transformers.pytorch_utils import Conv1D

    out = copy.deepcopy(model)
    for name, module in list(out.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            with torch.no_grad():
                linear.weight.copy_(module.weight.T)
                linear.bias.copy_(module.bias)
            out.set_submodule(name, linear)
    config: Any = getattr(out, "config", None)
    if config is not None:
        config.pad_token_id = None  # Else GPT-2 looks for pads to warn of, which does not go through vmap.
    return out.eval()


def parts_of(columns: Columns) -> Iterator[Columns]:
    for begin in range(0, len(columns["labels"]), BATCH):
        yield {name: column[begin : begin + BATCH] for name, column in columns.items()}


def answers(kind: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(N, T, C)`` of each target, its label, and 1.0 where there is one; a class is one target."""
    if kind == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        logits, labels = logits[:, None], labels[:, None]
    return logits, labels.clamp_min(0), (labels != IGNORED).to(logits.dtype)


def losses(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row ``(N,)``, the mean over its targets: our ``classification`` and ``causal-lm``."""
    found, targets, there = answers(kind, logits, labels)
    each = nn.functional.cross_entropy(found.transpose(1, 2), targets, reduction="none")
    return (each * there).sum(1) / there.sum(1)


def margins(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """TRAK's model output ``log(p / (1 - p))`` of each row ``(N,)``, the mean over its targets."""
    found, targets, there = answers(kind, logits, labels)
    right = targets[..., None] == torch.arange(found.shape[-1])  # One_hot does not go through vmap.
    each = found.gather(2, targets[..., None])[..., 0] - found.masked_fill(right, -torch.inf).logsumexp(2)
    return (each * there).sum(1) / there.sum(1)


def chances(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What the model gives each row's targets ``(N,)``, the mean over them."""
    found, targets, there = answers(kind, logits, labels)
    each = found.softmax(2).gather(2, targets[..., None])[..., 0]
    return (each * there).sum(1) / there.sum(1)


def logits_of(model: nn.Module, columns: Columns, weights: Any = None) -> Tensor:
    """By the model's own weights, or by functional ones."""
    given = {name: column for name, column in columns.items() if name != "labels"}
    out = model(**given) if weights is None else torch.func.functional_call(model, weights, (), given)
    return out.logits


def averaged(score: Callable[[Checkpoints, nn.Module, Path], Scores]) -> Method:
    """Of a library that takes one model at a time: the mean over models."""

    def over_models(checkpoints: Checkpoints, folder: Path) -> Scores:
        each = [score(checkpoints, model, folder / str(place)) for place, model in enumerate(checkpoints.models)]
        return {setting: torch.stack([scores[setting] for scores in each]).mean(0) for setting in each[0]}

    return over_models


class TensorRows(torch.utils.data.Dataset):
    """Columns as the rows that kronfluence reads."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["labels"])

    def __getitem__(self, place: int) -> Columns:
        return {name: column[place] for name, column in self._columns.items()}


def kronfluence(dampings: dict[str, float | None], sampled: bool = True) -> Method:
    """EK-FAC of the layers, weights and biases; a damping of ``None`` is its 0.1 of the mean eigenvalue."""

    @averaged
    def score(checkpoints: Checkpoints, model: nn.Module, folder: Path) -> Scores:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        kind = checkpoints.task.kind

        class Rule(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                logits, labels = logits_of(model, batch), batch["labels"]
                if sample:
                    found, _, there = answers(kind, logits.detach(), labels)
                    drawn = torch.distributions.Categorical(logits=found).sample()
                    drawn = drawn.masked_fill(there == 0, IGNORED)
                    labels = (
                        drawn[:, 0] if kind == "classification" else nn.functional.pad(drawn, (1, 0), value=IGNORED)
                    )
                return losses(kind, logits, labels).sum()

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return checkpoints.layers

            def get_attention_mask(self, batch: Any) -> Tensor | None:
                return batch.get("attention_mask")

        rule = Rule()
        prepared = prepare_model(with_linear(model), rule)
        analyzer = Analyzer("x", prepared, rule, cpu=True, disable_tqdm=True, output_dir=str(folder))
        rows, queries = TensorRows(checkpoints.rows), TensorRows(checkpoints.queries)
        torch.manual_seed(0)
        arguments = FactorArguments(use_empirical_fisher=not sampled)
        analyzer.fit_all_factors("factors", rows, per_device_batch_size=BATCH, factor_args=arguments)
        out = {}
        for place, (setting, damping) in enumerate(dampings.items()):
            analyzer.compute_pairwise_scores(
                f"scores{place}", "factors", queries, rows, per_device_query_batch_size=BATCH,
                per_device_train_batch_size=BATCH, score_args=ScoreArguments(damping_factor=damping),
            )  # fmt: skip
            out[setting] = analyzer.load_pairwise_scores(f"scores{place}")["all_modules"]
        return out

    return score


def traker(proj_dim: int, penalty: float = 0.0) -> Method:
    """TRAK of the layers' parameters, each model by a projection of its own, in float32."""

    def score(checkpoints: Checkpoints, folder: Path) -> Scores:
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput
        from trak.projectors import BasicProjector, ProjectionType

        checkpoints = checkpoints.mapped
        names, kind = list(checkpoints.rows), checkpoints.task.kind

        class Output(AbstractModelOutput):
            def __init__(self) -> None:
                pass

            @staticmethod
            def get_output(model: nn.Module, weights: Any, buffers: Any, *row: Tensor) -> Tensor:
                batch = {name: column[None] for name, column in zip(names, row, strict=True)}
                return margins(kind, logits_of(model, batch, (weights, buffers)), batch["labels"])[0]

            def get_out_to_loss_grad(
                self, model: nn.Module, weights: Any, buffers: Any, batch: Iterable[Tensor]
            ) -> Tensor:
                columns = dict(zip(names, batch, strict=True))
                logits = logits_of(model, columns, (weights, buffers))
                return (1 - chances(kind, logits, columns["labels"])).detach()[:, None]

        models = checkpoints.linear
        width = sum(models[0].get_parameter(name).numel() for name in checkpoints.parameters)
        # Of a single block it forgets the matrix between rows and queries.
        block = min(64, proj_dim // 2)
        projector = BasicProjector(
            grad_dim=width,
            proj_dim=proj_dim,
            seed=0,
            proj_type=ProjectionType.normal,
            device="cpu",
            block_size=block,
        )
        library = TRAKer(
            model=copy.deepcopy(models[0]), task=Output(), train_set_size=len(checkpoints.rows["labels"]), device="cpu",
            save_dir=str(folder), projector=projector, proj_dim=proj_dim, use_half_precision=False,
            grad_wrt=checkpoints.parameters, lambda_reg=penalty,
        )  # fmt: skip
        for place, model in enumerate(models):
            library.load_checkpoint(model.state_dict(), model_id=place)
            for part in parts_of(checkpoints.rows):
                library.featurize(batch=tuple(part.values()), num_samples=len(part["labels"]))
        library.finalize_features()
        for place, model in enumerate(models):
            library.start_scoring_checkpoint("all", model.state_dict(), place, len(checkpoints.queries["labels"]))
            for part in parts_of(checkpoints.queries):
                library.score(batch=tuple(part.values()), num_samples=len(part["labels"]))
        return {"": torch.tensor(library.finalize_scores("all")).T}

    return score


def loaders(checkpoints: Checkpoints, batch: int = BATCH) -> list[Any]:
    """Rows, ``batch`` at a time, and queries as dattri reads them."""
    parts = ((checkpoints.rows, batch), (checkpoints.queries, BATCH))
    return [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*c.values()), batch_size=size) for c, size in parts
    ]


def dattri_task(checkpoints: Checkpoints, models: list[nn.Module], of_rows: Callable[..., Tensor], one: bool) -> Any:
    """``of_rows`` (losses or margins) as dattri's task; ``one`` takes a row, else a batch."""
    from dattri.task import AttributionTask

    model = copy.deepcopy(models[0])
    return AttributionTask(
        dattri_function(checkpoints, model, of_rows, one), model, [part.state_dict() for part in models]
    )


def dattri_function(checkpoints: Checkpoints, model: nn.Module, of_rows: Callable[..., Tensor], one: bool) -> Any:
    names, kind = list(checkpoints.rows), checkpoints.task.kind

    def function(parameters: Any, data: tuple[Tensor, ...]) -> Tensor:
        columns = {name: column[None] if one else column for name, column in zip(names, data, strict=True)}
        return of_rows(kind, logits_of(model, columns, parameters), columns["labels"]).mean()

    return function


def dattri_trak(proj_dim: int, penalty: float = 0.0) -> Method:
    """TRAK of the layers' parameters."""

    def score(checkpoints: Checkpoints, folder: Path) -> Scores:
        from dattri.algorithm.trak import TRAKAttributor

        checkpoints, models = checkpoints.mapped, checkpoints.linear
        task = dattri_task(checkpoints, models, margins, one=True)
        attributor = TRAKAttributor(
            task, dattri_function(checkpoints, task.model, chances, one=True), {"proj_dim": proj_dim, "device": "cpu"},
            checkpoints.parameters, regularization=penalty,
        )  # fmt: skip
        rows, queries = loaders(checkpoints)
        with torch.no_grad():
            attributor.cache(rows)
            return {"": attributor.attribute(queries).T}

    return score


def dattri_datainf(penalty: float) -> Method:
    """DataInf of the layers' parameters."""

    def score(checkpoints: Checkpoints, folder: Path) -> Scores:
        from dattri.algorithm.influence_function import IFAttributorDataInf

        checkpoints = checkpoints.mapped
        task = dattri_task(checkpoints, checkpoints.linear, losses, one=False)
        attributor = IFAttributorDataInf(task, checkpoints.parameters, regularization=penalty)
        # It transforms all queries anew for each batch of rows.
        rows, queries = loaders(checkpoints, len(checkpoints.rows["labels"]))
        with torch.no_grad():
            attributor.cache(rows)
            return {"": attributor.attribute(rows, queries).T}

    return score


def dattri_ekfac(damping: float) -> Method:
    """EK-FAC of the layers, weights and biases, of the given labels."""

    @averaged
    def score(checkpoints: Checkpoints, model: nn.Module, folder: Path) -> Scores:
        from dattri.algorithm.influence_function import IFAttributorEKFAC

        task = dattri_task(checkpoints, [with_linear(model)], losses, one=False)
        attributor = IFAttributorEKFAC(task, checkpoints.layers, damping=damping)
        rows, queries = loaders(checkpoints)
        attributor.cache(rows)
        with torch.no_grad():
            return {"": attributor.attribute(rows, queries).T}

    return score


def bergson(projection: int) -> Method:
    """TrackStar of the layers' weights, projected on both sides to ``projection`` numbers as its command does."""

    @averaged
    def score(checkpoints: Checkpoints, model: nn.Module, folder: Path) -> Scores:
        task = checkpoints.task
        if task.kind != "causal-lm":
            raise ValueError("it takes the loss of next tokens only")
        given = peer_definitions.Task(model, task.rows, task.queries, [], checkpoints.layers, None)
        sums = peer_definitions.Bergson(given, folder / "sums", reduction="sum", projection=projection)
        means = peer_definitions.Bergson(given, folder / "means", reduction="mean", projection=projection)
        sums.mix()
        return {
            "": sums.scores(sums.mixed, unit=False),
            "unit length": sums.scores(sums.mixed, unit=True),
            "unit length, mean loss, Gram matrix of the rows": means.scores(means.index, unit=True),
        }

    return score


# A library's defaults come first; settings after them were tried with the scores in view.
PEERS: dict[str, dict[str, Method]] = {
    "kronfluence": {
        "kronfluence EK-FAC": kronfluence({"": 1e-8, "heuristic damping": None}),
        "kronfluence EK-FAC of given labels": kronfluence({"heuristic damping": None}, sampled=False),
    },
    "bergson": {"bergson trackstar": bergson(16)},
    "traker": {
        "traker (2048 dimensions)": traker(2048),
        "traker (512 dimensions)": traker(512),
        "traker (128 dimensions)": traker(128),
        "traker (512 dimensions, penalty)": traker(512, 0.1),
    },
    "dattri": {
        "dattri TRAK (512 dimensions)": dattri_trak(512),
        "dattri TRAK (128 dimensions)": dattri_trak(128),
        "dattri DataInf (0.01)": dattri_datainf(0.01),
        "dattri DataInf (0.1)": dattri_datainf(0.1),
        "dattri EK-FAC": dattri_ekfac(0.0),
        "dattri EK-FAC (damping 0.01)": dattri_ekfac(0.01),
    },
}
MODULES = {"kronfluence": "kronfluence", "traker": "trak", "dattri": "dattri", "bergson": "bergson"}

if __name__ == "__main__":
    main()
