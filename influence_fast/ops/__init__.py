"""The operations that everything else is built on: the same numbers from every backend.

``specs`` has one public function per operation, ``projections`` says what to project with, ``dispatch`` picks the backend:
``reference`` (plain torch, the oracle), ``cpu`` (C++), ``triton`` and ``cuda``.
"""

from influence_fast.ops.arguments import AdamState as AdamState
from influence_fast.ops.dispatch import BACKENDS as BACKENDS
from influence_fast.ops.dispatch import OPERATIONS
from influence_fast.ops.dispatch import available as available
from influence_fast.ops.dispatch import choose as choose
from influence_fast.ops.projections import Matrices as Matrices
from influence_fast.ops.projections import Side as Side
from influence_fast.ops.projections import SparseSide as SparseSide
from influence_fast.ops.specs import dot_outer as dot_outer
from influence_fast.ops.specs import ghost_dot as ghost_dot
from influence_fast.ops.specs import ghost_norm as ghost_norm
from influence_fast.ops.specs import outer as outer
from influence_fast.ops.specs import project as project
from influence_fast.ops.specs import project_outer as project_outer
from influence_fast.ops.specs import random_matrix as random_matrix
from influence_fast.ops.specs import rank as rank
from influence_fast.ops.specs import rank_and_vote as rank_and_vote
from influence_fast.ops.specs import score_outer as score_outer
from influence_fast.ops.specs import sketch as sketch
from influence_fast.ops.specs import sketch_outer as sketch_outer
from influence_fast.ops.specs import tally as tally
from influence_fast.ops.specs import vote as vote

OPS = tuple(OPERATIONS)
_NAMES = [
    "BACKENDS",
    "OPS",
    "AdamState",
    "Matrices",
    "Side",
    "SparseSide",
    "available",
    "choose",
    "dot_outer",
    "project",
    "tally",
]
__all__ = [*_NAMES, *OPS]
