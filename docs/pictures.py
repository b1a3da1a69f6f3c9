"""Draws the pictures of docs/concepts.md, each from a computation that runs here.

    python docs/pictures.py            # write docs/pictures/*.svg
    python docs/pictures.py --check    # exit with 1 where one is stale

Sixty points of two classes, of which six have the wrong one, and logistic regression, whose gradients, retraining and best
weights are exact. Arithmetic differs a little between machines, so numbers are compared to a tenth of a point.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import influence_fast as inf
from influence_fast.evaluation.cancellation import cancellation
from influence_fast.ops.projections import Projection

FOLDER = Path(__file__).parent / "pictures"
# Of Okabe and Ito's colours for all kinds of sight, those that are seen on white and on black; with each a shape.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7f8a99"
# Stands for the page's own colour of text, which is another one in the dark.
INK = "#010203"
STYLE = "<style>svg{color:#1f2430}@media(prefers-color-scheme:dark){svg{color:#e4e7ee}}</style>"
DECAY, NUMBER = 0.02, re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def points(count: int = 60, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Points with a one behind their two coordinates ``(n, 3)``, their classes -1 and 1, and which of these are wrong."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(count // 2)
    places = torch.randn(count, 2, generator=random, dtype=torch.float64) * 0.8 + classes[:, None] * torch.tensor(
        [1.0, 0.4]
    )
    wrong = torch.zeros(count, dtype=torch.bool)
    wrong[torch.randperm(count, generator=random)[: count // 10]] = True
    return (
        torch.cat([places, torch.ones(count, 1, dtype=torch.float64)], 1),
        torch.where(wrong, -classes, classes),
        wrong,
    )


def losses(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-y * (x @ weights))


def gradients(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Each row's own gradient of its loss: ``(n, 3)``."""
    return -(y * torch.sigmoid(-y * (x @ weights)))[:, None] * x


def fitted(x: Tensor, y: Tensor) -> Tensor:
    """The weights of least mean loss, with a little decay, by Newton's method."""
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(30):
        slope = torch.sigmoid(x @ weights) * torch.sigmoid(-x @ weights)
        curvature = x.T @ (slope[:, None] * x) / len(x) + DECAY * torch.eye(x.shape[1], dtype=torch.float64)
        weights = weights - torch.linalg.solve(curvature, gradients(weights, x, y).mean(0) + DECAY * weights)
    return weights


X, Y, WRONG = points()
BEST = fitted(X, Y)
ASKED, RIGHT, _ = points(12, seed=5)
RIGHT = torch.sign(torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6))


def influence(weights: Tensor, queries: slice = slice(None), method: str = "dot") -> Tensor:
    """Influence of each point on each query ``(m, n)`` by the library."""
    train, asked = gradients(weights, X, Y), gradients(weights, ASKED, RIGHT)[queries]
    return inf.influence({"all": train.float()}, {"all": asked.float()}, method).layer("all").double()


def what_influence_means(figure: Any) -> None:
    axes = figure.subplots()
    found = influence(BEST, slice(1))[0]
    size = 20 + 420 * (found.abs() / found.abs().max()).numpy()
    for chosen, colour, shape, name in ((found > 0, BLUE, "o", "helpful"), (found < 0, ORANGE, "^", "harmful")):
        axes.scatter(
            *X[chosen, :2].T.numpy(), s=size[chosen.numpy()], c=colour, marker=shape, alpha=0.75, lw=0, label=name
        )
    axes.scatter(*X[WRONG, :2].T.numpy(), s=size[WRONG.numpy()] + 140, fc="none", ec=INK, lw=1.4, label="wrong label")
    axes.scatter(*ASKED[:1, :2].T.numpy(), s=260, marker="*", c=INK, label="the query")
    across = np.array([-3.0, 3.5])
    w = BEST.numpy()
    axes.plot(across, -(w[0] * across + w[2]) / w[1], color=GREY, lw=1.5, ls="--", label="the model's border")
    axes.set(xlim=(-3, 3.4), ylim=(-2.8, 3), xticks=[], yticks=[])
    legend = axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=13)
    for handle in legend.legend_handles[:4]:
        handle.set_sizes([90])


def what_the_sign_says(figure: Any) -> None:
    axes = figure.subplots()
    rate, before = 0.5, losses(BEST, ASKED[:1], RIGHT[:1])
    after = torch.cat([losses(BEST - rate * g, ASKED[:1], RIGHT[:1]) for g in gradients(BEST, X, Y)])
    found, change = influence(BEST, slice(1))[0], after - before
    for chosen, colour, shape, name in ((found > 0, BLUE, "o", "helpful"), (found < 0, ORANGE, "^", "harmful")):
        axes.scatter(found[chosen], change[chosen], c=colour, marker=shape, s=60, alpha=0.8, lw=0, label=name)
    reach = torch.stack([found.min(), found.max()])
    axes.plot(reach, -rate * reach, color=GREY, lw=1.5, ls="--", label="-rate x influence")
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set(xlabel="influence of a row on the query", ylabel="change of the query's loss\nby one step on that row")
    axes.locator_params(nbins=5)
    axes.legend(frameon=False, fontsize=14)


def what_projection_keeps(figure: Any) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 1024, generator=random, dtype=torch.float64)
    x, asked = torch.tanh(X @ basis), torch.tanh(ASKED @ basis)
    weights = torch.zeros(1024, dtype=torch.float64)
    train, queries = gradients(weights, x, Y).float(), gradients(weights, asked, RIGHT).float()
    exact = inf.influence({"a": train}, {"a": queries}, "cosine").layer("a").flatten()
    for axes, k in ((left, 16), (right, 256)):
        side = Projection("sjlt", k, 0)
        kept = [inf.ops.sketch(part, side) for part in (train, queries)]
        found = inf.influence({"a": kept[0]}, {"a": kept[1]}, "cosine").layer("a").flatten()
        axes.plot([-1, 1], [-1, 1], color=GREY, lw=1.2, ls="--")
        axes.scatter(exact, found, s=9, c=BLUE, alpha=0.5, lw=0)
        error = float((found - exact).square().mean().sqrt())
        axes.set(title=f"1,024 numbers to {k}\nerror {error:.2f}", xlabel="cosine, whole gradients", aspect="equal")
    left.set_ylabel("cosine, projected")


def how_aggregations_differ(figure: Any) -> None:
    axes = figure.subplots()
    # The two wrong rows that harm most, and six of the others.
    harm = influence(BEST).mean(0)
    rows = torch.cat([WRONG.nonzero()[harm[WRONG].argsort()[:2], 0], (~WRONG).nonzero()[4:50:8, 0]])
    answers = RIGHT[:6].clone()
    answers[5] = -answers[5]
    asked = gradients(BEST, ASKED[:6] * torch.tensor([1, 1, 1, 1, 1, 3.0], dtype=torch.float64)[:, None], answers)
    matrix = inf.influence({"all": gradients(BEST, X, Y)[rows].float()}, {"all": asked.float()}).layer("all")
    scores = {name: inf.aggregate({"all": matrix}, name, fraction=0.25) for name in ("mean", "rank", "vote")}
    places = torch.stack([found.argsort(stable=True).argsort() for found in scores.values()])
    top = float(matrix[:5].abs().max())
    axes.imshow(matrix, cmap="PuOr", vmin=-top, vmax=top, extent=(-0.5, 7.5, 5.5, -0.5), aspect="auto")
    for (i, j), value in np.ndenumerate(matrix.numpy()):
        ink = "#fefefe" if abs(value) > 0.6 * top else "#111111"
        axes.text(j, i, f"{round(float(value), 2) + 0:.2f}", ha="center", va="center", color=ink, fontsize=14)
    for i, row in enumerate(places.tolist()):
        for j, place in enumerate(row):
            weight = "bold" if place < 2 else "normal"
            axes.text(j, 6.4 + i, f"{place + 1}.", ha="center", va="center", fontsize=14, weight=weight)
    names = [f"query {i + 1}" for i in range(5)] + ["odd query", *(f"by {name}" for name in scores)]
    axes.set_yticks([*range(6), 6.4, 7.4, 8.4], names)
    axes.set_xticks(range(8), [f"{'wrong' if WRONG[i] else 'right'}\n{j + 1}" for j, i in enumerate(rows.tolist())])
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", labelsize=13)
    axes.set_ylim(8.9, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def when_gradients_cancel(figure: Any) -> None:
    moments = (("before", torch.zeros_like(BEST)), ("after", BEST))
    for axes, (name, weights) in zip(figure.subplots(1, 2), moments, strict=True):
        arrows = -gradients(weights, X, Y)[:, :2]
        share = cancellation({"weight": arrows.float()})["weight"]
        for colour, chosen, width in ((BLUE, ~WRONG, 0.006), (ORANGE, WRONG, 0.011)):
            u, v = arrows[chosen].T.numpy()
            axes.quiver(
                0 * u, 0 * v, u, v, color=colour, angles="xy", scale_units="xy", scale=1, width=width, alpha=0.8
            )
        u, v = arrows.mean(0).tolist()
        axes.quiver(0, 0, u, v, color=INK, angles="xy", scale_units="xy", scale=1, width=0.02)
        reach = float(arrows.abs().max()) * 1.1
        axes.set(title=f"{name} training\ncancellation {share:.1f}", xlim=(-reach, reach), ylim=(-reach, reach))
        axes.set(xticks=[], yticks=[], aspect="equal")


def when_it_fails(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    kept = 1 - torch.eye(len(X), dtype=torch.float64)
    before = losses(BEST, ASKED, RIGHT).mean()
    exact = torch.stack([losses(fitted(X[each > 0], Y[each > 0]), ASKED, RIGHT).mean() - before for each in kept])
    # The same of a small network, which ends elsewhere from every start.
    found, one = network(torch.ones_like(kept[:1]), seed=0)
    _, others = network(kept, seed=1)
    panels = (
        (left, influence(BEST).mean(0), exact, "logistic regression"),
        (right, found, others - one, "a network anew"),
    )
    for axes, told, true, title in panels:
        places = [each.argsort().argsort().double() for each in (told, true)]
        correlation = float(torch.corrcoef(torch.stack(places))[0, 1])
        axes.scatter(told, true, s=34, c=GREEN, alpha=0.75, lw=0)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.axvline(0, color=GREY, lw=0.8)
        axes.set(title=f"{title}\nrank correlation {correlation:.2f}", xlabel="influence of a row")
        axes.locator_params(nbins=3)
    left.set_ylabel("change of the queries' loss\nwithout the row")


def network(kept: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Networks of 8 hidden units, one for each row of ``kept (c, n)``, that are trained on what it keeps.

    Returns the influence of each point on the queries by the first, and the loss of the queries by each.
    """
    random = torch.Generator().manual_seed(seed)
    shapes = ((len(kept), 3, 8), (len(kept), 8, 1))
    # Each of them from a start of its own.
    weights = [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes]

    def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (torch.tanh(x @ weights[0]) @ weights[1])[..., 0])

    for _ in range(400):
        total = (loss(weights, X, Y) * kept).sum() / len(X)
        moved = zip(weights, torch.autograd.grad(total, weights), strict=True)
        weights = [(w - 0.5 * (g + 0.002 * w)).detach().requires_grad_() for w, g in moved]
    first = [w[:1].detach().requires_grad_() for w in weights]

    def rows(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        each = [torch.autograd.grad(one, first, retain_graph=True) for one in loss(first, x, y)[0]]
        return {"all": torch.stack([torch.cat([g.flatten() for g in one]) for one in each]).float()}

    found = inf.influence(rows(X, Y), rows(ASKED, RIGHT)).layer("all").double().mean(0)
    return found, loss(weights, ASKED, RIGHT).mean(1).detach()


PICTURES: dict[str, tuple[Callable[[Any], None], float]] = {
    "influence": (what_influence_means, 4.6),
    "sign": (what_the_sign_says, 3.9),
    "projection": (what_projection_keeps, 4.4),
    "aggregation": (how_aggregations_differ, 4.2),
    "cancellation": (when_gradients_cancel, 3.5),
    "fails": (when_it_fails, 3.7),
}


def draw(name: str) -> str:
    """One picture as SVG, the same bytes for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    paint, height = PICTURES[name]
    settings: dict[str, Any] = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.size": 15,
        "font.family": "sans-serif",
    }
    settings |= {"figure.facecolor": "none", "axes.facecolor": "none", "axes.titlesize": 15}
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    settings |= dict.fromkeys(inks, INK)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        paint(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"(<svg [^>]*>)", rf"\1{STYLE}", text, count=1)
    # Groups are named for nobody; other names follow from every bit of what they name, so they are numbered.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for number, name in enumerate(re.findall(r' id="([^"]+)"', text)):
        text = re.sub(rf'(?<=[#"]){name}(?=[")])', f"part{number}", text)
    return re.sub(r"(\d\.\d{2})\d+", r"\1", re.sub(r"[ \t]+$", "", text, flags=re.M))


def alike(one: str, other: str) -> bool:
    """Whether two drawings differ by no more than a tenth of a point anywhere."""
    left, right = (NUMBER.findall(text) for text in (one, other))
    if NUMBER.sub("", one) != NUMBER.sub("", other) or len(left) != len(right):
        return False
    return all(abs(float(a) - float(b)) <= 0.1 for a, b in zip(left, right, strict=True))


def stale() -> list[str]:
    """Pictures that are not as this script draws them."""
    files = {name: FOLDER / f"{name}.svg" for name in PICTURES}
    return [name for name, file in files.items() if not file.exists() or not alike(file.read_text(), draw(name))]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        found = stale()
        sys.exit(f"stale: {', '.join(found)} (python docs/pictures.py)" if found else 0)
    FOLDER.mkdir(exist_ok=True)
    for picture in PICTURES:
        (FOLDER / f"{picture}.svg").write_text(draw(picture), encoding="utf-8")
