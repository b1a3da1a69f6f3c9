"""The CUDA kernels of ``csrc/cuda`` on torch tensors on a GPU: what is allocated, which launch, on which stream.

Work is queued on torch's current stream of the tensors' device. Nothing here waits for it, except the look for NaN at
the end of what ranks. Kernels read any strides with a last one of 1; other tensors are made contiguous first.
"""

from influence_fast.ops.cuda.ghost import ghost_dot as ghost_dot
from influence_fast.ops.cuda.ghost import ghost_norm as ghost_norm
from influence_fast.ops.cuda.native import unavailable as unavailable
from influence_fast.ops.cuda.outer_products import outer as outer
from influence_fast.ops.cuda.outer_products import project_outer as project_outer
from influence_fast.ops.cuda.outer_products import project_outer_grouped as project_outer_grouped
from influence_fast.ops.cuda.outer_products import score_outer as score_outer
from influence_fast.ops.cuda.outer_products import sketch_outer as sketch_outer
from influence_fast.ops.cuda.ranks import rank as rank
from influence_fast.ops.cuda.ranks import rank_and_vote as rank_and_vote
from influence_fast.ops.cuda.ranks import vote as vote
from influence_fast.ops.cuda.sketches import random_matrix as random_matrix
from influence_fast.ops.cuda.sketches import sketch as sketch
