"""The kernels under autograd, in eager mode: what has a gradient, what is kept for it, what runs, what is refused.

Under the interpreter, on packs of a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.model import PackedTransformer, Surroundings, TransformerBlock
from pixelflow_engine.operations import Operations
from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.modulate import reference as plain_modulate
from pixelflow_kernels.rope2d import reference as plain_rope2d
from pixelflow_kernels.varlen_attention import reference as plain_attention
from pixelflow_kernels.varlen_attention import sdpa
from support.kernels import assert_same_bits
from support.reference_models import normal, random_reference, seeded
from support.training_packs import Step, TrainingPack, draw_pack, losses_of, packed_model, packed_step

pytestmark = pytest.mark.interpret

GRIDS = [(1, 2), (1, 1), (2, 1)]
TEXT = {"num_classes": 3, "cross_attention_dim": 12}
DEPTH = 1


def drawn(seed: int, **shape: Any) -> tuple[PackedTransformer, TrainingPack]:
    reference: PixelFlowTransformer = random_reference(seed, heads=1, head_dim=24, depth=DEPTH, **shape)
    return packed_model(reference, FusedOperations("triton"), torch.float32), draw_pack(reference, GRIDS, seed + 1)


class Calls(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def refuse(*given: Any, **named: Any) -> Any:
    raise AssertionError("a plain implementation ran")


def test_what_runs_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation as often as the model has it, forward and backward; no plain implementation in its place."""
    model, pack = drawn(1, **TEXT)
    for module in (plain_modulate, plain_rope2d, plain_attention, sdpa):
        for name, member in vars(module).items():
            if callable(member) and getattr(member, "__module__", "") == module.__name__:
                monkeypatch.setattr(module, name, refuse)
    with Calls() as calls:
        step = packed_step(model, pack)
    assert step.losses.isfinite().all()
    expected = {
        "layer_norm_modulate": 1,
        "add_norm_modulate": 3 * DEPTH,
        "norm_modulate_backward": 3 * DEPTH + 1,
        "norm_rope2d": 3 * DEPTH,  # of a block's tokens, of the queries to its text, of its text's keys
        "norm_rope2d_backward": 3 * DEPTH,
        "varlen_attention": 2 * DEPTH,
        "varlen_attention_backward": 2 * DEPTH,
    }
    ours = [name.removeprefix("pixelflow::") for name in calls.names if name.startswith("pixelflow::")]
    assert {name: ours.count(name) for name in {*ours}} == expected
    foreign = ("norm", "attention", "softmax", "rsqrt")
    assert not [name for name in calls.names if name.startswith("aten::") and any(word in name for word in foreign)]


PARTS: dict[str, Callable[[str], bool]] = {
    "norms and conditioning": lambda name: "norm" in name or "embedder" in name,
    "head": lambda name: name.startswith("proj_out"),
}


def test_a_gradient_does_not_depend_on_what_else_has_one() -> None:
    """Frozen parameters, tokens with and without a gradient: what is wanted has the bits that it has among all."""
    model, pack = drawn(2, **TEXT)
    every = packed_step(model, pack)
    for part, belongs in PARTS.items():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(belongs(name))
        given = pack.tokens.clone().requires_grad_(part == "head")
        losses = losses_of(model, pack.with_tokens(given))
        losses.backward(torch.full_like(losses, 1 / len(losses)))
        wanted = [name for name in every.gradients if belongs(name)]
        assert 0 < len(wanted) < len(every.gradients)
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (name not in wanted), (part, name)
            if parameter.grad is not None:
                assert_same_bits(parameter.grad, every.gradients[name], f"{part}: {name}")
        assert (given.grad is None) == (part != "head")
        if given.grad is not None:
            assert_same_bits(given.grad, every.tokens, "tokens")
        model.zero_grad(set_to_none=True)


def test_nothing_is_kept_without_gradients() -> None:
    model, pack = drawn(3)
    model.requires_grad_(False)
    with kept_by(model) as kept:
        assert not losses_of(model, pack).requires_grad
    assert not kept


@contextmanager
def kept_by(model: PackedTransformer) -> Iterator[dict[int, int]]:
    """Bytes that are kept for a backward pass, each memory once, by its address; parameters are there anyway."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if (place := x.untyped_storage().data_ptr()) not in own:
            kept[place] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept


def test_a_graph_serves_twice_and_lets_go_when_it_is_done() -> None:
    model, pack = drawn(4)
    losses = losses_of(model, pack)
    passes = []
    for retain in (True, False):
        losses.sum().backward(retain_graph=retain)
        passes.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    for name, gradient in passes[0].items():
        assert_same_bits(gradient, passes[1][name], name)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses.sum().backward()


def test_second_derivatives_are_refused() -> None:
    model, pack = drawn(5)
    tokens = pack.tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses_of(model, pack.with_tokens(tokens)).sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula was registered"):
        gradient.sum().backward()


def test_blocks_that_are_run_again_give_the_same_bits() -> None:
    """Activation checkpointing: a block keeps its inputs and runs a second time when its gradient is due."""
    model, pack = drawn(6, **TEXT)
    with kept_by(model) as before:
        expected = packed_step(model, pack)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *x, forward=forward: checkpoint(forward, *x, use_reentrant=False)  # type: ignore[method-assign]
    with kept_by(model) as after:
        found = packed_step(model, pack)
    assert sum(after.values()) < sum(before.values()) / 2
    assert_same_step(found, expected)


def assert_same_step(a: Step, b: Step) -> None:
    assert_same_bits(a.losses, b.losses, "losses")
    assert_same_bits(a.tokens, b.tokens, "tokens")
    assert a.gradients.keys() == b.gradients.keys()
    for name, gradient in a.gradients.items():
        assert_same_bits(gradient, b.gradients[name], name)


class Block:
    """A block as a function of tensors: residual stream, its norm, modulations, the next one's, parameters."""

    def __init__(self, seed: int, dtype: torch.dtype, head_dim: int = 24) -> None:
        grids = GRIDS[:2]
        reference = random_reference(seed, heads=1, head_dim=head_dim, depth=1, num_classes=0, cross_attention_dim=12)
        self.operations: Operations = FusedOperations("triton")
        model = packed_model(reference, self.operations, dtype)
        self.block: TransformerBlock = model.blocks[0]
        self.layout = PackedLayout.from_grids(grids)
        g, C, count = seeded(seed + 1), head_dim, len(grids)
        x, u = normal((2, self.layout.num_tokens, C), g).to(dtype).unbind()
        rows, following = normal((count, 6 * C), g).to(dtype), normal((2, count, C), g).to(dtype)
        assert model.dtype == dtype
        pack = draw_pack(reference, grids, seed + 2)
        assert pack.text is not None
        states = pack.text.states.to(dtype)
        prompts = model.prompts(type(pack.text)(states, pack.text.mask))
        self.around: Surroundings = model.surroundings(self.layout, prompts)
        # A block's text is projected, and its modulations made, before it runs.
        parameters = dict(self.block.named_parameters())
        self.names = [name for name in parameters if not name.startswith(("norm1", "attn2.k", "attn2.v"))]
        given = [x, u, rows, *following, *prompts.keys[0], *(parameters[name] for name in self.names)]
        self.leaves = [t.detach().clone().requires_grad_() for t in given]

    def __call__(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        parts = flat.split([leaf.numel() for leaf in self.leaves])
        leaves = [part.view_as(leaf) for part, leaf in zip(parts, self.leaves, strict=True)]
        x, u, rows, shift, scale, k, v, *parameters = leaves
        weights = dict(zip(self.names, parameters, strict=True))
        arguments = (x, u, rows, (shift, scale), (k, v), self.around, self.operations)
        x, u = functional_call(self.block, weights, arguments)
        return x, u


def test_gradients_of_a_block_are_those_of_finite_differences() -> None:
    """In float64, of all inputs and parameters at once, in a random direction."""
    block = Block(7, torch.float64)
    flat = torch.cat([leaf.detach().flatten() for leaf in block.leaves]).requires_grad_()
    torch.manual_seed(8)  # gradcheck's direction is of the global generator
    assert torch.autograd.gradcheck(block, flat, fast_mode=True, check_undefined_grad=False)


def test_slices_of_one_product_are_read_in_place() -> None:
    """q, k and v as a third each of one product: the bits, gradients too, of three products laid out by themselves."""
    ops, layout, heads, width = FusedOperations("triton"), PackedLayout.from_grids(GRIDS), 2, 48
    g = seeded(8)
    qkv = normal((layout.num_tokens, 3 * width), g, torch.float32)
    weights = [1 + 0.3 * normal((width,), g, torch.float32) for _ in range(2)]
    direction = normal((layout.num_tokens, heads, 24), g, torch.float32)
    rotation = ops.rotation(layout, 24, torch.float32)

    def run(chunks: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        q, k, v = chunks(leaf)
        q, k = ops.norm_rotate_qk(q, k, weights[0], weights[1], layout, rotation, heads)
        out = ops.self_attention(q, k, v.unflatten(-1, (heads, -1)), layout)
        (gradient,) = torch.autograd.grad(out, leaf, direction)
        return [out.detach(), gradient]

    in_place = run(lambda x: list(x.chunk(3, dim=-1)))
    apart = run(lambda x: [part.contiguous() for part in x.chunk(3, dim=-1)])
    for a, b in zip(in_place, apart, strict=True):
        assert_same_bits(a, b)
