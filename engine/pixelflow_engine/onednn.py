"""Matrix products on a CPU through oneDNN, as custom operations with a derivative.

For compiled sampling: with GELU and bias applied where the product is written, it is ahead of MKL there. Inductor uses
oneDNN only for constant weights and known sizes, so each product is a custom operation, one node of the graph.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum of dy over tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from .operations import Linear, SideBySide

ONEDNN = torch.backends.mkldnn.is_available()


def multiplies(x: Tensor, layer: Linear) -> bool:
    """Whether oneDNN may compute a layer: on a CPU, in float32, and not for a module that replaced a linear layer."""
    return (
        x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and type(layer) in (nn.Linear, SideBySide)
        and ONEDNN
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``, differentiable, on a CPU.

    Args:
        x: ``[T, in]`` float32.
        weight: ``[out, in]`` float32.
        bias: ``[out]`` float32, or None.
    """
    return _onednn_linear(x, weight, bias, False)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``GELU(x weight^T + bias)``, tanh form, fused into the product; has no derivative."""
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
    # The gradient of a weight is a sum over tokens. oneDNN would first need transposed copies of both factors; `mm`
    # reads them in place.
    rows = grad.flatten(0, -2)
    return (
        _onednn_linear(grad.contiguous(), weight.t(), None, False) if for_x else None,
        rows.t() @ x.flatten(0, -2) if for_weight else None,
        rows.sum(0) if for_bias else None,
        None,
    )


_onednn_linear.register_autograd(_gradients, setup_context=_save)
