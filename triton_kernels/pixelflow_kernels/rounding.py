"""What kernels whose operations must each round by themselves share."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apart(product):
    """A float32 product with the same bits, which no compiler can fuse with the sum that it goes into.

    For sm_100, ptxas 12.9 fuses packed products and sums even where it is told not to. So there the bits pass through
    an integer sum with a zero that it does not know to be one: the grid has a single layer.
    """
    if product.dtype == tl.float32:
        product = (product.to(tl.int32, bitcast=True) + tl.program_id(2)).to(tl.float32, bitcast=True)
    return product
