"""Matrix products of a CPU through oneDNN, as operations with a derivative.

``F.linear`` is MKL's on a CPU, which is at its best on its maker's processors alone; oneDNN uses any maker's. Inductor
takes oneDNN's products with constant weights and known sizes only, so each is an operation of ours, a node of a graph.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum of dy over tokens
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from .operations import Linear, SideBySide

ONEDNN = torch.backends.mkldnn.is_available()
PROCESSORS = Path("/proc/cpuinfo")
"""Where Linux says who made them."""


def ahead() -> bool:
    """Whether oneDNN is to be preferred to MKL: on processors of another maker than MKL's, or of an unknown one."""
    if not ONEDNN or not torch.backends.mkl.is_available():
        return ONEDNN
    return not (PROCESSORS.exists() and "GenuineIntel" in PROCESSORS.read_text())


def multiplies(x: Tensor, layer: Linear) -> bool:
    """Whether oneDNN may compute a layer: on a CPU, in float32, and not one that somebody put in a layer's place."""
    return (
        x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and type(layer) in (nn.Linear, SideBySide)
        and ONEDNN
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``, differentiable: ``[T, in]``, ``[out, in]``, ``[out]`` or None, all float32, on a CPU."""
    return _onednn_linear(x, weight, bias, False)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``GELU(x weight^T + bias)``, tanh form, where the product is written; only where no gradient is needed."""
    return _onednn_linear(x, weight, bias, True)


@custom_op("pixelflow::onednn_linear", mutates_args=(), device_types="cpu")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    activation, form = ("gelu", "tanh") if gelu else ("none", "")
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], form)
    return out


@_onednn_linear.register_fake
def _fake_onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, weight, _, gelu = inputs
    if gelu:
        raise NotImplementedError("pixelflow::onednn_linear with GELU has no derivative: take GELU after the product")
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias, _ = ctx.needs_input_grad
    # A weight's gradient adds up over tokens. oneDNN would want both factors transposed in memory first; `mm` reads
    # them as they lie.
    rows = grad.flatten(0, -2)
    return (
        _onednn_linear(grad.contiguous(), weight.t(), None, False) if for_x else None,
        rows.t() @ x.flatten(0, -2) if for_weight else None,
        rows.sum(0) if for_bias else None,
        None,
    )


_onednn_linear.register_autograd(_gradients, setup_context=_save)
