"""Loss curves are those of training, agree where they should, and show a model that trains otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_benchmarks.suites.curves import agreement, curves_table, measure_curves, spread_of, windows
from pixelflow_training import step
from support.results import run_of

CPU = torch.device("cpu")
STEPS = 20


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [*measure_curves(["torch", "triton"], 2, STEPS, CPU)]


def test_a_right_model_stays_within_the_spread_of_seeds(records: list[dict[str, Any]]) -> None:
    kinds = [(r["kind"], r["variant"], r.get("seed")) for r in records]
    assert kinds == [
        ("curve", "reference", 0), ("curve", "reference", 1),
        ("curve", "torch", 0), ("agreement", "torch", None), ("curve", "torch", 1), ("agreement", "torch", None),
        ("absent", "triton", None),
    ]  # fmt: skip
    for found in (r for r in records if r["kind"] == "agreement"):
        assert found["right"]
        # After a few steps rounding is all that differs.
        assert 0 < found["difference"] <= found["step"] < 1e-4 < found["spread"]
    for curve in (r["loss"] for r in records if r["kind"] == "curve"):
        assert len(curve) == STEPS
        assert windows(curve)[-1] < windows(curve)[0]


def test_a_wrong_model_shows(records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = step.batch_losses

    def biased(*arguments: Any) -> Tensor:
        losses = honest(*arguments)
        return losses + losses.detach().mean()

    monkeypatch.setattr(step, "batch_losses", biased)
    wrong = [r for r in measure_curves(["torch"], 2, 10, CPU) if r["kind"] == "agreement"]
    assert [r["right"] for r in wrong] == [False, False]
    assert "seeds by" in wrong[0]["fault"]


def test_windows_and_spreads() -> None:
    rising, level = [float(i) for i in range(20)], [9.0] * 20
    assert windows(rising).tolist() == [0.5 + 2 * i for i in range(10)]
    assert spread_of([rising, level]) == 0.5
    assert spread_of([rising, level, [30.0] * 20]) == 21.0
    found = agreement("torch", 3, [9.25] * 20, level, 0.25)
    assert found == {
        "kind": "agreement", "case": "seed 3", "variant": "torch", "right": True,
        "difference": 0.25, "step": 0.25, "spread": 0.25,
    }  # fmt: skip
    assert not agreement("torch", 3, [9.5] * 20, level, 0.25)["right"]
    assert not agreement("torch", 3, [torch.nan] * 20, level, 0.25)["right"]


def test_the_table_says_how_far(records: list[dict[str, Any]]) -> None:
    table = curves_table(run_of("curves", *records, steps=STEPS, batch=4))
    assert [row[:2] for row in table.rows] == [("reference", "0"), ("reference", "1"), ("torch", "0"), ("torch", "1")]
    assert table.rows[0][4:] == ("", "")
    assert float(table.rows[3][4]) < 1e-4


def test_steps_are_divided_into_windows() -> None:
    with pytest.raises(ValueError, match="steps: got 15, expected a multiple of 10"):
        next(measure_curves(["torch"], 2, 15, CPU))
