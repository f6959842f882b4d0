"""Integration methods as data, from which the solvers are driven."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tableau:
    """An explicit Runge-Kutta method.

    Attributes:
        nodes: times ``c_i`` of the slopes, as fractions of the step.
        coupling: row i holds the weights of slopes 0..i-1 for the state at which slope i is evaluated; the last row is
            the solution.
    """

    nodes: tuple[float, ...]
    coupling: tuple[tuple[float, ...], ...]


EULER = Tableau(nodes=(0.0,), coupling=((), (1.0,)))
"""Euler (1768), of first order."""

HEUN = Tableau(nodes=(0.0, 1.0), coupling=((), (1.0,), (0.5, 0.5)))
"""Heun (1900): the trapezoidal rule with Euler's end point, of second order."""


@dataclass(frozen=True, slots=True)
class TwoStep:
    """An explicit linear method over the current slope and that of the previous step, for variable step lengths.

    Attributes:
        weights: for each of the two slopes, the newer first, the coefficients of a polynomial in ``r = h / h_before``:
            its weight in the step is ``h (weights[i][0] + weights[i][1] r)``.
        starter: name of the solver for the first step, which has no previous slope.
    """

    weights: tuple[tuple[float, float], tuple[float, float]]
    starter: str


AB2 = TwoStep(weights=((1.0, 0.5), (0.0, -0.5)), starter="heun")
"""Adams and Bashforth (1883): the line through both slopes, integrated over the step; second order."""

FIXED_STEPS: dict[str, Tableau | TwoStep] = {"euler": EULER, "heun": HEUN, "ab2": AB2}
"""Solvers with fixed steps, by name."""


def methods_of(solver: str) -> tuple[TwoStep | None, Tableau]:
    """Two-step method of a fixed-step solver, or None, and the tableau of its first step (two-step) or all steps."""
    method = FIXED_STEPS[solver]
    if isinstance(method, Tableau):
        return None, method
    return method, methods_of(method.starter)[1]


def at_slopes(tableau: Tableau, now: float, after: float) -> list[float]:
    """The points between ``now`` and ``after`` at which a step's slopes are evaluated; both ends are exact."""
    ends = {0.0: now, 1.0: after}
    return [ends.get(node, now + node * (after - now)) for node in tableau.nodes]


@dataclass(frozen=True, slots=True)
class EmbeddedTableau(Tableau):
    """A Runge-Kutta pair whose last slope, at node 1, is the first slope of the next step (FSAL).

    Attributes:
        error: weights of the slopes in the difference between the solution and its lower-order companion.
        order: order of the solution.
    """

    error: tuple[float, ...]
    order: int


DOPRI5 = EmbeddedTableau(
    nodes=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    coupling=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    order=5,
)
"""Dormand and Prince (1980) with Shampine's error weights (1986), which torchdiffeq and the published code use."""
