"""varlen_attention: self-attention of one stage's pack, with the published heads of 72 channels and with 64.

The three kernels of the backward pass are launched together, one with the candidate configuration, the others with
their frozen ones. A candidate must therefore make the whole pass faster, not only its own part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_benchmarks.suites.kernels import attention_truth
from pixelflow_benchmarks.suites.kernels.case import HEAD_DIM, HEADS, Outputs, Problem
from pixelflow_kernels.configs import arch_of, launch_config
from pixelflow_kernels.varlen_attention import backward, forward
from pixelflow_kernels.varlen_attention.tiles import shape_class

from .spaces import Config
from .trial import Trial

NARROW = 64
"""Channels of a head of another lane class; tried at the stages where short and long sequences are cheap."""

JIT = {
    "backward_delta": backward._delta_kernel,
    "backward_keys": backward._backward_keys_kernel,
    "backward_queries": backward._backward_queries_kernel,
}


def trials(kernel: str, problem: Problem) -> Iterator[Trial]:
    """Yield trials of ``forward``, or of one kernel of the backward pass."""
    for head_dim in (HEAD_DIM, NARROW) if problem.stage in (0, 2) else (HEAD_DIM,):
        make = _forward if kernel == "forward" else _backward
        yield make(kernel, problem, head_dim)


def _operands(problem: Problem, head_dim: int, count: int) -> tuple[Tensor, ...]:
    """Return q, k and v as slices of one product, as in a model, and further tensors of their shape up to ``count``."""
    width = HEADS * head_dim
    layout = problem.layout()
    product = problem.normal(layout.num_tokens, 3 * width)
    q, k, v = (part.unflatten(-1, (HEADS, head_dim)) for part in product.chunk(3, dim=-1))
    return q, k, v, *(problem.normal(*q.shape, seed=i) for i in range(1, count - 2))


def _forward(kernel: str, problem: Problem, head_dim: int) -> Trial:
    q, k, v = _operands(problem, head_dim, 3)
    layout, scale = problem.layout(), head_dim**-0.5
    out = q.new_empty(q.shape)
    lse = q.new_empty(HEADS, q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    cu, longest, multiple = layout.cu_seqlens, layout.max_seqlen, layout.multiple_of
    name = shape_class(q.dtype, head_dim, longest)

    def launch(config: Config) -> Outputs:
        forward.launch_forward(q, k, v, cu, cu, out, lse, longest, scale, multiple, config=config)
        return out, lse

    def plain() -> Outputs:
        out = attention_truth.outputs(F.scaled_dot_product_attention, q, k, v, longest)
        return out, attention_truth.attended(q, k, v, longest, q.dtype)[1]

    return Trial(
        problem=f"{problem.label}-d{head_dim}",
        shape_class=name,
        present=launch_config(f"varlen_attention.{kernel}", name, arch_of(problem.device)),
        launch=launch,
        buffers=(out, lse),
        plain=plain,
        truth=lambda: attention_truth.attended(q, k, v, longest, torch.float64),
        growth=attention_truth.growth(q, k, longest),
        jit=forward._attention_forward_kernel,
    )


def _backward(kernel: str, problem: Problem, head_dim: int) -> Trial:
    q, k, v, grad = _operands(problem, head_dim, 4)
    layout, scale = problem.layout(), head_dim**-0.5
    cu, longest, multiple = layout.cu_seqlens, layout.max_seqlen, layout.multiple_of
    types = (q.dtype, torch.promote_types(q.dtype, torch.float32))
    # From plain PyTorch, so that this trial does not depend on the forward kernel.
    exact = attention_truth.attended(q, k, v, longest, torch.float64)
    out, lse = (x.to(y) for x, y in zip(exact, types, strict=True))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    name, part = shape_class(q.dtype, head_dim), kernel.removeprefix("backward_")
    frozen = {
        other: launch_config(f"varlen_attention.backward_{other}", name, arch_of(problem.device))
        for other in ("delta", "keys", "queries")
    }

    def launch(config: Config) -> Outputs:
        backward.launch_backward(
            grad, None, q, k, v, out, lse, cu, cu, dq, dk, dv, longest, longest, scale, multiple,
            configs=frozen | {part: config},
        )  # fmt: skip
        return dq, dk, dv

    def expected(attention: Callable[..., Tensor], dtype: torch.dtype) -> Outputs:
        return attention_truth.gradients(attention, q, k, v, grad, longest, dtype)

    return Trial(
        problem=f"{problem.label}-d{head_dim}",
        shape_class=name,
        present=frozen[part],
        launch=launch,
        buffers=(dq, dk, dv),
        plain=lambda: expected(F.scaled_dot_product_attention, q.dtype),
        truth=lambda: expected(attention_truth.softmax_attention, torch.float64),
        growth=attention_truth.growth(q, k, longest),
        jit=JIT[kernel],
    )
