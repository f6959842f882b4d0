"""Keys and values of a call's prompts, projected once and distributed to its packs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixelflow_kernels.transfers import numbers

from .model import PackedTransformer, Prompts
from .operations import Text


@dataclass(frozen=True, eq=False, slots=True)
class _Tokens:
    """Tokens of all prompts one after another, including padding: ``states [d * L, E]``."""

    states: Tensor


class ProjectedPrompts:
    """The prompts of a call, projected for every block of a model.

    An empty prompt shared by all images is projected once. Prompts that happen to be equal are projected separately:
    the number of rows of a product decides how it rounds, so it must not depend on an image's batch mates.

    Args:
        model: a model with cross-attention.
        text: one prompt per image.
        null: the empty prompt, one for all images or one per image; None without guidance.
    """

    def __init__(self, model: PackedTransformer, text: Text, null: Text | None) -> None:
        whole = text if null is None else Text.concatenate(null, text)
        self.operations = model.operations
        self.nulls = 0 if null is None else len(null.states)
        self.mask = whole.mask
        self.shape = whole.states.shape[:2]
        tokens = _Tokens(whole.states.flatten(0, 1))
        attentions = [block.attn2 for block in model.blocks if block.attn2 is not None]
        self.keys = tuple(attention.text_keys(tokens, self.operations) for attention in attentions)

    def pack(self, guided: int) -> Prompts:
        """Prompts of a pack: the empty prompt of each guided image, then the prompt of every image."""
        count, length = self.shape
        device = self.keys[0][0].device
        nulls = [0] * guided if self.nulls == 1 else [*range(guided)]
        rows = numbers([*nulls, *range(self.nulls, count)], torch.int64, device)
        # The operations choose the order of the tokens. They are given token indices in place of states, and the keys
        # and values are gathered in the resulting order.
        places = torch.arange(count * length, device=device).view(count, length, 1)
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        text = self.operations.text_tokens(Text(places.index_select(0, rows), mask))
        order = text.states[..., 0]
        return Prompts(text, tuple((k[order], v[order]) for k, v in self.keys))
