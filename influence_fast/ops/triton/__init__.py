"""Triton kernels: on a GPU, or on the CPU through Triton's interpreter (``TRITON_INTERPRET=1`` before the import).

Nothing is added atomically: each program owns what it writes, and parts of a sum are added in a fixed order, so two
runs give the same bits. float32 products are IEEE, not TF32; float16 and bfloat16 go to the tensor cores as they are and
are summed in float32. Offsets are 64-bit. Work runs on the current stream of the tensors' device.

Where the time goes, for N samples, T tokens, i inputs, o outputs, on a GPU: ``project_outer`` reads ``N T (i + o)`` numbers
once (memory-bound up to k of about 128); ``sketch`` reads ``N D`` once, plus 2 k FLOPs per number for dense kinds;
``sketch_outer`` does ``2 N T i o`` FLOPs, its strips of G stay in the L2 cache; ``score_outer`` does ``2 N (T + m) i o``;
``ghost_dot`` ``2 Na Nb Ta Tb (i + o)``.
"""

from influence_fast.ops.triton.launch import MISSING as MISSING
from influence_fast.ops.triton.launch import unavailable as unavailable

if MISSING is None:
    from influence_fast.ops.triton.ghost import ghost_dot as ghost_dot
    from influence_fast.ops.triton.ghost import ghost_norm as ghost_norm
    from influence_fast.ops.triton.outer_products import outer as outer
    from influence_fast.ops.triton.outer_products import project_outer as project_outer
    from influence_fast.ops.triton.outer_products import score_outer as score_outer
    from influence_fast.ops.triton.outer_products import sketch_outer as sketch_outer
    from influence_fast.ops.triton.sketches import sketch as sketch
