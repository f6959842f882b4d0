"""PackedLayout against a literal walk over the tokens."""

import random

import pytest
import torch

from pixelflow_kernels import PackedLayout


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_says_where_each_token_belongs(seed: int) -> None:
    r = random.Random(seed)
    grids = [r.choice([(1, 1), (2, 3), (3, 2), (4, 4)]) for _ in range(r.randint(1, 9))]
    layout = PackedLayout.from_grids(grids)
    walk = [(i, y, x) for i, (rows, columns) in enumerate(grids) for y in range(rows) for x in range(columns)]
    assert list(zip(*(t.tolist() for t in (layout.image_index, layout.row, layout.column)), strict=True)) == walk
    assert layout.cu_seqlens.tolist() == [sum(a * b for a, b in grids[:i]) for i in range(len(grids) + 1)]
    assert all(t.dtype == torch.int32 for t in (layout.cu_seqlens, layout.image_index, layout.row, layout.column))
    assert (layout.num_images, layout.num_tokens) == (len(grids), len(walk))
    assert layout.max_seqlen == max(a * b for a, b in grids)
    assert layout.max_position == max(max(g) for g in grids)
    lengths = {a * b for a, b in grids}
    assert layout.multiple_of == max(m for m in range(1, 17) if all(n % m == 0 for n in lengths))


def test_runs_cover_the_pack_and_join_equal_neighbours() -> None:
    layout = PackedLayout.from_grids([(2, 2), (2, 2), (1, 4), (2, 2)])
    assert [run.grid for run in layout.runs] == [(2, 2), (1, 4), (2, 2)]
    assert [run.count for run in layout.runs] == [2, 1, 1]
    assert [(r.tokens.start, r.tokens.stop) for r in layout.runs] == [(0, 8), (8, 12), (12, 16)]
    assert [(r.images.start, r.images.stop) for r in layout.runs] == [(0, 2), (2, 3), (3, 4)]


def test_an_empty_pack() -> None:
    layout = PackedLayout.from_grids([])
    assert (layout.num_images, layout.num_tokens, layout.max_seqlen, layout.max_position) == (0, 0, 0, 0)
    assert layout.cu_seqlens.tolist() == [0]
    assert layout.multiple_of == 1
    assert layout.runs == ()


@pytest.mark.parametrize("grid", [(0, 1), (2, -1), (2,), (1, 2, 3), (1.0, 2)])
def test_bad_grids_are_refused_by_place(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"grids\[1\].*expected two positive integers"):
        PackedLayout.from_grids([(1, 1), grid])
