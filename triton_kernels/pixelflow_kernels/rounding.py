"""Protection against fused multiply-adds, for kernels in which every operation must round separately."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apart(product):
    """Return a product with the same bits, in a form that the compiler cannot fuse with a following addition.

    For sm_100, ptxas 12.9 fuses packed products and sums even when fusion is disabled. To prevent this, the bits of a
    float32 product pass through an integer addition of ``program_id(2)``. It is always 0, as the callers' grids have a
    single layer along that axis, but the compiler does not know this. Other dtypes are returned unchanged.
    """
    if product.dtype == tl.float32:
        product = (product.to(tl.int32, bitcast=True) + tl.program_id(2)).to(tl.float32, bitcast=True)
    return product
