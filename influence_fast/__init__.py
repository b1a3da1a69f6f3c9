"""influence_fast: which training samples help or harm a language model.

Implements Vitel & Chhabra, "First is Not Really Better Than Last" (arXiv 2511.04715): per-layer influence from
per-sample gradients, aggregated over layers by mean, rank and vote, judged by the Noise Detection Rate.

Names are loaded on first use, so ``import influence_fast`` costs nothing: not even torch is imported.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influence_fast import ops as ops
    from influence_fast.attribution.aggregation import aggregate as aggregate
    from influence_fast.attribution.aggregation import aggregate_many as aggregate_many
    from influence_fast.attribution.influence_matrix import InfluenceMatrix as InfluenceMatrix
    from influence_fast.attribution.influence_matrix import influence as influence
    from influence_fast.attribution.label_quality import neighbour_opinion as neighbour_opinion
    from influence_fast.attribution.label_quality import neighbours as neighbours
    from influence_fast.attribution.label_quality import pooled as pooled
    from influence_fast.attribution.label_quality import probe_opinion as probe_opinion
    from influence_fast.attribution.methods import Checkpoints as Checkpoints
    from influence_fast.attribution.methods import fitted_influence as fitted_influence
    from influence_fast.attribution.methods import label_contrast as label_contrast
    from influence_fast.attribution.methods import outlier as outlier
    from influence_fast.attribution.methods import word_influence as word_influence
    from influence_fast.attribution.model_passes import class_opinion as class_opinion
    from influence_fast.attribution.model_passes import hidden_states as hidden_states
    from influence_fast.attribution.model_passes import kronecker_factors as kronecker_factors
    from influence_fast.attribution.model_passes import word_gradients as word_gradients
    from influence_fast.auditing.run import audit as audit
    from influence_fast.errors import BackendError as BackendError
    from influence_fast.errors import InfluenceError as InfluenceError
    from influence_fast.errors import InputError as InputError
    from influence_fast.errors import StoreError as StoreError
    from influence_fast.evaluation.comparison import bootstrap as bootstrap
    from influence_fast.evaluation.comparison import cancellation as cancellation
    from influence_fast.evaluation.comparison import compare as compare
    from influence_fast.evaluation.comparison import evaluate as evaluate
    from influence_fast.evaluation.comparison import ndr as ndr
    from influence_fast.evaluation.comparison import ndr_auc as ndr_auc
    from influence_fast.evaluation.comparison import ndr_curve as ndr_curve
    from influence_fast.evaluation.comparison import precision as precision
    from influence_fast.evaluation.comparison import rank_correlation as rank_correlation
    from influence_fast.evaluation.comparison import roc_auc as roc_auc
    from influence_fast.evaluation.comparison import wins as wins
    from influence_fast.gradients.build import Estimate as Estimate
    from influence_fast.gradients.build import build_store as build_store
    from influence_fast.gradients.build import estimate_build as estimate_build
    from influence_fast.gradients.capture import GradientCapture as GradientCapture
    from influence_fast.gradients.layers import select_layers as select_layers
    from influence_fast.gradients.store import GradientStore as GradientStore
    from influence_fast.ops.projections import Projection as Projection
    from influence_fast.search.influence_index import InfluenceIndex as InfluenceIndex

__version__ = "0.1.0"

# Public name -> the room it lives in. `aggregate` and the like name both a room and its function: the function wins.
_ROOMS = {
    "aggregate": "attribution.aggregation",
    "aggregate_many": "attribution.aggregation",
    "audit": "auditing.run",
    "GradientCapture": "gradients.capture",
    "Estimate": "gradients.build",
    "build_store": "gradients.build",
    "estimate_build": "gradients.build",
    "BackendError": "errors",
    "InfluenceError": "errors",
    "InputError": "errors",
    "StoreError": "errors",
    "bootstrap": "evaluation.comparison",
    "cancellation": "evaluation.comparison",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.comparison",
    "ndr": "evaluation.comparison",
    "ndr_auc": "evaluation.comparison",
    "ndr_curve": "evaluation.comparison",
    "precision": "evaluation.comparison",
    "rank_correlation": "evaluation.comparison",
    "roc_auc": "evaluation.comparison",
    "wins": "evaluation.comparison",
    "InfluenceIndex": "search.influence_index",
    "InfluenceMatrix": "attribution.influence_matrix",
    "influence": "attribution.influence_matrix",
    "select_layers": "gradients.layers",
    "Checkpoints": "attribution.methods",
    "fitted_influence": "attribution.methods",
    "label_contrast": "attribution.methods",
    "outlier": "attribution.methods",
    "word_influence": "attribution.methods",
    "class_opinion": "attribution.model_passes",
    "hidden_states": "attribution.model_passes",
    "kronecker_factors": "attribution.model_passes",
    "word_gradients": "attribution.model_passes",
    "neighbour_opinion": "attribution.label_quality",
    "neighbours": "attribution.label_quality",
    "pooled": "attribution.label_quality",
    "probe_opinion": "attribution.label_quality",
    "Projection": "ops.projections",
    "GradientStore": "gradients.store",
}
__all__ = ["__version__", "ops", *_ROOMS]


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a room binds it here under its own name; where the room's main function has that name, bind that.
        if isinstance(value, types.ModuleType) and _ROOMS.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("influence_fast.ops")
    if name not in _ROOMS:
        raise AttributeError(f"module 'influence_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"influence_fast.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
