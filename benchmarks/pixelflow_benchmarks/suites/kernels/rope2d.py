"""rope2d: norm and rotation of q and k, slices of a fused product, forward and with backward; the rotation alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pixelflow_kernels.rope2d import qk_norm_rope2d, reference, rope2d, rotation_table

from .case import HEAD_DIM, HEADS, WIDTH, Case, Outputs, Problem, compiled, size_of

EPS = 1e-6


def cases(problem: Problem) -> Iterator[Case]:
    """Yield norm with rotation forward, the same with its backward pass, and the rotation alone."""
    layout = problem.layout()
    T = layout.num_tokens
    table = rotation_table(layout, HEAD_DIM)
    row, column = layout.row, layout.column
    product = problem.normal(T, 3 * WIDTH)
    q, k = product[:, :WIDTH], product[:, WIDTH : 2 * WIDTH]
    weights = 1 + 0.1 * problem.normal(2, WIDTH, dtype=torch.float32)

    def plain(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor) -> Outputs:
        heads = [
            reference.rms_norm(x, weight, EPS, table.dtype).unflatten(-1, (HEADS, HEAD_DIM))
            for x, weight in ((q, q_weight), (k, k_weight))
        ]
        return tuple(reference.rotate(x, row, column, table) for x in heads)

    q_weight, k_weight = weights
    inputs = (q, k, q_weight, k_weight, table)
    fast = compiled(plain)

    def truth_forward() -> Outputs:
        table = rotation_table(layout, HEAD_DIM, torch.float64)
        return plain(q.double(), k.double(), q_weight.double(), k_weight.double(), table)

    yield Case(
        name=f"rope2d.forward/{problem.label}",
        variants={
            "ours": lambda: qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=HEADS, table=table),
            "eager": lambda: plain(*inputs),
            "torch.compile": lambda: fast(*inputs),
        },
        plain=lambda: plain(*inputs),
        truth=truth_forward,
        bytes_moved=2 * size_of(q, k) + size_of(row, column, weights, table),
    )

    grads = (problem.normal(T, HEADS, HEAD_DIM, seed=1), problem.normal(T, HEADS, HEAD_DIM, seed=2))

    def backward(leaves: tuple[Tensor, ...], table: Tensor, grads: tuple[Tensor, ...], ours: bool) -> Outputs:
        q, k, q_weight, k_weight = leaves
        if ours:
            out: Outputs = qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=HEADS, table=table)
        else:
            out = plain(q, k, q_weight, k_weight, table)
        return torch.autograd.grad(out, leaves, grads)

    def leaves_of(dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs[:4])

    def truth() -> Outputs:
        """Compute all images at once: 17 GB at the last stage with 16 guided images."""
        table = rotation_table(layout, HEAD_DIM, torch.float64)
        return backward(leaves_of(torch.float64), table, tuple(g.double() for g in grads), ours=False)

    leaves = leaves_of()
    yield Case(
        name=f"rope2d.forward+backward/{problem.label}",
        variants={
            "ours": lambda: backward(leaves, table, grads, ours=True),
            "eager": lambda: backward(leaves, table, grads, ours=False),
        },
        plain=lambda: backward(leaves, table, grads, ours=False),
        truth=truth,
        bytes_moved=5 * size_of(q, k) + 2 * size_of(row, column, table) + 3 * size_of(weights),
    )

    x = problem.normal(T, HEADS, HEAD_DIM)
    yield Case(
        name=f"rope2d.rotate/{problem.label}",
        variants={
            "ours": lambda: (rope2d(x, layout, table=table),),
            "eager": lambda: (reference.rotate(x, row, column, table),),
        },
        plain=lambda: (reference.rotate(x, row, column, table),),
        exact=True,
        bytes_moved=2 * size_of(x) + size_of(row, column, table),
    )
