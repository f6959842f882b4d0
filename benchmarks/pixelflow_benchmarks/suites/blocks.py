"""Launches and memory traffic of one transformer block, counted on fake tensors: nothing is measured.

The block is that of the published model (width 1152, 16 heads) at one stage, with guidance. Bytes are given per token
and channel of the residual stream, where a bf16 value takes 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable
from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_benchmarks.harness.tracing import TracedOp, fake, fake_cuda, fake_parameters, tracing
from pixelflow_engine.config import ModelConfig
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.fusion import fuse
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.operations import Operations, PlainOperations, Text
from pixelflow_engine.prompts import ProjectedPrompts
from pixelflow_engine.reference.model import TransformerBlock as ReferenceBlock
from pixelflow_engine.reference.model import rotary_angles
from pixelflow_kernels import PackedLayout

from .kernels.case import HEAD_DIM, HEADS, STAGE_SIDES, WIDTH

Ops = Sequence[TracedOp]

CITED = {"kind": "cited", "variant": "published code, as traced by others", "launches": 73, "bytes_per_value": 371.0}

PUBLISHED = "published code, bf16 autocast"

KINDS = ("product", "attention", "pointwise")

TEXT_WIDTH, TEXT_TOKENS = 2048, 512
"""Width of the published text-conditional model's text encoder, and the maximum number of tokens in a prompt."""


def trace_engine_block(
    operations: Operations, side_by_side: bool, sequences: int, side: int, text: bool = False
) -> list[TracedOp]:
    """Trace the engine's block in bf16, from one modulated norm to the next.

    Args:
        operations: implementation of the block's operations.
        side_by_side: whether queries, keys and values are computed by one product.
        sequences: number of sequences: images, null halves included.
        side: tokens along a side of an image.
        text: whether the block has cross-attention. Keys and values of the prompts are computed before the first step
            and are not counted.
    """
    condition: dict[str, Any] = {"cross_attention_dim": TEXT_WIDTH, "num_classes": 0} if text else {"num_classes": 1000}
    config = ModelConfig(num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, depth=1, **condition)
    with torch.device("meta"):
        model = PackedTransformer(config, operations)
    with fake_cuda():
        fake_parameters(model, torch.bfloat16)
        if side_by_side:
            fuse(model)
        layout = fake_layout(sequences, side)
        states = fake((sequences, TEXT_TOKENS, TEXT_WIDTH), torch.bfloat16)
        prompts = ProjectedPrompts(model, Text(states), None).pack(0) if text else None
        keys = None if prompts is None else prompts.keys[0]
        around = model.surroundings(layout, prompts)
        x = fake((sequences * side * side, WIDTH), torch.bfloat16)
        rows = fake((sequences, 6 * WIDTH), torch.float32)
        following = fake((sequences, 2 * WIDTH), torch.float32)
        with tracing() as trace:
            model.blocks[0](x, x, rows, (following[:, :WIDTH], following[:, WIDTH:]), keys, around, operations)
    return trace.ops


def fake_layout(sequences: int, side: int) -> PackedLayout:
    """Return the layout of square images of one size, on the fake device; call it inside ``fake_cuda``."""
    layout = PackedLayout.from_grids([(side, side)] * sequences)
    return replace(
        layout,
        cu_seqlens=fake(layout.cu_seqlens.shape, torch.int32),
        image_index=fake(layout.image_index.shape, torch.int32),
        row=fake(layout.row.shape, torch.int32),
        column=fake(layout.column.shape, torch.int32),
    )


def trace_reference_block(sequences: int, side: int) -> list[TracedOp]:
    """Trace the reference model's block: float32 weights under bf16 autocast, as the published code samples."""
    with torch.device("meta"):
        block = ReferenceBlock(WIDTH, HEADS, True, None)
    with fake_cuda():
        weights = fake_parameters(block, torch.float32)
        x = fake((sequences, side * side, WIDTH), torch.bfloat16)
        conditioning = fake((sequences, WIDTH), torch.bfloat16)
        angles: Tensor = rotary_angles(side, side, HEAD_DIM, "cuda")
        with tracing(weights, torch.bfloat16) as trace:
            block(x, conditioning, angles, None, None)
    return trace.ops


def trace_public_block(path: Path, sequences: int, side: int) -> list[TracedOp]:
    """Trace the block of a checkout of the published code, in a separate process.

    Raises:
        RuntimeError: the code cannot be imported or traced; the message has the last line of the process's stderr.
    """
    command = [sys.executable, "-m", "pixelflow_benchmarks.opponents.public_code", "trace", str(path)]
    roots = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [*command, str(sequences), str(side)],
        env=os.environ | {"PYTHONPATH": roots},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        said = run.stderr.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"public: the code in {path} could not be traced: {said[-1]}")
    return [TracedOp(**op) for op in json.loads(run.stdout.splitlines()[-1])]


def trace_blocks(batch: int, stage: int, public: Path | None) -> list[dict[str, Any]]:
    """Trace every available block and return a record for each.

    The blocks are the engine's (fused, fused with text, plain), the reference's and, given a checkout, the published
    code's. A checkout that cannot be traced gives an ``absent`` record with the reason.

    Args:
        batch: number of images; with guidance a model sees twice as many sequences.
        stage: 0 to 3.
        public: a checkout of the published code.
    """
    side, sequences = STAGE_SIDES[stage], 2 * batch
    values = sequences * side * side * WIDTH
    blocks = {
        "engine, fused": trace_engine_block(FusedOperations("triton"), True, sequences, side),
        "engine, fused, text": trace_engine_block(FusedOperations("triton"), True, sequences, side, text=True),
        "engine, plain": trace_engine_block(PlainOperations(), False, sequences, side),
        "reference, bf16 autocast": trace_reference_block(sequences, side),
    }
    absent = []
    if public is not None:
        try:
            blocks[PUBLISHED] = trace_public_block(public, sequences, side)
        except RuntimeError as error:
            absent = [{"kind": "absent", "variant": PUBLISHED, "reason": first_line(error)}]
    return [*(block_record(name, ops, values) for name, ops in blocks.items()), *absent]


def block_record(variant: str, ops: Ops, values: int) -> dict[str, Any]:
    """Return a block's totals and its operations in order; ``values`` is the number of tokens times channels."""
    moved = {kind: sum(op.bytes_moved for op in ops if op.kind == kind) / values for kind in KINDS}
    return {
        "kind": "block",
        "variant": variant,
        "launches": sum(op.launches for op in ops),
        "pointwise_launches": sum(op.launches for op in ops if op.kind == "pointwise"),
        "bytes_per_value": moved,
        "ops": [
            {**asdict(op), "bytes_per_value": op.bytes_moved / values} for op in ops if op.launches or op.bytes_moved
        ],
    }


def operation_tables(run: Run) -> Iterator[TextTable]:
    """Yield a table of operations for each block, with operations of the same name and class added up."""
    for record in run.of_kind("block"):
        rows: dict[tuple[str, str], list[float]] = {}
        for op in record["ops"]:
            row = rows.setdefault((op["name"], op["kind"]), [0, 0.0])
            row[0] += op["launches"]
            row[1] += op["bytes_per_value"]
        lines = tuple((name, kind, str(int(n)), f"{moved:.1f}") for (name, kind), (n, moved) in rows.items())
        yield TextTable(record["variant"], ("operation", "class", "launches", "bytes"), lines)


def block_table(run: Run) -> TextTable:
    """Return the table of launches and bytes of each block."""
    totals = [
        (
            record["variant"],
            str(record["launches"]),
            str(record["pointwise_launches"]),
            *(f"{record['bytes_per_value'][kind]:.1f}" for kind in KINDS),
        )
        for record in run.of_kind("block")
    ]
    totals += [
        (r["variant"], str(r["launches"]), "", "", "", f"{r['bytes_per_value']:.1f}") for r in run.of_kind("cited")
    ]
    header = ("block", "launches", "of them pointwise", *(f"{kind} bytes" for kind in KINDS))
    title = "Per transformer block; bytes per token and channel. Counted on fake tensors, nothing is measured."
    return TextTable(title, header, tuple(totals))
