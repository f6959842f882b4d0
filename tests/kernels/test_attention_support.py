"""What the tests of attention for GPUs need before they start, without a GPU."""

from __future__ import annotations

import pytest
import torch

from support.attention import pack


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
