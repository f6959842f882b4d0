"""Helpers for the adamw tests: guarded lists of tensors, and the same equations in float64 with error bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pixelflow_kernels.adamw import TensorTable, reference
from support import ode
from support.kernels import Poisoned, assert_filled, assert_same_bits, poisoned

F32, F64 = torch.float32, torch.float64
UNIT = 2.0**-24  # unit roundoff of float32: the largest relative rounding error
ALIGNED, ODD = 64, 61  # values in a red zone; the second leaves no tensor aligned to 16 bytes
SETTINGS: dict[str, Any] = {
    "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05, "max_norm": 0.7, "ema_decay": 0.6
}  # fmt: skip


@dataclass(frozen=True)
class Lists:
    """Lists of tensors, each tensor between red zones of its own."""

    guarded: dict[str, list[Poisoned]]

    def __getitem__(self, name: str) -> list[Tensor]:
        return [one.out for one in self.guarded.get(name, [])]

    def values(self) -> dict[str, list[Tensor]]:
        """Return copies of all lists."""
        return {name: [one.out.clone() for one in tensors] for name, tensors in self.guarded.items()}

    def assert_inside(self) -> None:
        """Assert that nothing was written outside the tensors."""
        for name, tensors in self.guarded.items():
            for one in tensors:
                assert_filled(one.buffer, one.out, name)


def lists(
    shapes: Sequence[tuple[int, ...]],
    seed: int = 0,
    *,
    gradient: torch.dtype = F32,
    averaged: bool = True,
    copy: torch.dtype | None = torch.float16,
    guards: Sequence[int] = (ALIGNED,),
    hostile: bool = False,
    device: str = "cpu",
) -> Lists:
    """Draw random lists; second moments are not negative. Tensors take the sizes in ``guards`` in turn."""
    types = {"gradients": gradient, "parameters": F32, "exp_avgs": F32, "exp_avg_sqs": F32}
    types |= ({"averages": F32} if averaged else {}) | ({} if copy is None else {"copies": copy})
    made: dict[str, list[Poisoned]] = {name: [] for name in types}
    for i, shape in enumerate(shapes):
        for k, (name, dtype) in enumerate(types.items()):
            guard = guards[(i + k) % len(guards)] if len(guards) > 1 else guards[0]
            one = poisoned(*shape, dtype=dtype, device=device, dense=True, guard=guard)
            draw = ode.hostile if hostile and name != "copies" else ode.normal
            value = draw(*shape, dtype=dtype, seed=seed + 101 * i + 7 * k)
            one.out.copy_(value.abs() if name == "exp_avg_sqs" else value)
            made[name].append(one)
    return Lists(made)


def expected(before: dict[str, list[Tensor]], numbers: Tensor, zeroed: bool = False) -> dict[str, list[Tensor]]:
    """Return the lists after a step that is not skipped, computed tensor by tensor."""
    after: dict[str, list[Tensor]] = {name: [] for name in before}
    for i, gradient in enumerate(before["gradients"]):
        average = before["averages"][i] if "averages" in before else None
        old = [before[name][i] for name in ("parameters", "exp_avgs", "exp_avg_sqs")]
        p, m, v, average = reference.update(gradient, *old, average, numbers)
        values = {"gradients": torch.zeros_like(gradient) if zeroed else gradient, "parameters": p, "exp_avgs": m}
        values |= {"exp_avg_sqs": v}
        if average is not None:
            values["averages"] = average
        if "copies" in before:
            values["copies"] = p.to(before["copies"][i].dtype)
        for name, value in values.items():
            after[name].append(value)
    return after


def numbers_of(seed: int, applied: bool = True) -> Tensor:
    """``[9]`` float32 that no two of which are alike."""
    drawn = torch.rand(9, generator=torch.Generator().manual_seed(seed)) + 0.1
    drawn[0] = float(applied)
    return drawn


def launch(made: Lists, numbers: Tensor, zeroed: bool = False, config: dict[str, int] | None = None) -> None:
    """Launch the update of lists on the CPU, for interpreted and emulated kernels."""
    from pixelflow_kernels.adamw import kernels

    found = TensorTable.of({name: made[name] for name in made.guarded})
    gradient, copies = made["gradients"][0].dtype, made["copies"]
    kernels.launch_update(
        found.pointers, found.chunks, numbers, gradient, copies[0].dtype if copies else None, bool(made["averages"]),
        zeroed, config=config,
    )  # fmt: skip


def assert_is(made: Lists, want: dict[str, list[Tensor]]) -> None:
    """Assert that the lists have the bits of others, and that nothing was written outside of the tensors."""
    for name, tensors in want.items():
        for i, (got, value) in enumerate(zip(made[name], tensors, strict=True)):
            assert_same_bits(got, value, f"{name}[{i}]")
    made.assert_inside()


class Truth:
    """AdamW and its average in float64, written as in the papers, with a bound on the error of float32.

    The bounds are of first order in the unit roundoff, plus one per cent for higher orders. A moving average ``x += w
    (y - x)`` scales a previous error by ``1 - w`` in each step and adds: the roundings of the difference, of the
    product and of ``w`` (3 units of ``w (y - x)``), the rounding of the sum (a unit of the result), and ``w`` times
    the error of y.

    Args:
        parameters: initial parameters, float32.
        plain: also bound the differences of torch's own AdamW: it rounds ``beta2`` and ``1 - lr weight_decay`` to
            float32, and rounds the second moment and the parameter once more.
    """

    def __init__(self, parameters: Sequence[Tensor], *, plain: bool = False) -> None:
        self.p = [p.detach().double() for p in parameters]
        self.a = [p.clone() for p in self.p]
        self.m, self.v, self.ep, self.em, self.ev, self.ea = ([torch.zeros_like(p) for p in self.p] for _ in range(6))
        self.t, self.plain = 0, plain

    def step(
        self, gradients: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        max_norm: float, ema_decay: float,
    ) -> None:  # fmt: skip
        norm = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5
        clip = min(1.0, max_norm / (norm + 1e-6))
        decay = min(ema_decay, (1 + self.t) / (10 + self.t))
        self.t += 1
        first, second = 1 - betas[0] ** self.t, 1 - betas[1] ** self.t
        extra = UNIT if self.plain else 0.0
        for i, gradient in enumerate(gradients):
            g = gradient.double() * clip
            eg = 4 * UNIT * g.abs()  # roundings of the norm, two of the factor in float32, and that of the product
            self.em[i] = self._moved(self.m[i], g, 1 - betas[0], self.em[i], eg)
            self.m[i] = betas[0] * self.m[i] + (1 - betas[0]) * g
            square_error = 2 * g.abs() * eg + UNIT * g * g
            self.ev[i] = self._moved(self.v[i], g * g, 1 - betas[1], self.ev[i], square_error) + 2 * extra * self.v[i]
            self.v[i] = betas[1] * self.v[i] + (1 - betas[1]) * g * g
            root = (self.v[i] / second) ** 0.5
            below = root + eps
            # |sqrt(v + e) - sqrt(v)| is at most e / sqrt(v), and at most sqrt(e).
            error = (self.ev[i] / self.v[i].clamp(min=1e-300) ** 0.5).minimum(self.ev[i] ** 0.5) / second**0.5
            relative = (error + 5 * UNIT * root + UNIT * eps) / (below - error).clamp(min=1e-300)
            change = lr / first * self.m[i] / below
            ec = lr / first * self.em[i] / below * (1 + relative) + change.abs() * (relative + 5 * UNIT)
            kept = lr * weight_decay * self.p[i]
            new = self.p[i] - kept - change
            rounded = UNIT * (new.abs() + 4 * kept.abs() + (kept + change).abs())
            self.ep[i] = 1.01 * (self.ep[i] + rounded + ec + 3 * extra * self.p[i].abs())
            self.p[i] = new
            self.ea[i] = self._moved(self.a[i], new, 1 - decay, self.ea[i], self.ep[i])
            self.a[i] = decay * self.a[i] + (1 - decay) * new

    @staticmethod
    def _moved(x: Tensor, y: Tensor, w: float, ex: Tensor, ey: Tensor) -> Tensor:
        after = x + w * (y - x)
        return 1.01 * ((1 - w) * ex + w * ey + 3 * UNIT * w * (y - x).abs() + UNIT * after.abs()) + 2.0**-149


def assert_near(got: Sequence[Tensor], true: Sequence[Tensor], bound: Sequence[Tensor], name: str) -> float:
    """Assert that every value is within its bound; return the largest fraction of a bound that was used."""
    shares = [((g.double() - t).abs() / b).max().item() for g, t, b in zip(got, true, bound, strict=True) if g.numel()]
    worst = max(shares)
    assert worst <= 1, f"{name}: {worst:.3g} times the bound"
    return worst
