"""A pack's layout is made once for all calls with the same sizes, and the host keeps so many of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixelflow_engine import stage_pack
from pixelflow_engine.stage_pack import Layouts
from pixelflow_kernels import PackedLayout
from support.recording import RecordingCapture, packed_engine

CPU = torch.device("cpu")
FIELDS = ("cu_seqlens", "cu_seqlens_and_none", "image_index", "row", "column")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The grids of every layout that was made."""
    grids: list[Any] = []
    original = PackedLayout.from_grids

    def seen(of: Any, device: Any = None) -> PackedLayout:
        grids.append(tuple(of))
        return original(grids[-1], device)

    monkeypatch.setattr(PackedLayout, "from_grids", seen)
    return grids


@pytest.mark.parametrize("graphs", [False, True])
def test_a_call_of_known_sizes_makes_no_layout(graphs: bool, made: list[Any]) -> None:
    engine = packed_engine(RecordingCapture() if graphs else None)
    for call in ({"seed": 1}, {"seed": 2, "guidance_scale": 3.0}, {"solver": "heun"}, {"solver": "ab2", "shift": 2.0}):
        engine([1, 2], num_inference_steps=2, output_type="pt", **call)
    assert len(made) == 3, "one a stage"
    engine([1, 2, 3], num_inference_steps=2, output_type="pt", seed=1)
    assert len(made) == 6


def test_a_kept_layout_is_the_layout() -> None:
    layouts = Layouts()
    for grids in ([(2, 3)], [(2, 2), (4, 2)], [(2, 3)]):
        found, expected = layouts.on(CPU, grids), PackedLayout.from_grids(grids)
        assert found.grids == expected.grids
        assert found.runs == expected.runs
        assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in FIELDS)
    assert len(layouts) == 2


def test_the_one_used_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
    monkeypatch.setattr(stage_pack, "MOST_LAYOUTS", 2)
    layouts = Layouts()
    for side in (1, 2, 1, 3, 1, 2):
        layouts.on(CPU, [(side, side)])
        assert len(layouts) <= 2
    assert [grids[0][0] for grids in made] == [1, 2, 3, 2]
