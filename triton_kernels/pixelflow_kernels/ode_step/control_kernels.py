"""Kernels of the step-size controller: the step to try, its acceptance, and the next step size.

Everything is float64 arithmetic on a few numbers per image, in the same order as in the plain PyTorch solver; only the
root is computed as ``exp(log)``. Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section
II.4.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

# Values of ``status``, equal to those of the reference implementation; a test compares them.
RUNNING = tl.constexpr(0)
ARRIVED = tl.constexpr(1)
MAX_ATTEMPTS = tl.constexpr(2)
UNDERFLOW = tl.constexpr(3)
NONFINITE = tl.constexpr(4)


@triton.jit
def _begin_kernel(
    tau_ptr,
    step_ptr,
    status_ptr,
    h_ptr,
    times_ptr,
    images,
    NODES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``h = min(step, 1 - tau)``, 0 for a stopped image, and the times ``[S, B]`` of the slopes."""
    image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = image < images
    tau = tl.load(tau_ptr + image, mask=mask, other=1.0)
    step = tl.load(step_ptr + image, mask=mask, other=0.0)
    active = (tau < 1.0) & (tl.load(status_ptr + image, mask=mask, other=0) == RUNNING)
    remaining = 1.0 - tau
    # A NaN step stays NaN, as in torch.minimum; the error norm reports it later.
    h = tl.where(active, tl.minimum(step, remaining, propagate_nan=tl.PropagateNan.ALL), 0.0)
    tl.store(h_ptr + image, h, mask=mask)
    for i in tl.static_range(COUNT):
        # Node 1 lies exactly at the end of the stage.
        time = tl.where(active & (step >= remaining), 1.0, tau + h) if NODES[i] == 1.0 else tau + NODES[i] * h
        tl.store(times_ptr + i * tl.cast(images, tl.int64) + image, time, mask=mask)


@triton.jit
def _end_kernel(
    tau_ptr,
    step_ptr,
    status_ptr,
    accepted_ptr,
    rejected_ptr,
    accept_ptr,
    h_ptr,
    after_ptr,
    ratio_ptr,
    images,
    max_attempts,
    EXPONENT: tl.constexpr,
    SAFETY: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Accept or reject, count, and choose the next step."""
    image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = image < images
    tau = tl.load(tau_ptr + image, mask=mask, other=1.0)
    step = tl.load(step_ptr + image, mask=mask, other=0.0)
    status = tl.load(status_ptr + image, mask=mask, other=0)
    accepted = tl.load(accepted_ptr + image, mask=mask, other=0)
    rejected = tl.load(rejected_ptr + image, mask=mask, other=0)
    h = tl.load(h_ptr + image, mask=mask, other=0.0)
    after = tl.load(after_ptr + image, mask=mask, other=1.0)
    ratio = tl.load(ratio_ptr + image, mask=mask, other=1.0)

    active = (tau < 1.0) & (status == RUNNING)
    finite = ratio < float("inf")  # false for NaN; a norm is not negative
    stuck = active & finite & (after <= tau)  # h is too small to change tau
    tried = active & finite & (after > tau)
    accept = tried & (ratio <= 1.0)
    accepted += accept.to(tl.int64)
    rejected += (tried & (ratio > 1.0)).to(tl.int64)

    positive = tl.where(finite & (ratio > 0.0), ratio, 1.0)  # the logarithm's argument
    factor = SAFETY * tl.exp(EXPONENT * tl.log(positive))
    # Python numbers passed to a function would be rounded to float32 first; as operands they are not.
    one = tl.full([BLOCK], 1.0, tl.float64)
    factor = tl.minimum(tl.maximum(factor, tl.where(ratio < 1.0, one, one * SMALLEST)), one * LARGEST)
    factor = tl.where(ratio == 0.0, one * LARGEST, factor)

    tau = tl.where(accept, after, tau)
    status = tl.where(tried & (accepted + rejected >= max_attempts), MAX_ATTEMPTS, status)
    status = tl.where(accept & (tau >= 1.0), ARRIVED, status)
    status = tl.where(stuck, UNDERFLOW, status)
    status = tl.where(active & (finite == 0), NONFINITE, status)
    tl.store(tau_ptr + image, tau, mask=mask)
    tl.store(step_ptr + image, tl.where(tried, h * factor, step), mask=mask)
    tl.store(status_ptr + image, status, mask=mask)
    tl.store(accepted_ptr + image, accepted, mask=mask)
    tl.store(rejected_ptr + image, rejected, mask=mask)
    tl.store(accept_ptr + image, accept.to(tl.int8), mask=mask)


def launch_begin(
    tau: Tensor,
    step: Tensor,
    status: Tensor,
    nodes: Sequence[float],
    h: Tensor,
    times: Tensor,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``h [B]`` and ``times [S, B]``."""
    images = tau.shape[0]
    if images == 0:
        return
    config = launch_config("ode_step.control", "any", arch_of(tau.device)) if config is None else config
    with torch.cuda.device_of(tau):
        _begin_kernel[(triton.cdiv(images, config["BLOCK"]),)](
            tau_ptr=tau,
            step_ptr=step,
            status_ptr=status,
            h_ptr=h,
            times_ptr=times,
            images=images,
            NODES=tuple(nodes),
            COUNT=len(nodes),
            enable_fp_fusion=False,  # level A
            **config,
        )


def launch_end(
    tau: Tensor,
    step: Tensor,
    status: Tensor,
    accepted: Tensor,
    rejected: Tensor,
    accept: Tensor,
    h: Tensor,
    after: Tensor,
    ratio: Tensor,
    order: int,
    max_attempts: int,
    factors: tuple[float, float, float],
    config: Mapping[str, int] | None = None,
) -> None:
    """Update the tensors before ``h`` in place, all ``[B]``; ``factors`` are safety, smallest and largest factor."""
    images = tau.shape[0]
    if images == 0:
        return
    config = launch_config("ode_step.control", "any", arch_of(tau.device)) if config is None else config
    safety, smallest, largest = factors
    with torch.cuda.device_of(tau):
        _end_kernel[(triton.cdiv(images, config["BLOCK"]),)](
            tau_ptr=tau,
            step_ptr=step,
            status_ptr=status,
            accepted_ptr=accepted,
            rejected_ptr=rejected,
            accept_ptr=accept.view(torch.int8),
            h_ptr=h,
            after_ptr=after,
            ratio_ptr=ratio,
            images=images,
            max_attempts=max_attempts,
            EXPONENT=-1 / order,
            SAFETY=safety,
            SMALLEST=smallest,
            LARGEST=largest,
            enable_fp_fusion=False,
            **config,
        )
