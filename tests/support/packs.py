"""Hypothesis strategies for ragged packs, and the number of examples.

A normal run draws the same few examples every time. PIXELFLOW_FUZZ=N (`make fuzz`) draws N times as many, at random.
PIXELFLOW_SHRINK=0 stops at the first failure, for kernels broken on purpose: under the interpreter, shrinking is slow.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

CORNERS = (1, 63, 64, 65)  # around the tiles' edges
CORNER_GRIDS = ((1, 1), (7, 9), (8, 8), (5, 13), (1, 64), (65, 1))
HEAD_DIMS = (8, 16, 24, 64, 72, 80, 96, 128)
FUZZ = int(os.environ.get("PIXELFLOW_FUZZ", "1"))
PHASES = [Phase.explicit, Phase.generate, *([Phase.shrink] if os.environ.get("PIXELFLOW_SHRINK") != "0" else [])]


def draws(count: int) -> Any:
    """Decorate a test to draw ``count`` examples, the same in every normal run; PIXELFLOW_FUZZ: more, random."""
    return settings(
        max_examples=count * FUZZ,
        phases=PHASES,
        derandomize=FUZZ == 1,
        deadline=None,
        database=None,
        print_blob=FUZZ > 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


@st.composite
def lengths(
    draw: st.DrawFn,
    *,
    max_members: int = 6,
    max_length: int = 600,
    max_tokens: int = 600,
    min_length: int = 1,
    min_members: int = 0,
) -> list[int]:
    """Draw the tokens of each member of a pack: corner lengths and any others, at most ``max_tokens`` in total.

    Members without tokens occur if ``min_length`` is 0, the empty pack if ``min_members`` is 0.
    """
    corners = [n for n in (0, *CORNERS) if min_length <= n <= max_length]
    any_length = st.integers(min_length, max_length)
    one = st.one_of(st.sampled_from(corners), any_length) if corners else any_length
    drawn = draw(st.lists(one, min_size=min_members, max_size=max_members))
    kept: list[int] = []
    for n in drawn:
        room = max_tokens - sum(kept) - min_length * (min_members - len(kept) - 1 if len(kept) < min_members else 0)
        if n <= room:
            kept.append(n)
        elif len(kept) < min_members:
            kept.append(max(min(n, room), min_length))
    return kept


@st.composite
def grids(
    draw: st.DrawFn, *, max_members: int = 6, max_length: int = 600, max_tokens: int = 600, min_members: int = 0
) -> list[tuple[int, int]]:
    """Draw rows and columns of each image, at most ``max_tokens`` tokens in total; equal neighbours are common."""
    corners = [g for g in CORNER_GRIDS if g[0] * g[1] <= max_length]
    kept: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(min_members, max_members))):
        room = min(max_length, max_tokens - sum(r * c for r, c in kept))
        if room < 1:
            break
        rows = draw(st.integers(1, min(room, 24)))
        grid = (rows, draw(st.integers(1, min(room // rows, 24))))
        choices = [grid, *([kept[-1]] if kept else []), *corners]
        chosen = draw(st.sampled_from([g for g in choices if g[0] * g[1] <= room]))
        kept.append(chosen)
    return kept


def head_dims(*, largest: int = 128) -> st.SearchStrategy[int]:
    """Draw multiples of 8: the published head sizes, the small model's, and others."""
    return st.sampled_from([d for d in HEAD_DIMS if d <= largest])


def heads(largest: int = 16) -> st.SearchStrategy[int]:
    """Draw a number of heads; small ones are more likely."""
    return st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, largest)).filter(lambda n: n <= largest)


def seeds() -> st.SearchStrategy[int]:
    """Draw seeds for values; a failing example shows its seed."""
    return st.integers(0, 2**31 - 1)


def interpreted_types() -> st.SearchStrategy[torch.dtype]:
    """Draw a type that the interpreter computes faithfully."""
    return st.sampled_from([torch.float32, torch.float64])


def types() -> st.SearchStrategy[torch.dtype]:
    """Draw any type that the operations take."""
    return st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def stds() -> st.SearchStrategy[float]:
    """Draw a standard deviation of inputs."""
    return st.sampled_from([0.02, 0.3, 1.0])
