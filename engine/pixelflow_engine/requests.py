"""What a caller asks for, image by image, and how images are sorted into groups that run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .operations import Text
from .plan import Condition, Group

K = TypeVar("K")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Request:
    """One image of a mixed call. What is None is taken from the call.

    Attributes:
        class_label: for a class-conditional model.
        seed: of its noise, 0 to 2^64 - 1; None for a fresh one.
        guidance_scale: as in the call.
        height, width: in pixels.
        encoder_hidden_states: an encoded prompt ``[L, E]``, for a text-conditional model; lengths may differ.
    """

    class_label: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    encoder_hidden_states: Tensor | None = None


def padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts ``[L_i, E]`` as ``[B, L, E]`` and their mask ``[B, L]``."""
    longest = max(len(prompt) for prompt in prompts)
    states = torch.stack([F.pad(prompt, (0, 0, 0, longest - len(prompt))) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=states.device)
    return states, (torch.arange(longest, device=states.device) < lengths[:, None]).float()


@dataclass(frozen=True, slots=True)
class Lot:
    """Images that run together.

    Attributes:
        order: their places in the call, group after group.
        groups: images of one size each; those with null halves first.
    """

    order: tuple[int, ...]
    groups: tuple[Group, ...]

    def of(self, condition: Condition) -> Condition:
        """The lot's part of the call's condition."""
        at = list(self.order)
        labels, text, null = condition.class_labels, condition.text, condition.null_text
        return Condition(
            class_labels=None if labels is None else labels[at],
            text=None if text is None else _rows(text, at),
            null_text=None if null is None else _rows(null, at),
        )


def sort_into_lots(
    sizes: Sequence[tuple[int, int]], weights: Sequence[tuple[float, ...]], mixed: bool
) -> tuple[Lot, ...]:
    """Sort the images of a call.

    Args:
        sizes: height and width of each image.
        weights: guidance weights of each image, one per stage.
        mixed: images of any sizes and weights can be one lot; otherwise a lot has one size and one weight.
    """
    if mixed:
        keys = [(_unguided(w), size) for size, w in zip(sizes, weights, strict=True)]
        places = _by_key(keys)
        order = tuple(i for key in sorted(places, key=lambda key: key[0]) for i in places[key])
        groups = [
            Group(*key[1], tuple(weights[i] for i in places[key])) for key in sorted(places, key=lambda key: key[0])
        ]
        return (Lot(order, tuple(groups)),)
    alike = _by_key(list(zip(sizes, weights, strict=True)))
    return tuple(Lot(tuple(at), (Group(*size, (w,) * len(at)),)) for (size, w), at in alike.items())


def _unguided(weights: tuple[float, ...]) -> int:
    """How many stages go without a null half; a call's images differ in all stages or in none."""
    return sum(weight == 1 for weight in weights)


def _by_key(keys: Sequence[K]) -> dict[K, list[int]]:
    found: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


def _rows(text: Text, at: list[int]) -> Text:
    return Text(text.states[at], None if text.mask is None else text.mask[at])
