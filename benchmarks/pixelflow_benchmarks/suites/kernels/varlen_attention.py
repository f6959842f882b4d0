"""varlen_attention: self-attention of packed images, forward and with backward, against SDPA and FlashAttention.

Floating-point operations are counted for the 72 channels of a head, without padding: two products forward, five
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_kernels.varlen_attention import varlen_attention

from . import attention_truth
from .case import HEAD_DIM, HEADS, WIDTH, Case, Outputs, Problem, size_of

SDPA = {"SDPA (cuDNN)": SDPBackend.CUDNN_ATTENTION, "SDPA (flash)": SDPBackend.FLASH_ATTENTION}


def cases(problem: Problem) -> Iterator[Case]:
    """Yield forward, and forward with backward, on the pack of one stage."""
    layout = problem.layout()
    images, length = layout.num_images, problem.side**2
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    product = problem.normal(layout.num_tokens, 3 * WIDTH)
    q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in product.chunk(3, dim=-1))

    def packed(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: varlen_attention(
            q, k, v, cu, cu, longest, longest, backend=backend, multiple_of=layout.multiple_of
        )

    def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (images, length)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    def forced(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return batched(q, k, v)

        return call

    functions = {"ours": packed("triton"), "eager": batched} | {n: forced(b) for n, b in SDPA.items()}
    functions["FlashAttention"] = packed("flash")
    present, absent = _present({name: _call(function, (q, k, v)) for name, function in functions.items()}, q.is_cuda)
    growth = attention_truth.growth(q, k, length)
    forward_flops = 4 * layout.num_tokens * length * WIDTH
    yield Case(
        name=f"varlen_attention.forward/{problem.label}",
        variants=present,
        absent=absent,
        plain=lambda: (attention_truth.outputs(F.scaled_dot_product_attention, q, k, v, length),),
        truth=lambda: attention_truth.attended(q, k, v, length, torch.float64)[:1],
        growth=growth,
        bytes_moved=4 * size_of(q),
        flops=forward_flops,
    )
    grad = problem.normal(*q.shape, seed=1)

    def gradients(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Outputs:
        return torch.autograd.grad(function(*leaves), leaves, grad)

    leaves = tuple(x.detach().clone().requires_grad_() for x in (q, k, v))

    def expected(attention: Callable[..., Tensor], dtype: torch.dtype) -> Outputs:
        return attention_truth.gradients(attention, q, k, v, grad, length, dtype)

    calls = {name: _gradients_call(gradients, function, leaves, grad) for name, function in functions.items()}
    present, absent = _present(calls, q.is_cuda)  # a backend may have a forward pass only
    yield Case(
        name=f"varlen_attention.forward+backward/{problem.label}",
        variants=present,
        absent=absent,
        plain=lambda: expected(F.scaled_dot_product_attention, q.dtype),
        truth=lambda: expected(attention_truth.softmax_attention, torch.float64),
        growth=growth,
        bytes_moved=4 * size_of(q) + 8 * size_of(q),
        flops=forward_flops * 7 // 2,
    )


def _call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Outputs]:
    return lambda: (function(*inputs),)


def _gradients_call(
    gradients: Callable[..., Outputs], function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], Outputs]:
    return lambda: gradients(function, leaves, grad)


def _present(
    calls: dict[str, Callable[[], Outputs]], on_gpu: bool
) -> tuple[dict[str, Callable[[], Outputs]], dict[str, str]]:
    """Split variants into those that run here and the others with the reason; on a GPU, ours is not excused."""
    present, absent = {}, {}
    for name, call in calls.items():
        try:
            if name != "ours" or not on_gpu:
                call()
        except Exception as error:  # libraries refuse in many ways
            absent[name] = first_line(error)
        else:
            present[name] = call
    return present, absent
