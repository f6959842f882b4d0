"""Keys and values of a call's prompts, projected once and handed out to its packs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .model import PackedTransformer, Prompts
from .operations import Text
from .uploads import numbers


@dataclass(frozen=True, eq=False, slots=True)
class _Tokens:
    """Tokens of all prompts one after another, padding too: ``states [d * L, E]``."""

    states: Tensor


class ProjectedPrompts:
    """The prompts of a call for every block of a model.

    An empty prompt that is one for all images is projected once. Prompts that happen to be equal are not: how many rows
    a product has, and so how it rounds, depends on no image's neighbours.

    Args:
        model: with cross-attention.
        text: a prompt for each image.
        null: the empty prompt, one for all or one for each; None where nobody is guided.
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
        """Those of a pack: the empty prompt of each guided image, then every image's own."""
        count, length = self.shape
        device = self.keys[0][0].device
        nulls = [0] * guided if self.nulls == 1 else [*range(guided)]
        rows = numbers([*nulls, *range(self.nulls, count)], torch.int64, device)
        # The operations decide in which order they want tokens: they are handed numbers in place of states.
        places = torch.arange(count * length, device=device).view(count, length, 1)
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        text = self.operations.text_tokens(Text(places.index_select(0, rows), mask))
        order = text.states[..., 0]
        return Prompts(text, tuple((k[order], v[order]) for k, v in self.keys))
