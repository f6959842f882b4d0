"""The images of a stage as a pack of tokens, and the velocity of their state.

The pack of an evaluation holds the null halves of the guided images, then their conditional halves, then the images
without guidance. During a stage the state stays in the order in which the model's head produces velocities: ``[T, W]``,
image after image, with the ``W = p * p * c`` values of each token in (row, column, channel) order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.transfers import numbers, pinned, uploaded

from .model import PackedTransformer, Surroundings
from .noise import Shape
from .plan import Condition, StagePlan
from .stages import States

MOST_LAYOUTS = 32
"""Maximum number of layouts that an engine keeps, at twelve bytes per token of host memory."""


class Layouts:
    """A cache of layouts on the host, because batches of the same sizes recur.

    Layouts stay on the host because a device tensor is ordered with one stream; each use uploads a copy on the caller's
    stream.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, int], ...], PackedLayout] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of cached layouts."""
        return len(self._kept)

    def on(self, device: torch.device, grids: Sequence[tuple[int, int]]) -> PackedLayout:
        """The layout, on ``device``, of images with these numbers of rows and columns of tokens."""
        key = tuple(grids)
        with self._lock:
            layout = self._kept.pop(key, None) or _pinned(PackedLayout.from_grids(key), device)
            self._kept[key] = layout  # dictionaries keep insertion order
            while len(self._kept) > MOST_LAYOUTS:
                self._kept.pop(next(iter(self._kept)))
        return layout if device.type == "cpu" else _with(layout, lambda x: uploaded(x, device))


def _pinned(layout: PackedLayout, device: torch.device) -> PackedLayout:
    return _with(layout, lambda x: pinned(x, device))


def _with(layout: PackedLayout, change: Callable[[Tensor], Tensor]) -> PackedLayout:
    return replace(
        layout,
        cu_seqlens=change(layout.cu_seqlens),
        image_index=change(layout.image_index),
        row=change(layout.row),
        column=change(layout.column),
    )


class StagePack:
    """The pack of a stage: which tokens belong to which image.

    Args:
        model: the transformer, with concatenated weights (:mod:`pixelflow_engine.fusion`).
        plan: shapes and weights of the stage; images with a null half come first.
        layouts: cache of layouts.

    Attributes:
        tokens: number of tokens of the state.
        guided_tokens: number of tokens of the images that have a null half.
        latent_size: ``[n]``, width in tokens of each image of the pack, the model's resolution input.
    """

    def __init__(self, model: PackedTransformer, plan: StagePlan, layouts: Layouts | None = None) -> None:
        p = model.config.patch_size
        grids = [(h // p, w // p) for count, _, h, w in plan.shapes for _ in range(count)]
        pack = grids[: plan.guided] + grids
        self.grids = pack
        self.columns = [columns for _, columns in pack]
        self.model = model
        self.plan = plan
        self.sizes = [rows * columns for rows, columns in grids]
        self.layouts = Layouts() if layouts is None else layouts
        self.tokens = sum(self.sizes)
        self.guided_tokens = sum(self.sizes[: plan.guided])
        self.latent_size = numbers(self.columns, torch.int64, model.device)
        self.width = p * p * model.config.in_channels

    @cached_property
    def layout(self) -> PackedLayout:
        """Layout of an evaluation, null halves included; created on first access, as cached programs have their own."""
        return self.layouts.on(self.model.device, self.grids)

    def guidance(self) -> Tensor | None:
        """Weights of the guided images, float64; None without guidance.

        Returns:
            ``[1]`` if all weights are equal, otherwise one weight per token of the guided images.
        """
        weights = self.plan.weights[: self.plan.guided]
        if not weights:
            return None
        device = self.model.device
        if len({*weights}) == 1:
            return numbers(weights[:1], torch.float64, device)
        each = torch.tensor(weights, dtype=torch.float64, device="cpu")
        sizes = torch.tensor(self.sizes[: self.plan.guided], device="cpu")
        return uploaded(each.repeat_interleave(sizes, output_size=self.guided_tokens), device)

    def labels(self, condition: Condition) -> Tensor | None:
        """Class labels of the pack, ``[n]``; None without class labels."""
        labels = condition.class_labels
        if labels is None:
            return None
        return torch.cat([labels.new_full((self.plan.guided,), self.model.config.num_classes), labels])

    def velocity(self, x: Tensor, modulations: tuple[Tensor, ...], around: Surroundings) -> Tensor:
        """Velocities of the whole pack in the model's dtype; patches are embedded once for both halves.

        Args:
            x: the state ``[T, W]``.
            modulations: modulations of the pack's images.
            around: layout, rotary tables and prompts of the pack.

        Returns:
            ``[guided tokens + T, W]``.
        """
        return self.model.trunk(self._embedded(x), modulations, around)  # no reference kept here: freed in the trunk

    def _embedded(self, x: Tensor) -> Tensor:
        embedded = self.model.patch_embed.embed_by_pixel(x.to(self.model.dtype))
        return torch.cat([embedded[: self.guided_tokens], embedded]) if self.guided_tokens else embedded

    def pack(self, states: States) -> Tensor:
        """``[B_g, c, h, w]`` of each group to ``[T, W]``."""
        p = self.model.config.patch_size
        return torch.cat([_to_tokens(x, p).reshape(-1, self.width) for x in states])

    def unpack(self, x: Tensor) -> list[Tensor]:
        """The inverse of :meth:`pack`; the results own their memory."""
        p = self.model.config.patch_size
        sizes = [batch * (height // p) * (width // p) for batch, _, height, width in self.plan.shapes]
        return [_to_images(part, shape, p) for part, shape in zip(x.split(sizes), self.plan.shapes, strict=True)]


def _to_tokens(x: Tensor, p: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)


def _to_images(tokens: Tensor, shape: Shape, p: int) -> Tensor:
    batch, channels, height, width = shape
    grid = tokens.reshape(batch, height // p, width // p, p, p, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).clone(memory_format=torch.contiguous_format).view(shape)


class ModulationTable:
    """The modulations of all steps of a stage, computed by one product before the first step.

    Null halves of images with the same width in tokens share a row, and so do images of one width in a model without
    classes. Images that happen to have the same class do not: the number of rows of a product decides how it rounds, so
    it must not depend on an image's batch mates.

    Args:
        pack: the stage's pack.
        condition: class labels and prompts.
        t_model: the ``m`` model times at which slopes are evaluated.
    """

    def __init__(self, pack: StagePack, condition: Condition, t_model: Sequence[float]) -> None:
        model, labels = pack.model, pack.labels(condition)
        own = range(pack.plan.guided, len(pack.columns)) if labels is not None else ()
        told = [(columns, i if i in own else None) for i, columns in enumerate(pack.columns)]
        rows = {key: row for row, key in enumerate(dict.fromkeys(told))}
        firsts = numbers([told.index(key) for key in rows], torch.int64, model.device)
        self.row = numbers([rows[key] for key in told], torch.int64, model.device)
        times = uploaded(torch.tensor(t_model, dtype=torch.float64, device="cpu").to(torch.float32), model.device)
        moments = len(times)
        c = model.conditioning(
            times.repeat_interleave(len(rows)),
            pack.latent_size[firsts].repeat(moments),
            None if labels is None else labels[firsts].repeat(moments),
        )
        self.rows = model.all_modulations_of(F.silu(c)).unflatten(0, (moments, len(rows)))

    def at(self, moment: int) -> Tensor:
        """``[n, (6 depth + 2) C]`` for the pack's images, in the model's dtype."""
        return self.rows[moment].index_select(0, self.row)
