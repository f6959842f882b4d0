"""Orders of convergence of the solvers with fixed steps, measured in float64: 1 for Euler, 2 for Heun and ab2.

Methods are data: Kutta's of third order, which the engine does not offer, runs through the same code by its tableau.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pixelflow_engine.fusion import fuse
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.packed_stages import PackedStages, ProgramStore
from pixelflow_engine.plain_stages import GuidedVelocity, PlainStages
from pixelflow_engine.plan import Condition, Group, SamplingPlan, plan_stages
from pixelflow_engine.programs import FixedSteps
from pixelflow_engine.solvers import Tolerance, euler_update, runge_kutta_step, step_length, two_step_update
from pixelflow_engine.tableaus import AB2, FIXED_STEPS, HEUN, Tableau, at_slopes
from support.engines import tiny_config, tiny_model
from support.reference_models import normal, seeded

KUTTA = Tableau(nodes=(0.0, 0.5, 1.0), coupling=((), (0.5,), (-1.0, 2.0), (1 / 6, 2 / 3, 1 / 6)))
ORDERS = {"euler": 1, "heun": 2, "ab2": 2, "kutta": 3}


@pytest.fixture(autouse=True)
def kutta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of three slopes, one of them in the middle of the step."""
    monkeypatch.setitem(FIXED_STEPS, "kutta", KUTTA)


F64 = torch.float64


def field(x: Tensor, tau: float) -> Tensor:
    """Smooth, turning, with a forcing; it does not care how its values are laid out."""
    return torch.tanh(x) * math.cos(3 * tau) - 0.5 * x + math.sin(2 * tau)


def solution(x: Tensor) -> Tensor:
    """At tau = 1, by scipy."""

    def flat(tau: float, y: np.ndarray) -> np.ndarray:
        return field(torch.from_numpy(y), tau).numpy()

    end = solve_ivp(flat, (0, 1), x.flatten().numpy(), "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return torch.from_numpy(end.copy()).view_as(x)


def uneven(n: int) -> list[float]:
    """Steps that are long and short in turn, 3 to 1: neighbours that grow alike would hide a ratio that is left out."""
    return [float(np.float32(t)) for t in np.cumsum([0.0, *[1.5 / n, 0.5 / n] * (n // 2)])]


def even(n: int) -> list[float]:
    return [float(np.float32(t)) for t in np.linspace(0, 1, n + 1)]


def by_functions(solver: str, x: Tensor, times: Sequence[float]) -> Tensor:
    """With the exact engine's updates."""
    before: tuple[Tensor, float] | None = None
    for now, after in pairwise(times):
        v = field(x, now)
        if solver == "euler":
            x = euler_update(x, v, now, after)
        elif solver != "ab2" or before is None:
            tableau = KUTTA if solver == "kutta" else HEUN
            points = at_slopes(tableau, now, after)
            x = runge_kutta_step(x, v, lambda y, i, at=points: field(y, at[i]), tableau, step_length(now, after))
        else:
            x = two_step_update(x, v, before[0], AB2, step_length(now, after), before[1])
        before = (v, step_length(now, after))
    return x


def orders(errors: Sequence[float]) -> list[float]:
    """Of errors at steps that halve."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("times", [even, uneven])
@pytest.mark.parametrize("solver", ORDERS)
def test_orders_of_the_updates(solver: str, times: Callable[[int], list[float]]) -> None:
    x = normal((2, 1, 4, 4), seeded(40))
    lengths = np.diff(times(16))
    assert lengths.min() > 0
    assert times is even or lengths.max() > 2 * lengths.min()
    truth = solution(x)
    errors = [(by_functions(solver, x, times(n)) - truth).abs().max().item() for n in (40, 80, 160)]
    assert all(abs(order - ORDERS[solver]) <= 0.1 for order in orders(errors)), errors
    assert errors[0] < 0.1


@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("times", [even, uneven])
@pytest.mark.parametrize("stages", ["exact", "packed"])
@pytest.mark.parametrize("solver", ORDERS)
def test_orders_of_whole_stages(
    solver: str, stages: str, times: Callable[[int], list[float]], weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage's own loop with a smooth field in place of the model: which slope, which time, which length.

    With guidance the null half is off by a term that the conditional half makes up for.
    """
    config = tiny_config(num_stages=1, resolution=4)
    model: PackedTransformer = tiny_model(config).double().requires_grad_(False)
    fuse(model)
    (stage,) = plan_stages(config, [Group(4, 4, ((weight,),) * 2)], (1,))
    x = normal(stage.shapes[0], seeded(41))
    truth = solution(x)

    def both(y: Tensor, tau: float) -> Tensor:
        """Halves that combine to the field."""
        v = field(y, tau)
        if weight == 1:
            return v
        null = v + torch.cos(y)
        return torch.cat([null, null + (v - null) / weight])

    def packed(self: FixedSteps, y: Tensor, slope: int) -> Tensor:
        # What a program is told of time are the modulations: the first of them is the time here.
        return both(y, self.rows[slope, 0, 0].item())

    def exact(self: GuidedVelocity, y: Tensor, t_model: Tensor) -> Tensor:
        self.evaluations += 1
        halves = both(y, time_of(float(t_model[0])))
        return halves if weight == 1 else halves[: len(y)] + weight * (halves[len(y) :] - halves[: len(y)])

    class Table:
        """Rows that say the time."""

        def __init__(self, pack: object, condition: Condition, t_model: Sequence[float]) -> None:
            self.t_model = t_model

        def at(self, moment: int) -> Tensor:
            rows = program_rows()
            return torch.full_like(rows, time_of(self.t_model[moment]))

    def program_rows() -> Tensor:
        copies = 2 if weight != 1 else 1
        return torch.zeros(copies * 2, (6 * config.model.depth + 2) * config.model.width, dtype=F64)

    def time_of(t_model: float) -> float:
        """What a number of steps, also a broken one, is as a time."""
        return float(np.interp(t_model, np.arange(len(grid[0])), grid[0]))

    grid: list[list[float]] = [[]]
    where = "pixelflow_engine.packed_stages" if stages == "packed" else "pixelflow_engine.plain_stages"
    # Model time is the number of the step, which the field above looks its time up by.
    monkeypatch.setattr(f"{where}.step_times", lambda *_: (np.array(grid[0]), np.arange(len(grid[0]), dtype=float)))
    monkeypatch.setattr("pixelflow_engine.packed_stages.ModulationTable", Table)
    monkeypatch.setattr(FixedSteps, "_velocity", packed)
    monkeypatch.setattr(GuidedVelocity, "__call__", exact)
    errors = []
    for n in (40, 80, 160):
        grid[0] = times(n)
        many = replace(stage, num_steps=n)
        plan = SamplingPlan(stages=(many,), solver=solver, shift=1.0, state="fp32", tolerance=Tolerance())
        condition = Condition(class_labels=torch.tensor([1, 2]))
        runner = (
            PackedStages(model, config, plan, condition, ProgramStore(None))
            if stages == "packed"
            else PlainStages(model, config, plan, condition)
        )
        outcome = runner.run([x], many, lambda *_: None)
        assert outcome.steps == n
        assert outcome.evaluations == {"euler": n, "heun": 2 * n, "ab2": n + 1, "kutta": 3 * n}[solver]
        errors.append((outcome.states[0] - truth).abs().max().item())
    assert all(abs(order - ORDERS[solver]) <= 0.1 for order in orders(errors)), errors
    assert errors[0] < 0.1
