"""Products by oneDNN and their derivatives: level D against float64, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_engine import onednn
from pixelflow_engine.operations import SideBySide
from support.kernels import assert_level_d

pytestmark = pytest.mark.skipif(not onednn.ONEDNN, reason="this PyTorch was built without oneDNN")

SHAPES = [(1, 1, 1), (5, 3, 7), (37, 48, 144), (130, 144, 33)]
"""Rows, inputs, outputs."""


def drawn(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and a gradient of the output."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)]
    x, weight, bias, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, bias, grad


def gradients(out: Tensor, grad: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_the_product_and_its_gradients_are_those_of_float64(rows: int, inputs: int, outputs: int, biased: bool) -> None:
    x, weight, bias, grad = drawn(rows, inputs, outputs)
    found = []
    for product, dtype in ((onednn.linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, weight, bias)[: 3 if biased else 2]]
        out = product(leaves[0], leaves[1], leaves[2] if biased else None)
        found.append((out.detach(), *gradients(out, grad, *leaves)))
    for name, ours, plain, truth in zip(("y", "dx", "dW", "db"), *found, strict=False):
        # Both add up in an order of their own, so a lucky plain sum bounds nothing: a rounding for each term does.
        terms = max(rows, inputs, outputs)
        assert_level_d(ours, plain, truth, name, scale=terms**0.5 * truth.abs().max().item())


def test_rows_of_several_dimensions_and_any_strides() -> None:
    x, weight, bias, grad = drawn(24, 6, 10)
    layouts = {
        "two dimensions of rows": (x.view(2, 12, 6), weight, grad.view(2, 12, 10)),
        "columns of a wider tensor": (torch.cat([x, x], 1)[:, 6:], weight, torch.cat([grad, grad], 1)[:, 10:]),
        "transposed": (x.t().contiguous().t(), weight.t().contiguous().t(), grad.t().contiguous().t()),
        "one gradient for all rows": (x, weight, grad[:1].expand(24, 10)),
    }
    for name, (given, matrix, grads) in layouts.items():
        found = []
        for product, dtype in ((onednn.linear, torch.float32), (F.linear, torch.float64)):
            leaves = [t.to(dtype).detach().requires_grad_() for t in (given, matrix, bias)]
            out = product(*leaves)
            found.append((out.detach(), *gradients(out, grads, *leaves)))
        for ours, truth in zip(*found, strict=True):
            # At most 24 terms, each rounded once and added with a rounding, of size 1 or so.
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_only_gradients_that_are_needed_are_computed() -> None:
    x, weight, bias, grad = drawn(5, 3, 7)
    frozen = onednn.linear(x.requires_grad_(), weight, bias)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        frozen.backward(grad)
    names = {event.name for event in profiler.events()}
    assert "mkldnn::_linear_pointwise" in names
    assert not names & {"aten::mm", "aten::sum"}, "a frozen layer's gradients were computed"
    torch.testing.assert_close(x.grad, grad @ weight)


def test_no_rows_at_all() -> None:
    weight = torch.randn(7, 3, requires_grad=True)
    out = onednn.linear(torch.empty(0, 3), weight, None)
    assert out.shape == (0, 7)
    out.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_gelu_is_computed_with_the_product_and_has_no_derivative() -> None:
    x, weight, bias, _ = drawn(37, 48, 144)
    ours = onednn.linear_gelu(x, weight, bias)
    plain, truth = (F.gelu(F.linear(*(t.to(d) for t in (x, weight, bias))), approximate="tanh") for d in (
        torch.float32, torch.float64,
    ))  # fmt: skip
    assert_level_d(ours, plain, truth, scale=48**0.5 * truth.abs().max().item())
    with pytest.raises(NotImplementedError, match="take GELU after the product"):
        onednn.linear_gelu(x, weight.requires_grad_(), bias)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck(needs: tuple[bool, bool, bool]) -> None:
    """Schema, fake tensors, the autograd registration, and AOTAutograd with sizes that vary."""
    x, weight, bias = (t.requires_grad_(n) for t, n in zip(drawn(5, 3, 7)[:3], needs, strict=True))
    torch.library.opcheck(onednn._onednn_linear, (x, weight, bias, False))
    torch.library.opcheck(onednn._onednn_linear, (x, weight, None, False))


def test_who_may_be_multiplied() -> None:
    layer, x = nn.Linear(3, 7), torch.randn(5, 3)
    assert onednn.multiplies(x, layer)
    assert onednn.multiplies(x, SideBySide(layer.weight.detach(), None))
    assert not onednn.multiplies(x.double(), layer.double())
    assert not onednn.multiplies(x.bfloat16(), nn.Linear(3, 7, dtype=torch.bfloat16))
    assert not onednn.multiplies(x.double(), nn.Linear(3, 7))
    assert not onednn.multiplies(x.to("meta"), nn.Linear(3, 7, device="meta"))
    other = type("Other", (nn.Linear,), {})(3, 7)
    assert not onednn.multiplies(x, other), "somebody's own layer would not be called"
