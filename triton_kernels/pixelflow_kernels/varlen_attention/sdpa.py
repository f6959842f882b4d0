"""PyTorch's scaled dot-product attention, applied member by member (``backend="torch"``)."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float) -> Tensor:
    """Compute the output ``[T, H, D]``; consecutive members of equal query and key lengths form one batch."""
    parts = []
    row, key = 0, 0
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    for (rows, keys), group in groupby(lengths):
        count = len([*group])
        batch_q, batch_k, batch_v = (
            x[at : at + count * length].unflatten(0, (count, length)).transpose(1, 2)
            for x, at, length in ((q, row, rows), (k, key, keys), (v, key, keys))
        )
        if rows > 0 and keys > 0:
            result = F.scaled_dot_product_attention(batch_q, batch_k, batch_v, scale=scale)
        else:
            result = batch_q.new_zeros(batch_q.shape)
        parts.append(result.transpose(1, 2).reshape(count * rows, *q.shape[1:]))
        row, key = row + count * rows, key + count * keys
    return parts[0].contiguous() if len(parts) == 1 else torch.cat([q[:0], *parts])
