"""Every operation in plain torch: any device, any dtype. The oracle of the kernels, and what runs where none is built.

Arguments arrive checked and normalised by ``ops/__init__.py``: ``x (N, T, i)`` and ``dy (N, T, o)``, ``spans`` either
None or an int64 ``(N, 2)`` of the token range ``[begin, end)`` that counts in each sample.
"""

import torch

from influence_fast.ops.reference.outer_products import ghost_dot as ghost_dot
from influence_fast.ops.reference.outer_products import ghost_norm as ghost_norm
from influence_fast.ops.reference.outer_products import live as live
from influence_fast.ops.reference.outer_products import outer as outer
from influence_fast.ops.reference.outer_products import project as project
from influence_fast.ops.reference.outer_products import project_outer as project_outer
from influence_fast.ops.reference.outer_products import score_outer as score_outer
from influence_fast.ops.reference.outer_products import sketch_outer as sketch_outer
from influence_fast.ops.reference.ranks import rank as rank
from influence_fast.ops.reference.ranks import rank_and_vote as rank_and_vote
from influence_fast.ops.reference.ranks import vote as vote
from influence_fast.ops.reference.sketches import random_matrix as random_matrix
from influence_fast.ops.reference.sketches import sketch as sketch


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here, or None: the reference always can."""
    return None
