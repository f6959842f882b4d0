"""What the tests of attention rely on: packs that move to a device, and bounds that refuse what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.attention import Pack, gradient_of, pack
from support.attention_roundings import NAMES, Roundings, exact, rounded


@pytest.mark.parametrize("lengths", [[1], [5, 3], [0], []])
@pytest.mark.parametrize("odd", [False, True])
def test_a_pack_moves_with_its_values_and_strides(lengths: list[int], odd: bool) -> None:
    of = pack(lengths, None, 2, 8, odd=odd)
    moved = of.to("cpu")
    for a, b in zip(of[:5], moved[:5], strict=True):
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b)
        assert a.shape[0] < 2 or a.stride() == b.stride()
    assert moved[5:] == of[5:]


# --- errors in 16 bits -------------------------------------------------------------------------------------

BF16, FP16 = torch.bfloat16, torch.float16
PACKS: dict[str, Callable[[torch.dtype], Pack]] = {
    "ragged": lambda dtype: pack([64, 1, 0, 129], None, 2, 72, dtype),
    "cross": lambda dtype: pack([70, 5, 3], [33, 0, 200], 2, 24, dtype, odd=True),
    "long": lambda dtype: pack([1100], None, 1, 64, dtype),
    "small head": lambda dtype: pack([1, 63, 65, 130], None, 1, 8, dtype),
    "large logits": lambda dtype: pack([64, 150], None, 1, 72, dtype, largest_logit=150, rising=True),
}


def swapped(x: Tensor) -> Tensor:
    """The two largest tokens have changed places."""
    one, other = x.double().flatten(1).norm(dim=1).topk(2).indices
    changed = x.clone()
    changed[one], changed[other] = x[other], x[one]
    return changed


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "half": lambda x: x / 2,
    "negated": torch.neg,
    "larger by a fiftieth": lambda x: x * 1.02 if x.dtype == BF16 else x * 1.01,
    "two tokens swapped": swapped,
    "a channel is missing": lambda x: torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1),
    "not a number": lambda x: torch.where(x == x.flatten()[3], torch.nan, x),
}


def refused(roundings: Roundings, name: str, found: Tensor) -> bool:
    """Whether the check fails."""
    try:
        roundings.check(name, found)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_in_16_bits_the_bounds_hold_for_roundings_and_for_nothing_else(name: str, dtype: torch.dtype) -> None:
    of = PACKS[name](dtype)
    grad = gradient_of(of)
    roundings = Roundings(of, grad)
    for result, model, true in zip(NAMES, rounded(of, grad), exact(of, grad), strict=True):
        right = model.transpose(0, 1).to(dtype)
        roundings.check(result, right)
        roundings.check(result, true.transpose(0, 1).to(dtype))
        for fault, change in WRONG.items():
            assert refused(roundings, result, change(right)), f"{result} passes: {fault}"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_mistakes_of_a_kernel_are_refused(dtype: torch.dtype) -> None:
    """Delta of another output, eight keys that read as zero, a scale that is off by a hundredth."""
    of = pack([96, 40], None, 2, 64, dtype)
    grad = gradient_of(of)
    roundings, right = Roundings(of, grad), rounded(of, grad)
    for wrong, concerned in (
        (of._replace(v=of.v * 1.02), "out dq dk"),
        (of._replace(k=torch.cat([of.k[:-8], torch.zeros_like(of.k[-8:])])), "out dq dk dv"),
        (of._replace(scale=of.scale * 1.01), "out dq dk dv"),
    ):
        for name, result, own in zip(NAMES, rounded(wrong, grad), right, strict=True):
            assert torch.equal(result, own) != (name in concerned.split())
            assert refused(roundings, name, result.transpose(0, 1).to(dtype)) == (name in concerned.split()), name


def test_without_keys_everything_is_zero() -> None:
    of = pack([3], [0], 1, 8, BF16)
    roundings, zero = Roundings(of, gradient_of(of)), torch.zeros_like(of.q)
    roundings.check("dq", zero)
    assert refused(roundings, "dq", zero + 1)
