"""Dopri5 decided on the device: where it goes, what it counts, and whom a failing image reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import ConvergenceError, PixelFlowEngine
from pixelflow_engine.graphs import load_
from pixelflow_engine.packed_stages import Glance
from pixelflow_engine.plain_stages import GuidedVelocity
from pixelflow_engine.programs import AdaptiveSteps
from pixelflow_engine.solvers import Tolerance
from pixelflow_kernels.ode_step import ARRIVED, NONFINITE, RUNNING, Adaptive
from support.cascades import checkpoint_of, exact_engine, packed_engine
from support.reference_models import random_reference

F32, F64 = torch.float32, torch.float64
REQUEST: dict[str, Any] = {"solver": "dopri5", "output_type": "pt", "seed": [1, 2, 3]}
ENGINES = {"exact": exact_engine, "packed": packed_engine}
by_engine = pytest.mark.parametrize("build", ENGINES.values(), ids=ENGINES)


def ends(engine: PixelFlowEngine, labels: list[int], **options: Any) -> tuple[list[Tensor], Any]:
    """The state at the end of every stage, and the call's output."""
    states: list[Tensor] = []
    out = engine(labels, callback_on_stage_end=lambda e: states.append(e.latents), **(REQUEST | options))
    return states, out


@pytest.mark.parametrize("error_norm", ["image", "batch"])
@pytest.mark.parametrize("scale", [1.0, 2.4])
def test_packed_goes_where_exact_goes_step_by_step(error_norm: str, scale: float) -> None:
    """In float64 both take the same decisions: the same attempts to the same states, up to roundings."""
    checkpoint = checkpoint_of(random_reference(30), 2, 8)
    options = {"error_norm": error_norm, "guidance_scale": scale, "rtol": 1e-2, "width": 16}
    states, out = ends(packed_engine(checkpoint, F64), [1, 5, 2], **options)
    expected, reference = ends(exact_engine(checkpoint, F64), [1, 5, 2], **options)
    assert [(s.steps, s.evaluations) for s in out.stages] == [(s.steps, s.evaluations) for s in reference.stages]
    assert [s.evaluations for s in out.stages] == [2 + 6 * s.steps for s in out.stages]
    assert out.statuses == reference.statuses == ("ok",) * 3
    for x, y in zip(states, expected, strict=True):
        # Float32 model times are steps in the field: a rounding of tau may move one by 3e-5 of 999.
        assert (x - y).abs().max() <= 1e-6 * y.abs().max()


def test_packed_and_exact_meet_as_the_tolerance_shrinks() -> None:
    """In float32 their decisions may part; both are within the tolerance of one solution."""
    checkpoint = checkpoint_of(random_reference(31, depth=1), 1, 4)
    options = {"guidance_scale": 1.5, "atol": 1e-7}
    (truth,), _ = ends(exact_engine(checkpoint, F64), [1, 2, 3], **options, rtol=1e-6)
    size = truth.abs().max().item()
    engine = packed_engine(checkpoint)
    for error_norm in ("image", "batch"):
        differences = []
        for rtol in (1e-1, 1e-3, 1e-5):
            (x,), _ = ends(engine, [1, 2, 3], **options, rtol=rtol, error_norm=error_norm)
            differences.append((x - truth).abs().max().item() / size)
        assert differences[1] < differences[0] / 4, differences
        assert differences[2] < differences[1] / 2, differences
        assert differences[2] < 3e-4, differences


def test_images_have_steps_of_their_own_unless_the_norm_is_the_batchs() -> None:
    engine = packed_engine(checkpoint_of(random_reference(32), 1, 4))
    own, wide = ([], []), ([], [])
    for error_norm, seen in (("image", own), ("batch", wide)):
        for labels, seeds, into in (([1, 2], [1, 2], seen[0]), ([1, 4], [1, 9], seen[1])):
            (x,), _ = ends(engine, labels, seed=seeds, error_norm=error_norm, rtol=1e-2)
            into.append(x[0])
    assert torch.equal(own[0][0], own[1][0]), "an image feels its batch mate"
    assert not torch.equal(wide[0][0], wide[1][0]), "the batch's norm does not feel the batch mate"


# --- images that fail --------------------------------------------------------------------------------------


@by_engine
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dopri5"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failing_image_changes_no_bit_of_another(build: Any, solver: str, value: float) -> None:
    """One class whose embedding went bad: its image is reported, in whatever place, and the others are untouched."""
    checkpoint = checkpoint_of(random_reference(33), 2, 8)
    good, bad = build(checkpoint), build(checkpoint)
    table = bad.model.class_embedder.embedding_table
    table.weight = torch.nn.Parameter(table.weight.clone(), requires_grad=False)
    table.weight[4] = value
    options = {"solver": solver, "num_inference_steps": 3, "on_failure": "report", "rtol": 1e-2}
    for labels in ([4, 1, 2], [1, 4, 2], [1, 2, 4]):
        lost = labels.index(4)
        states, out = ends(bad, labels, **options)
        expected, reference = ends(good, labels, **options)
        assert reference.statuses == ("ok",) * 3
        assert out.statuses == tuple("nonfinite" if i == lost else "ok" for i in range(3))
        for x, y in zip(states, expected, strict=True):
            assert all(torch.equal(x[i], y[i]) for i in range(3) if i != lost)
        assert out.images[lost].isfinite().all() == (solver == "dopri5"), (
            "images that stood still are shown as they are"
        )
    with pytest.raises(FloatingPointError, match=r"stage 0: images \[1\] of the batch are not finite"):
        bad([2, 4, 1], **(REQUEST | {"solver": solver, "num_inference_steps": 2}))


@by_engine
def test_a_norm_of_the_batch_is_lost_with_one_image(build: Any) -> None:
    engine = build(checkpoint_of(random_reference(38), 1, 4))
    table = engine.model.class_embedder.embedding_table
    table.weight = torch.nn.Parameter(table.weight.index_fill(0, torch.tensor([4]), torch.nan), requires_grad=False)
    _, out = ends(engine, [1, 4, 2], error_norm="batch", on_failure="report")
    assert out.statuses == ("nonfinite",) * 3


@by_engine
def test_attempts_run_out(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines stop after so many attempts, the images that are through by then untouched."""
    checkpoint = checkpoint_of(random_reference(34), 1, 4)
    states, out = ends(build(checkpoint), [1, 2, 3], rtol=1e-3)
    few = out.stages[0].steps - 1
    original = Tolerance.__init__
    monkeypatch.setattr(Tolerance, "__init__", lambda self, **given: original(self, **given, max_attempts=few))
    cut, report = ends(build(checkpoint), [1, 2, 3], rtol=1e-3, on_failure="report")
    assert set(report.statuses) == {"ok", "max_steps"}
    assert report.stages[0].steps == few
    for i, status in enumerate(report.statuses):
        assert torch.equal(cut[0][i], states[0][i]) == (status == "ok")
    with pytest.raises(
        ConvergenceError, match=rf"{few} attempts did not reach tau = 1, the slowest image is at 0\.\d+"
    ):
        ends(build(checkpoint), [1, 2, 3], rtol=1e-3)


def jumping(monkeypatch: pytest.MonkeyPatch, image: int, height: float) -> None:
    """The field is 1, but for one image, where it jumps to ``height`` at tau = 0.3, in either engine."""

    def packed(self: AdaptiveSteps, x: Tensor, tau: Tensor) -> Tensor:
        v = torch.ones(self.images, x.numel() // self.images, dtype=x.dtype)
        v[image] = height if tau[image] > 0.3 else 1.0
        return v.view_as(x)

    def exact(self: GuidedVelocity, x: Tensor, t_model: Tensor) -> Tensor:
        v = torch.ones_like(x)  # the one stage's window is 0 to 999; model times are float32
        v[image] = height if t_model[image] > 0.3 * 999 else 1.0
        return v

    monkeypatch.setattr(AdaptiveSteps, "_field", packed)
    monkeypatch.setattr(GuidedVelocity, "__call__", exact)


@by_engine
def test_a_step_that_vanishes_is_an_underflow(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A step whose first slope alone lies before the jump errs by 8e-4 of what it adds, so 1e-3 would accept it.
    engine = build(checkpoint_of(random_reference(35), 1, 4), F64)
    jumping(monkeypatch, 1, 1e100)
    (x,), out = ends(engine, [1, 2, 3], guidance_scale=1.0, rtol=1e-5, on_failure="report")
    assert out.statuses == ("ok", "underflow", "ok")
    jumping(monkeypatch, 1, 1.0)
    (y,), fine = ends(engine, [1, 2, 3], guidance_scale=1.0, rtol=1e-5)
    assert fine.statuses == ("ok",) * 3
    assert torch.equal(x[0], y[0])
    assert torch.equal(x[2], y[2])
    jumping(monkeypatch, 2, 1e100)
    with pytest.raises(ConvergenceError, match=r"the slowest image is at 0\.[23]\d+"):
        ends(engine, [1, 2, 3], guidance_scale=1.0, rtol=1e-5)


def test_an_image_that_failed_once_stays_failed() -> None:
    """A later stage may reach its end from what is left of an image; its status is that of the first failure."""
    engine = packed_engine(checkpoint_of(random_reference(36), 2, 8))
    original = AdaptiveSteps._field

    def field(self: AdaptiveSteps, x: Tensor, tau: Tensor) -> Tensor:
        v = original(self, x, tau)
        if self.stage.index == 0:
            v = v.clone()
            v.view(self.images, -1)[0] = torch.where(tau[0] > 0.5, torch.inf, 0.0)
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveSteps, "_field", field)
        states, out = ends(engine, [1, 2, 3], guidance_scale=1.0, on_failure="report")
    assert all(x.isfinite().all() for x in states)
    assert out.statuses == ("nonfinite", "ok", "ok")


# --- when to launch another attempt ------------------------------------------------------------------------


def glanced(*moments: tuple[list[int], list[float], list[float]]) -> list[bool]:
    """Whether another attempt is launched after each of these moments: status, tau and next step of every image."""
    images = len(moments[0][0])
    state = Adaptive.around(torch.zeros(images, 1), images, 7)
    glance, answers = Glance(state), []
    assert glance.anybody_runs(), "nothing was launched yet"
    for status, tau, step in moments:
        load_(state.status, torch.tensor(status, dtype=torch.int32), "status")
        load_(state.tau, torch.tensor(tau, dtype=F64), "tau")
        load_(state.step, torch.tensor(step, dtype=F64), "step")
        glance.take()
        answers.append(glance.anybody_runs())
        assert glance.slowest == min(tau)
    return answers


def test_attempts_are_launched_until_all_images_have_stopped() -> None:
    run, arrived, lost = RUNNING, ARRIVED, NONFINITE
    assert glanced(([run], [0.25], [0.5]), ([run], [0.75], [0.25]), ([arrived], [1.0], [0.1])) == [True, True, False]
    # At the first moment the image could not arrive with its next step, so after the second nobody is asked.
    assert glanced(([run], [0.25], [0.5]), ([lost], [0.25], [0.5]), ([lost], [0.25], [0.5])) == [True, True, False]
    # One image that stopped, in whatever way, neither stops the other nor keeps it going.
    begun, near = ([run, lost], [0.5, 0.1], [0.5, 0.1]), ([lost, run], [0.1, 0.75], [0.1, 0.5])
    assert glanced(begun, ([arrived, lost], [1.0, 0.1], [0.5, 0.1])) == [True, False]
    assert glanced(near, near, ([lost, arrived], [0.1, 1.0], [0.1, 0.5])) == [True, True, False]


def test_steps_and_events_are_counted_alike() -> None:
    """Every attempt is an event; tau never falls back and ends at 1."""
    engine = packed_engine(checkpoint_of(random_reference(37), 2, 8))
    seen: list[tuple[int, int, float]] = []
    _, out = ends(engine, [1, 2, 3], callback_on_step_end=lambda e: seen.append((e.stage, e.step, e.tau)))
    for report in out.stages:
        events = [(step, tau) for stage, step, tau in seen if stage == report.stage]
        assert [step for step, _ in events] == list(range(report.steps))
        assert [tau for _, tau in events] == sorted(tau for _, tau in events)
        assert events[-1][1] == 1.0
