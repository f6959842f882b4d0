"""``bench cpu``: images are compared before anything is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.cpu import COMPILED, EXACT, LOOP, NO_LOOP, cascade_calls, measure_cascade
from pixelflow_benchmarks.random_models import SHAPES

TRUTH = torch.linspace(0, 1, 48, dtype=torch.float64).view(1, 3, 4, 4)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile does nothing: what the engine does with it runs in plain PyTorch."""
    monkeypatch.setattr("pixelflow_engine.engine.compile_blocks", lambda model: None)


def test_the_command(tmp_path: Path, uncompiled: None) -> None:
    output = tmp_path / "cpu.jsonl"
    command = ["cpu", "--shape", "tiny", "--steps", "2", "--rounds", "3", "--output", str(output)]
    result = CliRunner().invoke(bench, command)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert (records[0]["kind"], records[-1]["kind"]) == ("environment", "end")
    checks = {r["variant"]: r["right"] for r in records if r["kind"] == "check"}
    assert checks == dict.fromkeys((LOOP, NO_LOOP, EXACT, COMPILED), True)
    rounds = [r["seconds"] for r in records if r["kind"] == "round"]
    assert len(rounds) == 3
    ratios = {(r["variant"], r["over"]): r for r in records if r["kind"] == "ratio"}
    assert len(ratios) == 4
    pairs = sorted(seconds[NO_LOOP] / seconds[EXACT] for seconds in rounds)
    assert ratios[EXACT, NO_LOOP]["median"] == pytest.approx(pairs[1])
    shares = [r for r in records if r["kind"] == "shares"]
    assert all(0 < r["attention"] < 1 and 0 < r["products"] < 1 for r in shares)


def test_all_draw_the_same_noise(uncompiled: None) -> None:
    calls, truth = cascade_calls(SHAPES["tiny"], 2, 2, compiled=True)
    images = {name: call() for name, call in calls.items()}
    assert images[NO_LOOP].shape == (2, 3, 16, 16)
    assert images[NO_LOOP].std() > 0.1, "an image, not a constant"
    assert torch.equal(images[LOOP], images[EXACT])
    assert not torch.equal(images[COMPILED], images[EXACT]), "the packed stages round otherwise"
    assert (images[EXACT].double() - truth()).abs().max() < 1e-4


def raising() -> Tensor:
    raise RuntimeError("no compiler\nand more")


@pytest.mark.parametrize(
    ("variant", "call", "said"),
    [
        (EXACT, lambda: TRUTH.float().nextafter(torch.tensor(2.0)), "48 of 48 values differ"),
        (LOOP, lambda: 1 - TRUTH.float(), "values differ"),
        (COMPILED, lambda: TRUTH.float() + 1e-4, "error 1.0"),
        (COMPILED, lambda: TRUTH.float() * torch.nan, "error nan"),
        (COMPILED, raising, "RuntimeError: no compiler"),
        (COMPILED, lambda: TRUTH.float().nextafter(torch.tensor(2.0)), None),
    ],
)
def test_nothing_wrong_gets_a_time(variant: str, call: Callable[[], Tensor], said: str | None) -> None:
    calls: dict[str, Callable[[], Tensor]] = dict.fromkeys((LOOP, NO_LOOP, EXACT, COMPILED), lambda: TRUTH.float())
    records = list(measure_cascade(calls | {variant: call}, lambda: TRUTH, rounds=1))
    faults = {r["variant"]: r["fault"] for r in records if "fault" in r}
    timed = {r["variant"] for r in records if r["kind"] == "time"}
    if said is None:
        assert faults == {}
        assert variant in timed
    else:
        assert list(faults) == [variant]
        assert said in faults[variant]
        assert timed == {LOOP, NO_LOOP, EXACT, COMPILED} - {variant}
        assert all(variant not in (r["variant"], r["over"]) for r in records if r["kind"] == "ratio")
