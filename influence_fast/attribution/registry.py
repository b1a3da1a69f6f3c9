"""The one list of methods: what each computes, what it needs, and who makes it.

The command line's choices, the documentation, an audit's checks and the dispatch of ``influence`` all follow from it. A
method of one's own registers the same way and then works in ``influence``, ``audit`` and ``evaluate``::

    def margin(inputs):
        probabilities = inputs.passes.class_log_probabilities(inputs.samples)
        ...
        return {"margin": scores[None]}           # {layer: (queries, samples)}; one row stands for all queries

    inf.register_method(inf.Method("margin", "how sure the model is of the label", margin, needs={"model", "classes"}))

Nothing here loads torch: the makers of the methods that come with the package are named, and imported when they are called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from influence_fast.errors import InputError

# What a method may need beside the gradients of training samples and queries.
NEEDS: Mapping[str, str] = {
    "model": "the model and the rows, not stores alone",
    "classes": "a classifier: a class label for each sample and query",
    "whole gradients": "whole gradients, projection identity",
    "predictions": "the model's class probabilities",
    "hidden states": "the model's hidden states",
    "base states": "hidden states of the model before fine-tuning",
    "checkpoints": "a training that InfluenceCallback recorded, with its checkpoints (--training)",
    "moments": "the optimizer.pt of each of these checkpoints, with Adam's moments",
}

# Folds of the pool's probe, so also the fewest samples of a class that it takes.
PROBE_FOLDS = 5


@dataclass(frozen=True)
class Method:
    """One way to compute influence.

    Attributes:
        name: what users call it by.
        summary: one line for help and documentation.
        make: ``make(inputs)`` gives an influence matrix or ``{layer: (queries, samples)}``, positive = helpful; ``inputs``
            is a :class:`~influence_fast.MethodInputs`. One row stands for all queries.
        needs: of :data:`NEEDS`; checked before anything is computed, and known to the passes over the model beforehand.
        fitted_to_queries: whether it learns from all queries together, so that a half of them takes another fit.

    Raises:
        InputError: a need that is none of :data:`NEEDS`.
    """

    name: str
    summary: str
    make: Callable[[Any], Any]
    needs: Collection[str] = ()
    fitted_to_queries: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))
        unknown = sorted(set(self.needs) - set(NEEDS))
        if unknown:
            raise InputError(f"needs: expected some of {', '.join(NEEDS)}, got {unknown[0]!r}")


@dataclass(frozen=True)
class _Maker:
    """A function of a module of this package, imported when it is called."""

    module: str
    function: str
    arguments: tuple[Any, ...] = ()

    def __call__(self, inputs: Any) -> Any:
        module = importlib.import_module(f"influence_fast.attribution.{self.module}")
        return getattr(module, self.function)(inputs, *self.arguments)


def _products(name: str, summary: str, *needs: str) -> Method:
    return Method(name, summary, _Maker("influence", "make_products", (name,)), needs)


def _contrast(name: str) -> Method:
    summary = f"{name} of a sample as labelled minus as labelled otherwise"
    return Method(f"contrast-{name}", summary, _Maker("label_contrast", "make_contrast", (name,)), ("model", "classes"))


def _fitted(name: str) -> Method:
    summary = f"{name} summed over queries with weights that tell right labels from wrong ones"
    maker = _Maker("query_weighting", "make_fitted", (name,))
    return Method(f"fitted-{name}", summary, maker, ("model", "classes"), fitted_to_queries=True)


_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _products("dot", "inner product of gradients (TracIn)"),
        _products("cosine", "cosine of gradients"),
        _products("datainf", "DataInf's closed form of an influence function"),
        _products("trak", "inner product after whitening (TRAK)"),
        _products("trackstar", "cosine after whitening (TrackStar)"),
        _products("ekfac", "Kronecker-factored curvature with corrected eigenvalues", "model", "whole gradients"),
        *(_contrast(name) for name in ("dot", "cosine", "datainf", "trak", "trackstar")),
        *(_fitted(name) for name in ("cosine", "trackstar")),
        Method(
            "outlier",
            "how far inside the gradients of its class's queries a sample lies (one-class SVM)",
            _Maker("outlier", "make_outlier"),
            ("model", "classes"),
        ),
        Method(
            "repsim",
            "cosine of hidden states, by block",
            _Maker("representations", "make_similarity"),
            ("model", "hidden states"),
        ),
        Method(
            "tracin",
            "inner product summed over a training's checkpoints, by learning rate (TracInCP)",
            _Maker("checkpoints", "make_over_checkpoints", (False,)),
            ("checkpoints",),
        ),
        Method(
            "less",
            "cosine of Adam's update with a query's gradient, over a training's checkpoints (LESS)",
            _Maker("checkpoints", "make_over_checkpoints", (True,)),
            ("checkpoints", "moments"),
        ),
        Method("we", "TracIn on the words that both share", _Maker("shared_words", "make_words"), ("model",)),
        Method(
            "we_topk",
            "the same over the words with the longest gradients",
            _Maker("shared_words", "make_words", (10,)),
            ("model",),
        ),
        Method(
            "neighbours",
            "whether the nearest training samples share the label",
            _Maker("representations", "make_neighbours"),
            ("model", "classes", "base states"),
        ),
        Method(
            "pool",
            "how probable the label is by model, neighbours, a probe and influence, weighed by the queries",
            _Maker("label_quality", "make_pool"),
            ("model", "classes", "predictions", "base states"),
            fitted_to_queries=True,
        ),
    )
}


def register_method(method: Method) -> None:
    """Add a method under its name.

    Raises:
        InputError: the name is taken already.
    """
    if method.name in _METHODS:
        raise InputError(f"method: there is a {method.name!r} already ({_METHODS[method.name].summary})")
    _METHODS[method.name] = method


def unregister_method(name: str) -> None:
    """Take back what :func:`register_method` added, such as at the end of a test."""
    get_method(name)
    del _METHODS[name]


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none; lists those there are.
    """
    if name not in _METHODS:
        raise InputError(f"method: expected one of {', '.join(_METHODS)}, got {name!r}")
    return _METHODS[name]


def method_names(without: Collection[str] = ()) -> list[str]:
    """Names of all methods that need none of ``without``, in their order."""
    return [name for name, method in _METHODS.items() if not set(method.needs) & set(without)]
