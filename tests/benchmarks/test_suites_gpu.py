"""Every suite on a device, small: all variants run there and are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench

pytestmark = pytest.mark.gpu

SUITES = {
    "stages": "--shape tiny --batch 1 --batch 4 --stage 0 --stage 1 --steps 2 --repeats 3",
    "images": "--shape tiny --batch 1 --batch 2 --steps 2 --repeats 3",
    "training": "--shape tiny --batch 4 --repeats 3",
    "kernels": "--batch 1 --stage 0 --repeats 3 --quiet",
    "distance": "--shape tiny --images 2 --steps 3",
    "curves": "--seeds 2 --steps 10",
    "memory": "--shape tiny --batch 1 --batch 2 --steps 2",
}
WITHOUT = ("published code", "SDPA (cuDNN)", "graphs: got True", "float32, flash")
"""What need not run: no checkout is given, and PyTorch's attention waits for the device."""


@pytest.mark.parametrize("suite", SUITES)
def test_every_variant_runs_and_is_right(suite: str, tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    result = CliRunner().invoke(bench, [suite, "--device", "cuda", *SUITES[suite].split(), "--output", str(output)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert records[0]["gpu"] == torch.cuda.get_device_name()
    assert [r for r in records if "fault" in r] == []
    assert len([r for r in records if r["kind"] not in ("environment", "ceilings", "absent", "end")]) > 3
    absent = [f"{r['variant']}: {r['reason']}" for r in records if r["kind"] == "absent"]
    assert [line for line in absent if not any(known in line for known in WITHOUT)] == []
