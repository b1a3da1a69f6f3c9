"""Influence by the name of a method."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from influence_fast.attribution.gradient_source import Gradients
from influence_fast.attribution.influence_matrix import (
    MEMORY,
    METHODS,
    InfluenceMatrix,
    InnerProductOptions,
    inner_products,
)
from influence_fast.attribution.method_inputs import MethodInputs
from influence_fast.attribution.registry import NEEDS, get_method, method_names
from influence_fast.errors import InputError


def influence(
    train: Gradients,
    queries: Gradients,
    method: str = "dot",
    layers: list[str] | None = None,
    *,
    damping: float | Mapping[str, float] = 0.1,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    memory: int | str = MEMORY,
) -> InfluenceMatrix:
    """Influence of the rows of ``train`` on ``queries``, computed when asked for.

    Args:
        train: a store, or ``{layer: (n, dim)}``.
        queries: a store, or ``{layer: (m, dim)}`` with the same layers and projection.
        method: ``dot``, ``cosine``, ``datainf``, ``trak``, ``trackstar``, ``ekfac`` (``influence_matrix`` defines each), or
            one that was registered and needs gradients alone (:func:`~influence_fast.register_method`).
        layers: some of the layers; all by default.
        damping: share of the curvature's mean eigenvalue that is added to each (all but ``dot`` and ``cosine``): one for all
            layers, or ``{layer: share}``, such as rows held out choose (:func:`~influence_fast.held_out_damping`).
        factors: ``{layer: (E[x x^T], E[dy dy^T])}`` of :func:`~influence_fast.kronecker_factors`, for ``ekfac``.
        memory: what blocks of influence, and aggregating them, may take, in bytes or as text such as ``2GiB``. More means
            fewer passes over the training store. Queries, scores and one block of gradients come on top.

    Raises:
        InputError: unknown method or layer, one that needs more than gradients, shapes that do not fit, gradients that are
            not finite, missing factors, too little memory.
        StoreError: stores of different models or projections.
    """
    options = InnerProductOptions(layers, damping, factors or {}, memory)
    if method in METHODS:
        return inner_products(train, queries, method, options)
    lacking = sorted(need for need in get_method(method).needs if need != "whole gradients")
    if lacking:
        there = ", ".join(dict.fromkeys([*METHODS, *method_names(NEEDS)]))
        raise InputError(
            f"method: {method!r} needs {NEEDS[lacking[0]]}, as an audit has; from gradients alone: {there}"
        )
    return MethodInputs(train, queries, options).influence(method)  # type: ignore[return-value]


def make_products(inputs: MethodInputs, method: str) -> InfluenceMatrix:
    """One of the inner products of ``influence_matrix``; ``ekfac`` takes a pass for its factors where none are given."""
    options = inputs.options
    if method == "ekfac" and not options.factors and inputs.audit is not None:
        layers = list(inputs.train.layers if not isinstance(inputs.train, Mapping) else inputs.train)
        factors = inputs.passes.kronecker_factors(inputs.samples, layers)
        options = InnerProductOptions(options.layers, options.damping, factors, options.memory)
    return inner_products(inputs.train, inputs.queries, method, options)
