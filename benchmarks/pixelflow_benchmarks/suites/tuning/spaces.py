"""Candidate launch configurations, as data: a list per kernel, the most important kernel first.

The present configuration is always tried as well. A list serves all architectures: a configuration that does not fit
one of them is recorded as failed there and not chosen. Configurations that spill on sm_90 in bf16, as found by
compiling ahead of time, are left out.
"""

from __future__ import annotations

from itertools import product

Config = dict[str, int]


def grid(*axes: tuple[Config, ...]) -> tuple[Config, ...]:
    """Return every combination of one entry of each axis."""
    return tuple({key: value for part in parts for key, value in part.items()} for parts in product(*axes))


def axis(name: str, *values: int | None) -> tuple[Config, ...]:
    """Return one entry per value of a key; None leaves the key out."""
    return tuple({} if value is None else {name: value} for value in values)


def tiles(*sizes: tuple[int, int, int]) -> tuple[Config, ...]:
    """Return entries of ``BLOCK_M``, ``BLOCK_N`` and ``num_warps``.

    Sizes must give every warp at least 16 rows of its own in the products' first operand: then sums along a row never
    cross warps, and their order does not depend on the number of warps.
    """
    return tuple({"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps} for m, n, warps in sizes)


_VALUES = grid(axis("BLOCK", 256, 512, 1024, 2048), axis("num_warps", 2, 4, 8))  # for kernels that work value by value

SPACES: dict[str, tuple[Config, ...]] = {
    "varlen_attention.forward": grid(
        tiles((64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8)),
        axis("num_stages", 2, 3),
        axis("FIXED_MAX_TILES", None, 4, 8, 16),
    ),
    "varlen_attention.backward_keys": grid(
        tiles((32, 64, 4), (64, 64, 4), (32, 128, 8), (64, 128, 8)),
        axis("num_stages", 1, 2, 3),
    ),
    "varlen_attention.backward_queries": grid(
        tiles((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)),
        axis("num_stages", 1, 2, 3),
    ),
    "varlen_attention.backward_delta": grid(axis("BLOCK_M", 16, 32, 64, 128), axis("num_warps", 2, 4, 8)),
    "rope2d.forward": axis("num_warps", 1, 2, 4),
    "rope2d.backward": (*axis("num_warps", 1, 2, 4), {"num_warps": 1, "maxnreg": 255}),
    "rope2d.rotate": axis("num_warps", 1, 2, 4),
    "modulate.forward": axis("num_warps", 1, 2, 4),
    "modulate.backward": grid(axis("TOKENS", 8, 16, 32, 64), axis("num_warps", 2, 4, 8)),
    "modulate.sum": grid(axis("BLOCK_SLOTS", 16, 32, 64), axis("BLOCK_CHANNELS", 64, 128), axis("num_warps", 4, 8)),
    "ode_step.euler": _VALUES,
    "ode_step.stage": _VALUES,
    "ode_step.error": _VALUES,
    "ode_step.accept": _VALUES,
    "cascade.renoise": grid(axis("BLOCK_R", 4, 8, 16), axis("BLOCK_C", 16, 32, 64, 128), axis("num_warps", 4, 8)),
    "cascade.pairs": grid(axis("BLOCK", 1024, 2048, 4096), axis("num_warps", 2, 4, 8)),
    "adamw.update": _VALUES,
    "adamw.squares": _VALUES,
    "cascade.initial": grid(axis("BLOCK", 256, 512, 1024), axis("num_warps", 2, 4, 8)),
}

TIED = {"varlen_attention.forward": ("BLOCK_N", "FIXED_MAX_TILES")}
"""Keys that must have the same value in the shape classes of short and of long sequences, as they determine bits."""

LENGTHS = ("short", "long")
"""Endings of the names of tied shape classes."""
