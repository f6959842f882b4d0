"""Training packs, and a step on one by the packed model and by the reference image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pixelflow_engine import ModelConfig, reference
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.layers import patchify, unpatchify
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.operations import Operations, PlainOperations, Text
from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_kernels import PackedLayout
from pixelflow_training.loss import image_losses

from .kernels import assert_level_d
from .reference_models import normal, seeded

by_operations = pytest.mark.parametrize(
    "operations",
    [
        pytest.param(PlainOperations(), id="plain"),
        pytest.param(FusedOperations("triton"), id="kernels", marks=pytest.mark.interpret),
    ],
)
"""The kernels run in a process of their own, under Triton's interpreter."""

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False, slots=True)
class TrainingPack:
    """Noisy images in any order, and the model's other inputs.

    Attributes:
        grids: rows and columns of tokens of each image.
        tokens, targets: ``[T, P]`` float32.
        t_model: ``[n]``.
        labels: ``[n]``, or None.
        text: prompts, or None.
    """

    grids: tuple[tuple[int, int], ...]
    tokens: Tensor
    targets: Tensor
    t_model: Tensor
    labels: Tensor | None
    text: Text | None

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout.from_grids(self.grids)

    @property
    def latent_size(self) -> Tensor:
        return torch.tensor([columns for _, columns in self.grids])

    def parts(self, tokens: Tensor) -> list[Tensor]:
        """Split tokens by image."""
        return list(tokens.split([rows * columns for rows, columns in self.grids]))

    def pick(self, images: Sequence[int]) -> TrainingPack:
        """Return a pack of some of the images, or of all in another order."""
        chosen, text = list(images), self.text
        if text is not None:
            text = Text(text.states[chosen], None if text.mask is None else text.mask[chosen])
        return TrainingPack(
            grids=tuple(self.grids[i] for i in chosen),
            tokens=torch.cat([self.parts(self.tokens)[i] for i in chosen]),
            targets=torch.cat([self.parts(self.targets)[i] for i in chosen]),
            t_model=self.t_model[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            text=text,
        )

    def with_tokens(self, tokens: Tensor) -> TrainingPack:
        return replace(self, tokens=tokens)


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """Results of a forward and a backward pass.

    Attributes:
        losses: ``[n]``.
        tokens: gradient of the pack's tokens, ``[T, P]``.
        gradients: gradient of every parameter that has one, by name.
        rows: gradients of the modulations of every block and of the head, ``[n, 6C]`` and ``[n, 2C]``; of the packed
            model only.
    """

    losses: Tensor
    tokens: Tensor
    gradients: dict[str, Tensor]
    rows: tuple[Tensor, ...] = ()


def draw_pack(model: PixelFlowTransformer, grids: Grids, seed: int, text_length: int = 4) -> TrainingPack:
    """Draw images, targets, times, labels (including the null class and a repeated class) and padded prompts."""
    generator, count = seeded(seed), len(grids)
    channels = model.proj_out_2.out_features
    total = sum(rows * columns for rows, columns in grids)
    tokens, targets = normal((2, total, channels), generator, torch.float32).unbind()
    labels = text = None
    if model.num_classes > 0:
        labels = torch.randint(0, model.num_classes, (count,), generator=generator)
        labels[0] = labels[-1]
        labels[count // 2] = model.num_classes
    (block, *_) = model.transformer_blocks
    if block.crosses:
        states = normal((count, text_length, block.attn2.k_proj.in_features), generator, torch.float32)
        lengths = 1 + torch.arange(count) % text_length
        text = Text(states, (torch.arange(text_length) < lengths[:, None]).float())
    t_model = 999 * torch.rand(count, generator=generator)
    return TrainingPack(tuple(grids), tokens, targets, t_model, labels, text)


def packed_model(model: PixelFlowTransformer, operations: Operations | None, dtype: torch.dtype) -> PackedTransformer:
    """Return the packed model with a reference's weights, for training."""
    (block, *_) = model.transformer_blocks
    config = ModelConfig(
        num_attention_heads=block.attn1.heads,
        attention_head_dim=model.head_dim,
        depth=len(model.transformer_blocks),
        in_channels=model.patch_embed.proj.in_channels,
        out_channels=model.patch_embed.proj.in_channels,
        patch_size=model.patch_size,
        num_classes=model.num_classes,
        attention_bias=block.attn1.q_proj.bias is not None,
        cross_attention_dim=block.attn2.k_proj.in_features if block.crosses else None,
    )
    packed = PackedTransformer(config, operations)
    packed.load_state_dict(model.state_dict(), strict=True)
    return packed.to(dtype)


def velocities_of(model: PackedTransformer, pack: TrainingPack) -> Tensor:
    """Return velocities ``[T, P]`` in the model's type."""
    text = pack.text if pack.text is None else Text(pack.text.states.to(model.dtype), pack.text.mask)
    return model(pack.tokens, pack.t_model, pack.layout, pack.latent_size, pack.labels, text)


def losses_of(model: PackedTransformer, pack: TrainingPack) -> Tensor:
    """Return the training losses ``[n]``."""
    return image_losses(velocities_of(model, pack), pack.targets.to(model.dtype), pack.layout)


@contextmanager
def rows_of(model: PackedTransformer) -> Iterator[list[Tensor]]:
    """Collect the modulations of blocks and head (the head first or last) as they are made; retain their gradients."""
    rows: list[Tensor] = []

    def keep(module: nn.Module, given: Any, made: Tensor) -> None:
        if made.requires_grad:
            made.retain_grad()
            rows.append(made)

    makers = [*(block.norm1 for block in model.blocks), model.proj_out_1]
    hooks = [maker.register_forward_hook(keep) for maker in makers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def packed_step(model: PackedTransformer, pack: TrainingPack, images: int | None = None) -> Step:
    """Run forward and backward of the mean loss; for a part of a batch, ``images`` is the number in the whole batch."""
    tokens = pack.tokens.to(model.dtype, copy=True).requires_grad_()
    model.zero_grad(set_to_none=True)
    with rows_of(model) as rows:
        losses = losses_of(model, pack.with_tokens(tokens))
    losses.backward(torch.full_like(losses, 1 / (images or len(losses))))
    assert tokens.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(losses.detach(), tokens.grad, gradients, tuple(row.grad for row in rows if row.grad is not None))


def reference_losses(model: PixelFlowTransformer, pack: TrainingPack, images: list[Tensor] | None = None) -> Tensor:
    """Return losses ``[n]``, each image alone; of the pack's tokens unless ``images`` ``[1, c, h, w]`` are given."""
    dtype, p = model.proj_out_2.weight.dtype, model.patch_size
    losses = []
    for i in range(len(pack.grids)):
        conditions: dict[str, Any] = {} if pack.labels is None else {"class_labels": pack.labels[i : i + 1]}
        if pack.text is not None:
            mask = None if pack.text.mask is None else pack.text.mask[i : i + 1]
            states = pack.text.states[i : i + 1].to(dtype)
            conditions |= {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        x = image_of(pack.tokens.to(dtype), pack, i, p) if images is None else images[i]
        velocity = model(x, pack.t_model[i : i + 1], **conditions)
        losses.append(reference.training.loss([velocity], [image_of(pack.targets.to(dtype), pack, i, p)]))
    return torch.stack(losses)


def reference_step(model: PixelFlowTransformer, pack: TrainingPack, dtype: torch.dtype) -> Step:
    """Run the same step by the reference, each image alone, in type ``dtype``."""
    model = model.to(dtype).requires_grad_(True)
    model.zero_grad(set_to_none=True)
    count = len(pack.grids)
    images = [image_of(pack.tokens.to(dtype), pack, i, model.patch_size).requires_grad_() for i in range(count)]
    losses = reference_losses(model, pack, images)
    losses.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    tokens = torch.cat([patchify(x.grad, model.patch_size) for x in images if x.grad is not None])
    return Step(losses.detach(), tokens, gradients)


def image_of(tokens: Tensor, pack: TrainingPack, i: int, patch_size: int) -> Tensor:
    """Return an image of a pack, ``[1, c, h, w]``."""
    (rows, columns), part, p = pack.grids[i], pack.parts(tokens)[i], patch_size
    return unpatchify(part, (1, part.shape[1] // p**2, rows * p, columns * p), p).detach()


def assert_step(found: Step, plain: Step, truth: Step) -> None:
    """Assert level D for losses and gradients (input, parameters), by the reference's own error in the same type.

    For a parameter, both the largest error and the Euclidean norm of the error are bounded, each by its own bound.
    """
    assert_level_d(found.losses, plain.losses, truth.losses, "losses")
    assert_level_d(found.tokens, plain.tokens, truth.tokens, "gradient of tokens")
    assert found.gradients.keys() == truth.gradients.keys()
    unit = torch.finfo(found.losses.dtype).eps / 2
    largest = max(gradient.abs().max().item() for gradient in truth.gradients.values())
    for name, true in truth.gradients.items():
        gradient, own = found.gradients[name], plain.gradients[name]
        assert true.abs().max().item() > 1e-5 * largest, f"{name} has no gradient to compare"
        assert_level_d(gradient, own, true, f"gradient of {name}")
        error, allowed = ((x.double() - true).norm().item() for x in (gradient, own))
        bound = 2 * allowed + 2 * unit * true.norm().item()
        assert error <= bound, f"gradient of {name}: error {error:.3e}, bound {bound:.3e}"


# --- products whose rows are apart -------------------------------------------------------------------------


class _RowProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        out = _rows(x, weight)
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return _rows(grad, weight.t().contiguous()), grads.t() @ flat, grads.sum(0) if ctx.has_bias else None


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    return (x[..., None, :] * weight).sum(-1)


class RowByRow(TorchFunctionMode):
    """Computes linear maps, and the gradients of their inputs, with every row rounded independently.

    A library's product rounds differently for few rows than for many. With library products replaced, the rest of the
    model must give an image the same bits in any pack.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = (*args, *(kwargs or {}).values())
            return _RowProducts.apply(x, weight, bias[0] if bias else None)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
