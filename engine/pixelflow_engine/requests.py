"""Requests for single images, and how the images of a call are sorted into groups that run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_kernels.transfers import uploaded

from .operations import Text
from .plan import Condition, Group

K = TypeVar("K")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Request:
    """One image of a call with mixed sizes, labels or guidance.

    A seed, guidance scale, size or prompt of None is taken from the call.

    Attributes:
        class_label: required for a class-conditional model.
        seed: seed of its noise, 0 to 2^64 - 1; None for the one that the call's ``seed`` gives to its place.
        guidance_scale: as in the call; not allowed if the call's ``guidance_schedule`` is a list.
        height, width: in pixels.
        encoder_hidden_states: an encoded prompt ``[L, E]``, for a text-conditional model; lengths may differ. Either
            all requests of a call have one, or none does and the call gives prompts for all.
    """

    class_label: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    encoder_hidden_states: Tensor | None = None


def padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad prompts ``[L_i, E]`` to ``[B, L, E]``; also returns their mask ``[B, L]``, on the host."""
    longest = max(len(prompt) for prompt in prompts)
    states = torch.stack([F.pad(prompt, (0, 0, 0, longest - len(prompt))) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
    return states, (torch.arange(longest, device="cpu") < lengths[:, None]).float()


@dataclass(frozen=True, slots=True)
class Lot:
    """Images that run together.

    Attributes:
        order: place in the call of each image, group after group; a repeated place is a copy, see :meth:`filled`.
        groups: groups of images of one size; those with null halves come first.
    """

    order: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def places(self) -> list[tuple[int, ...]]:
        """The places in the call of each group's images."""
        found, first = [], 0
        for group in self.groups:
            found.append(self.order[first : first + len(group.weights)])
            first += len(group.weights)
        return found

    def filled(self, sizes: Sequence[int]) -> Lot:
        """Pad each group to the next of ``sizes``, in ascending order, with copies of its last image."""
        order: list[int] = []
        groups = []
        for group, places in zip(self.groups, self.places, strict=True):
            copies = next((size for size in sizes if size >= len(places)), len(places)) - len(places)
            order += [*places, *places[-1:] * copies]
            groups.append(replace(group, weights=group.weights + group.weights[-1:] * copies))
        return Lot(tuple(order), tuple(groups))

    def of(self, condition: Condition) -> Condition:
        """This lot's part of the call's condition, on the condition's device."""
        at = torch.tensor(self.order, device="cpu")
        labels, text, null = condition.class_labels, condition.text, condition.null_text
        return Condition(
            class_labels=None if labels is None else labels[at],
            text=None if text is None else _rows(text, at),
            null_text=null if null is None or len(null.states) == 1 else _rows(null, at),
        )


def sort_into_lots(
    sizes: Sequence[tuple[int, int]],
    weights: Sequence[tuple[float, ...]],
    mixed: bool,
    batch_sizes: Sequence[int] | None = None,
) -> tuple[Lot, ...]:
    """Sort the images of a call into lots.

    Args:
        sizes: height and width of each image.
        weights: guidance weights of each image, one per stage.
        mixed: whether a lot may hold images of any sizes and weights; otherwise all its images have the same size and
            weights.
        batch_sizes: in ascending order; a lot has at most as many requested images as the largest, and each of its
            groups is padded to one of these sizes.
    """
    kinds = [[*range(len(sizes))]] if mixed else list(_by_key(list(zip(sizes, weights, strict=True))).values())
    if batch_sizes is None:
        return tuple(_lot(kind, sizes, weights) for kind in kinds)
    most = batch_sizes[-1]
    parts = [kind[first : first + most] for kind in kinds for first in range(0, len(kind), most)]
    return tuple(_lot(part, sizes, weights).filled(batch_sizes) for part in parts)


def _lot(images: Sequence[int], sizes: Sequence[tuple[int, int]], weights: Sequence[tuple[float, ...]]) -> Lot:
    """Sort these images into groups."""
    alike = _by_key([(_unguided(weights[i]), sizes[i]) for i in images])
    keys = sorted(alike, key=lambda key: key[0])
    places = [[images[at] for at in alike[key]] for key in keys]
    groups = [Group(*size, tuple(weights[i] for i in part)) for (_, size), part in zip(keys, places, strict=True)]
    return Lot(tuple(i for part in places for i in part), tuple(groups))


def _unguided(weights: tuple[float, ...]) -> int:
    """Number of stages without a null half; images of a call for which it is equal agree at every stage."""
    return sum(weight == 1 for weight in weights)


def _by_key(keys: Sequence[K]) -> dict[K, list[int]]:
    found: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


def _rows(text: Text, at: Tensor) -> Text:
    if torch.equal(at, torch.arange(len(text.states), device="cpu")):
        return text
    mask = None if text.mask is None else text.mask.index_select(0, uploaded(at, text.mask.device))
    return Text(text.states.index_select(0, uploaded(at, text.states.device)), mask)
