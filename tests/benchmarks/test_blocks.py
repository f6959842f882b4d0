"""What a transformer block launches and moves, counted on fake tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pixelflow_benchmarks.harness.results import newest, read_runs, result_files
from pixelflow_benchmarks.harness.tracing import TracedOp, fake, fake_cuda, tracing
from pixelflow_benchmarks.suites import blocks
from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES, WIDTH
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.operations import Operations, PlainOperations

SEQUENCES, SIDE = 32, STAGE_SIDES[3]
VALUES = SEQUENCES * SIDE * SIDE * WIDTH


class PlainGelu(FusedOperations):
    linear_gelu = PlainOperations.linear_gelu


class PlainResidual(FusedOperations):
    add_gated_rms_norm_modulate = PlainOperations().add_gated_rms_norm_modulate


def record(operations: Operations, side_by_side: bool = True) -> dict[str, Any]:
    return blocks.block_record("x", blocks.trace_engine_block(operations, side_by_side, SEQUENCES, SIDE), VALUES)


def test_the_fused_block_launches_and_moves_little() -> None:
    found = record(FusedOperations("triton"))
    assert found["launches"] <= 12
    assert found["bytes_per_value"]["pointwise"] <= 40
    assert [op["name"] for op in found["ops"]] == [
        "addmm", "norm_rope2d", "varlen_attention", "addmm", "add_norm_modulate", "_addmm_activation", "addmm",
        "add_norm_modulate",
    ]  # fmt: skip
    # q and k in and out; residual and branch in, residual and norm out, twice; weights and rows are nothing beside.
    assert found["bytes_per_value"]["pointwise"] == pytest.approx(8 + 8 + 8, rel=0.01)
    assert found["pointwise_launches"] == 3


def test_a_block_with_text_has_five_launches_more() -> None:
    """Queries, their norm and places, attention, its projection, and one more residual with a norm.

    Twelve bytes more: q in and out; residual and branch in, residual and norm out.
    """
    ops = blocks.trace_engine_block(FusedOperations("triton"), True, SEQUENCES, SIDE, text=True)
    found, without = blocks.block_record("text", ops, VALUES), record(FusedOperations("triton"))
    assert found["launches"] == without["launches"] + 5 == 13
    assert [op["name"] for op in found["ops"]] == [
        "addmm", "norm_rope2d", "varlen_attention", "addmm", "add_norm_modulate", "addmm", "norm_rope2d",
        "varlen_attention", "addmm", "add_norm_modulate", "_addmm_activation", "addmm", "add_norm_modulate",
    ]  # fmt: skip
    more = found["bytes_per_value"]["pointwise"] - without["bytes_per_value"]["pointwise"]
    assert more == pytest.approx(4 + 8, rel=0.01)
    assert found["bytes_per_value"]["pointwise"] <= 40


@pytest.mark.parametrize(
    ("operations", "side_by_side", "more_launches", "more_bytes"),
    [
        (FusedOperations("triton"), False, 2, 0),
        (PlainGelu("triton"), True, 1, 16),  # four times the width in and out
        (PlainResidual("triton"), True, 10, 60),
        (PlainOperations(), True, 55, 300),
    ],
    ids=["three products", "gelu apart", "residual apart", "plain"],
)
def test_what_is_not_fused_counts(
    operations: Operations, side_by_side: bool, more_launches: int, more_bytes: float
) -> None:
    fused, found = record(FusedOperations("triton")), record(operations, side_by_side)
    assert found["launches"] >= fused["launches"] + more_launches
    more = found["bytes_per_value"]["pointwise"] - fused["bytes_per_value"]["pointwise"]
    assert more >= more_bytes - 0.1


def test_the_reference_counts_like_the_published_code() -> None:
    """Others have traced 73 launches and 371 bytes there; the reference writes the same method down otherwise."""
    ops = blocks.trace_reference_block(SEQUENCES, SIDE)
    found = blocks.block_record("reference", ops, VALUES)
    assert found["launches"] == pytest.approx(blocks.CITED["launches"], rel=0.1)
    assert found["bytes_per_value"]["pointwise"] == pytest.approx(blocks.CITED["bytes_per_value"], rel=0.05)
    assert not torch.is_autocast_enabled("cuda")


def test_the_committed_figures_are_those_of_today() -> None:
    files = result_files(Path(__file__).parents[2] / "benchmarks/results")
    run = newest([run for file in files for run in read_runs(file)], "blocks")
    assert run is not None
    by = {r["variant"]: r for r in run.of_kind("block")}
    now = record(FusedOperations("triton"))
    assert by["engine, fused"]["launches"] == now["launches"], "trace again: pixelflow bench blocks"
    assert by["engine, fused"]["bytes_per_value"] == now["bytes_per_value"]


def traced(call: Any, *shapes: tuple[int, ...]) -> list[TracedOp]:
    with fake_cuda():
        operands = [fake(shape, torch.float32) for shape in shapes]
        with tracing() as trace:
            call(*operands)
    return trace.ops


def test_operations_are_counted_as_they_are() -> None:
    size = 4 * 8 * 16

    def views(x: Tensor) -> Tensor:
        return x[:, None, 3:].transpose(0, 1).unflatten(-1, (1, -1))[..., 0, 2]

    assert traced(views, (8, 16)) == []
    assert traced(lambda x, y: x + y, (8, 16), (8, 16)) == [TracedOp("add", "pointwise", 1, 3 * size)]
    assert traced(lambda x, y: x * y[:, :1].expand(8, 16), (8, 16), (8, 16))[0].bytes_moved == 2 * size + 4 * 8
    assert traced(lambda x: x.zero_(), (8, 16)) == [TracedOp("zero_", "pointwise", 1, size)]
    assert traced(lambda x, y: x @ y, (8, 16), (16, 8)) == [TracedOp("mm", "product", 1, 2 * size + 4 * 64)]
    attention = traced(F.scaled_dot_product_attention, *[(2, 4, 8, 16)] * 3)
    assert attention == [TracedOp("scaled_dot_product_attention", "attention", 1, 4 * 8 * size)]


@pytest.mark.parametrize(("tokens", "launches"), [(0, 0), (4, 1)])
def test_launches_are_those_of_the_launch_code(tokens: int, launches: int) -> None:
    with fake_cuda():
        layout = blocks.fake_layout(1 if tokens else 0, 2)
        x, rows = fake((tokens, 16), torch.bfloat16), fake((layout.num_images, 16), torch.float32)
        with tracing() as trace:
            FusedOperations("triton").layer_norm_modulate(x, rows, rows, layout)
    assert [(op.name, op.launches) for op in trace.ops] == [("layer_norm_modulate", launches)]


def test_a_checkout_is_traced_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up one: a block that adds the time to its tokens, and a table of places that lies on the CPU."""
    for name, text in {
        "pixelflow/model.py": (
            "import torch\nprint('hello')\n"
            "class TransformerBlock(torch.nn.Module):\n"
            "    def __init__(self, dim, heads, head_dim, attention_bias):\n"
            "        super().__init__()\n"
            "        self.linear = torch.nn.Linear(dim, dim)\n"
            "    def forward(self, x, timestep, rope_pos_embed):\n"
            "        rope_pos_embed.to(x.device)\n"
            "        return self.linear(x) + timestep[:, None]\n"
        ),
        "diffusers/models/embeddings.py": (
            "import torch\n"
            "def get_2d_rotary_pos_embed(embed_dim, crops_coords, grid_size):\n"
            "    return torch.zeros(grid_size[0] ** 2, embed_dim), torch.zeros(grid_size[0] ** 2, embed_dim)\n"
        ),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    ops = blocks.trace_public_block(tmp_path, 2, 4)
    assert [(op.name, op.kind, op.launches) for op in ops] == [
        ("_to_copy", "pointwise", 1),
        ("addmm", "product", 1),
        ("add", "pointwise", 1),
    ]
    assert ops[2].bytes_moved == 2 * (2 * 2 * 16 * WIDTH + 2 * WIDTH)
    with pytest.raises(RuntimeError, match=r"expected a folder with pixelflow/model\.py"):
        blocks.trace_public_block(tmp_path / "nowhere", 2, 4)


def test_a_checkout_that_cannot_be_traced_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages may be missing; the other blocks are counted all the same."""
    for name in ("trace_engine_block", "trace_reference_block"):
        monkeypatch.setattr(blocks, name, lambda *given, **more: [TracedOp("add", "pointwise", 1, 10)])
    found = blocks.trace_blocks(1, 0, tmp_path / "nowhere")
    assert len(found) > 3
    assert [r["kind"] for r in found] == ["block"] * (len(found) - 1) + ["absent"]
    assert found[-1]["variant"] == blocks.PUBLISHED
    assert "expected a folder with pixelflow/model.py" in found[-1]["reason"]
