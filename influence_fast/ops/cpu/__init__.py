"""The C++ kernels of ``csrc/cpu`` on torch tensors in main memory.

Tensors cross the border as addresses, sizes and strides; the last dimension has unit stride (anything else is copied).
Random entries are made inside the kernels, for every call; only those of Gaussian sides are kept between calls (they cost a
logarithm and a cosine each), as long as all that is kept fits ``INFLUENCE_FAST_MATRIX_BYTES`` (1 GiB by default).
"""

from influence_fast.ops.cpu.native import unavailable as unavailable
from influence_fast.ops.cpu.outer_products import ghost_dot as ghost_dot
from influence_fast.ops.cpu.outer_products import ghost_norm as ghost_norm
from influence_fast.ops.cpu.outer_products import outer as outer
from influence_fast.ops.cpu.outer_products import project_outer as project_outer
from influence_fast.ops.cpu.outer_products import score_outer as score_outer
from influence_fast.ops.cpu.outer_products import sketch_outer as sketch_outer
from influence_fast.ops.cpu.ranks import rank as rank
from influence_fast.ops.cpu.ranks import rank_and_vote as rank_and_vote
from influence_fast.ops.cpu.ranks import vote as vote
from influence_fast.ops.cpu.sketches import random_matrix as random_matrix
from influence_fast.ops.cpu.sketches import sketch as sketch
