"""``bench stages`` on a CPU at a tiny shape: who runs, what is checked, what a record says."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.harness.tables import missing
from pixelflow_benchmarks.harness.timing import Timing
from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.stages import measure as measure_module
from pixelflow_benchmarks.suites.stages import opponents as opponents_module
from pixelflow_benchmarks.suites.stages import runs as stage_runs
from pixelflow_benchmarks.suites.stages.measure import (
    NOTHING_TO_COMPARE,
    attempt_faults,
    ends_of,
    figures,
    measure_stages,
    measure_task,
    per_evaluation,
    stage_faults,
)
from pixelflow_benchmarks.suites.stages.opponents import COMPILED_REFERENCE, TORCHDIFFEQ, VARIANTS, Opponents
from pixelflow_benchmarks.suites.stages.problem import ATTEMPTS, REFERENCE, Attempt, Ran, StageProblem
from pixelflow_benchmarks.suites.stages.runs import true_attempt, true_first_state
from pixelflow_benchmarks.suites.stages.tasks import Task, tasks
from pixelflow_kernels.ode_step import reference as ode_reference
from support.engines import uncompiled
from support.recording import RecordingCapture
from support.results import run_of

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e12, dtype=torch.float32)
TINY = StageProblem(config=SHAPES["tiny"], stage=1, batch=3, steps=2, solver="euler", dtype=torch.float32, device=CPU)


def opponents(problem: StageProblem = TINY) -> Opponents:
    return Opponents(problem.config, random_weights(problem.config, CPU, problem.dtype), problem.dtype, None)


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "stages.jsonl"
    who = [word for name in ("reference", "torch/eager", "triton/graphs") for word in ("--variant", name)]
    command = ["stages", "--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--batch", "2", "--steps", "2"]
    command += ["--solver", "euler", "--solver", "dopri5"]
    result = CliRunner().invoke(bench, [*command, *who, "--repeats", "3", "--output", str(output)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["kind"] for r in records[:2]] == ["environment", "ceilings"]
    measured = [(r["solver"], r["stage"], r["variant"]) for r in records if r["kind"] == "measurement"]
    assert measured == [
        (solver, stage, variant)
        for solver in ("euler", "dopri5")
        for stage in (1, 0)
        for variant in ("reference", "torch/eager")
    ]
    assert all(r["right"] and r["seconds"]["median"] > 0 for r in records if r["kind"] == "measurement")
    assert all(r["times"][REFERENCE]["repeats"] == 3 for r in records if r["kind"] == "measurement")
    assert [r["variant"] for r in records if r["kind"] == "absent"] == ["triton/graphs"], "told once"
    assert "absent: triton/graphs" in result.output


def test_an_unknown_opponent_is_refused() -> None:
    command = ["stages", "--device", "cpu", "--shape", "tiny", "--variant", "cuda/eager"]
    result = CliRunner().invoke(bench, command)
    assert isinstance(result.exception, ValueError)
    assert "variant: got 'cuda/eager', expected one of 'reference'" in str(result.exception)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_the_packed_stages_are_right_too(solver: Any) -> None:
    problem = replace(TINY, solver=solver)
    task = Task(problem, (REFERENCE, "torch/eager", "torch/compiled"))
    with uncompiled():
        found = list(measure_task(task, opponents(problem), CEILINGS, repeats=2))
    assert [r["variant"] for r in found] == list(task.variants)
    assert all(r["right"] for r in found), found
    steps, evaluations = (2, {2}) if solver == "euler" else (ATTEMPTS, {2 + 6 * ATTEMPTS, 2 + 6 * (ATTEMPTS + 1)})
    assert all(r["steps"] == steps for r in found)
    assert {r["evaluations"] for r in found} <= evaluations, "the last attempt may have been launched unseen"
    assert not any("joules" in r for r in found), "a CPU has no counter"


def test_what_is_wrong_is_found() -> None:
    who = opponents()
    run = who.runs(REFERENCE, TINY)
    assert run is not None
    right = run.run(keep_first=True)
    assert right.first is not None
    truth = true_first_state(TINY, who.weights, ends_of(TINY))
    error = (right.first[[0, 2]].double() - truth[0]).abs().max().item()
    bound = 2 * error + torch.finfo(torch.float32).eps * truth[1]
    for shift, image, said in ((2 * bound, 0, True), (2 * bound, 2, True), (bound / 100, 0, False)):
        first = right.first.clone()
        first[image, 0, 0, 0] += shift
        found = stage_faults(TINY, {REFERENCE: right, "x": replace(right, first=first)}, truth)
        assert found[REFERENCE] == []
        assert bool(found["x"]) == said, found
    lost = replace(right, end=right.end.fill_(torch.nan))
    assert stage_faults(TINY, {"x": lost}, None) == {"x": ["not finite"]}


DOPRI5 = replace(TINY, solver="dopri5", batch=2)


def test_the_first_attempt_of_everyone_is_a_step_of_its_own_length() -> None:
    who = opponents(DOPRI5)
    with uncompiled():
        runs = {name: who.runs(name, DOPRI5) for name in (REFERENCE, TORCHDIFFEQ, "torch/eager", "torch/compiled")}
        attempts = {name: run.attempt() for name, run in runs.items() if run is not None}
    known = {name: attempt for name, attempt in attempts.items() if attempt is not None}
    assert known.keys() == runs.keys()
    assert known["torch/eager"].reached == known[REFERENCE].reached, "the same bits"
    assert known[TORCHDIFFEQ].reached != known[REFERENCE].reached, "its step is the batch's"
    truth = partial(true_attempt, DOPRI5, who.weights)
    assert attempt_faults(DOPRI5, known, truth) == {name: [] for name in known}
    right = known["torch/compiled"]
    state, _ = truth(right.reached)
    bound = 2 * (known[REFERENCE].state - truth(known[REFERENCE].reached)[0]).abs().max().item()
    off = right.state.clone()
    off[0, 0, 0, 0] = state[0, 0, 0, 0] + 3 * bound
    wrong = {
        "value": replace(right, state=off),
        "length": replace(right, reached=1.01 * right.reached),
        "nothing": Attempt(DOPRI5.start()[-1:], 0.0),
        "nan": replace(right, reached=torch.nan),
    }
    found = attempt_faults(DOPRI5, {REFERENCE: known[REFERENCE], **wrong}, truth)
    assert [len(said) for said in found.values()] == [0, 1, 1, 1, 1], found
    assert attempt_faults(DOPRI5, {"value": right}, truth) == {"value": [NOTHING_TO_COMPARE]}, "nothing sets a bound"


def test_an_attempt_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the run that is timed stay as they were, and what the others left is not read after they end."""
    monkeypatch.setattr(stage_runs, "CudaCapture", lambda device: RecordingCapture())
    who = opponents(DOPRI5)
    with uncompiled():
        plain, packed = (who.runs(name, DOPRI5) for name in (REFERENCE, "torch/compiled"))
        assert isinstance(packed, stage_runs.EngineRun)
        packed.engine.graphs = True
        run = stage_runs.EngineRun(packed.engine, DOPRI5)
        before, attempt, after = run.run(), run.attempt(), run.run()
    assert torch.equal(before.end, after.end)
    assert len(run.store.programs) == 1
    assert plain is not None
    first = plain.attempt()
    assert first is not None
    assert attempt is not None
    truth = partial(true_attempt, DOPRI5, who.weights)
    assert attempt_faults(DOPRI5, {REFERENCE: first, "graphs": attempt}, truth)["graphs"] == []
    run.close()


def test_a_wrong_stage_of_dopri5_yields_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of its tableau that is off by a thousandth is no error that its error control would see."""
    who = opponents(DOPRI5)
    right = ode_reference.stage_state

    def off(x: torch.Tensor, slopes: torch.Tensor, step: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        return right(x, slopes, step, [*weights[:-1], 1.001 * weights[-1]])

    monkeypatch.setattr(ode_reference, "stage_state", off)
    with uncompiled():
        found = list(measure_task(Task(DOPRI5, (REFERENCE, "torch/compiled")), who, CEILINGS, repeats=1))
    plain, packed = found
    assert plain["right"]
    assert plain["seconds"]["repeats"] == 1
    assert not packed["right"]
    assert "first attempt: error" in packed["fault"]
    assert "seconds" not in packed


@pytest.mark.parametrize("said", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_what_lacks_memory_for_float64_gets_no_time(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(measure_module, "true_attempt", lacking)
    (found,) = measure_task(Task(DOPRI5, (REFERENCE,)), opponents(DOPRI5), CEILINGS, repeats=1)
    assert found["fault"] == f"first attempt: not compared with float64, RuntimeError: {said}"
    assert "seconds" not in found


def test_a_failure_of_one_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    who = opponents()
    run = who.runs("torch/eager", TINY)
    assert run is not None

    def fail(keep_first: bool = False) -> Ran:
        raise RuntimeError("FailOnRecompileLimitHit\nmore")

    monkeypatch.setattr(type(run), "run", lambda self, keep_first=False: fail())
    records = list(measure_task(Task(TINY, (REFERENCE, "torch/eager")), who, CEILINGS, repeats=1))
    by = {r["variant"]: r for r in records}
    assert by[REFERENCE]["right"]
    assert by["torch/eager"] == {
        "kind": "measurement", "case": "stage 1, batch 3, euler",
        "stage": 1, "batch": 3, "solver": "euler", "tokens": 64, "weight": 2.4,
        "variant": "torch/eager", "right": False, "fault": "RuntimeError: FailOnRecompileLimitHit",
    }  # fmt: skip


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, GeneratorExit])
def test_runs_are_closed_however_a_task_ends(interrupted: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it is timed, or left after its first record."""
    closed: list[object] = []
    monkeypatch.setattr(stage_runs.EngineRun, "close", lambda self: closed.append(self))
    records = measure_task(Task(TINY, (REFERENCE, "torch/eager")), opponents(), CEILINGS, repeats=1)
    if interrupted is GeneratorExit:
        next(records)
        records.close()  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(measure_module, "time_runs", interrupting)
        with pytest.raises(KeyboardInterrupt):
            next(records)
    assert len(closed) == 1


def test_who_cannot_be_checked_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither whose first attempt fails, nor anybody where the reference does."""

    def failing(*_: object, **__: object) -> Any:
        raise RuntimeError("CUDA error: misaligned address")

    with uncompiled(), monkeypatch.context() as patch:
        patch.setattr(stage_runs.EngineRun, "attempt", failing)
        task = Task(DOPRI5, (REFERENCE, "torch/compiled"))
        plain, engine = measure_task(task, opponents(DOPRI5), CEILINGS, repeats=1)
    assert plain["right"]
    assert (engine["right"], engine["fault"]) == (False, "RuntimeError: CUDA error: misaligned address")
    assert "seconds" not in engine
    for problem in (TINY, DOPRI5):
        with uncompiled(), monkeypatch.context() as patch:
            patch.setattr(stage_runs.ReferenceRun, "run", failing)
            task = Task(problem, (REFERENCE, "torch/compiled"))
            plain, engine = measure_task(task, opponents(problem), CEILINGS, repeats=1)
        assert not plain["right"]
        assert not engine["right"]
        assert NOTHING_TO_COMPARE in engine["fault"]


def test_a_published_process_that_ended_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Process(PublicProcess):
        ended = False

        def __init__(self, *_: object) -> None:
            made.append(self)

        def ask(self, asked: Any) -> Any:
            return {}

        def close(self) -> None:
            self.ended = True

    monkeypatch.setattr(opponents_module, "PublicProcess", Process)
    who = replace(opponents(), public=Path("checkout"))
    who.runs("public", TINY)
    who.runs("public", TINY)
    assert len(made) == 1
    made[0].ended = True
    who.runs("public", TINY)
    assert len(made) == 2


def interrupting(*_: object) -> Any:
    raise KeyboardInterrupt


def test_the_floor_is_that_of_the_shapes() -> None:
    """The published model at its last stage: 3653 and 2165 GFLOP an image, 24 bytes a token, channel and block."""
    xl = StageProblem(config=SHAPES["xl"], stage=3, batch=16, steps=4, solver="euler", dtype=torch.bfloat16, device=CPU)
    assert (xl.tokens, xl.sequences, replace(xl, stage=0).sequences) == (4096, 32, 16)
    assert xl.flops / 32 == pytest.approx((3653 + 2165) * 1e9, rel=1e-3)
    assert xl.pointwise_bytes == 24 * 32 * 4096 * 1152 * 28
    ran = Ran(None, torch.zeros(1), steps=4, evaluations=4)
    found = figures(xl, per_evaluation(xl, ran, Timing((0.2 * 16,))), Ceilings(3.0e12, 798e12, torch.bfloat16))
    assert found["seconds"]["median"] == pytest.approx(0.05)
    assert found["floor_seconds"] == pytest.approx(0.0167, abs=5e-5)
    assert found["fraction_of_floor"] == pytest.approx(16.7 / 50, abs=0.001)


def test_the_most_important_comes_first() -> None:
    everything = list(
        tasks(
            SHAPES["xl"],
            VARIANTS,
            range(4),
            [32, 1, 4, 16],
            ["dopri5", "euler"],
            None,
            torch.bfloat16,
            torch.device("cuda"),
        )
    )
    order = [(t.problem.batch, t.problem.solver, t.problem.stage) for t in everything]
    assert order[:4] == [(16, "euler", stage) for stage in (3, 2, 1, 0)]
    assert order[4:8] == [(16, "dopri5", stage) for stage in (3, 2, 1, 0)]
    assert {(b, s) for b, s, _ in order} == {(b, s) for b in (1, 4, 16, 32) for s in ("euler", "dopri5")}
    assert [t.problem.steps for t in everything[:4]] == [4, 10, 30, 30]
    on_cpu = tasks(SHAPES["cpu"], VARIANTS, range(4), [1], ["euler"], None, torch.float32, CPU)
    assert [t.problem.steps for t in on_cpu][:4] == [2, 2, 8, 30]
    assert {name for t in everything for name in t.variants} == set(VARIANTS)


def test_energy_is_measured_in_every_group_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "joules_of", lambda run, device: {"joules": 12.0, "watts": 3.0})
    variants = (REFERENCE, "torch/eager", "torch/compiled")
    tasks = [Task(replace(TINY, batch=batch), variants) for batch in (3, 2)]
    with uncompiled():
        records = list(measure_stages(tasks, opponents(), CEILINGS, repeats=1, budget=600))
    for batch, (plain, *engines) in ((3, records[:3]), (2, records[3:])):
        assert plain["joules"] == 12 / (batch * 2), "per image and evaluation"
        fast, slow = sorted(engines, key=lambda r: r["seconds"]["median"])
        assert fast["joules"] == 12 / (batch * 2)
        assert "joules" not in slow
    (late,) = measure_task(Task(TINY, (REFERENCE,)), opponents(), CEILINGS, 1, deadline=time.perf_counter() - 1)
    assert late["right"]
    assert "seconds" in late
    assert "joules" not in late


def test_the_reference_is_told_once() -> None:
    """Though the others come in two groups, and it takes part in both."""
    work = [Task(TINY, (REFERENCE,)), Task(TINY, (REFERENCE, "torch/eager"))]
    records = list(measure_stages(work, opponents(), CEILINGS, repeats=1, budget=60))
    assert [r["variant"] for r in records] == [REFERENCE, "torch/eager"]
    assert all(r["times"][REFERENCE]["repeats"] == 1 for r in records)


def test_the_budget_ends_the_run() -> None:
    work = [Task(TINY, (REFERENCE, "flash/eager")), Task(replace(TINY, stage=0), (REFERENCE,))]
    records = list(measure_stages(work, opponents(), CEILINGS, repeats=1, budget=0.001))
    assert [r["kind"] for r in records] == ["measurement", "absent", "skipped"]
    assert list(missing(run_of("stages", *records)).values()) == [["flash/eager"]]
    assert (records[2]["stage"], records[2]["variants"]) == (0, [REFERENCE])


def test_torchdiffeq_takes_the_references_steps() -> None:
    """For one image, whose error norm is the batch's: the same attempts and, up to the order of sums, states."""
    problem = replace(TINY, solver="dopri5", batch=1)
    who = opponents(problem)
    plain, theirs = (who.runs(name, problem) for name in (REFERENCE, TORCHDIFFEQ))
    assert plain is not None
    assert theirs is not None
    ours, other = plain.run(), theirs.run()
    assert (other.steps, other.evaluations) == (ours.steps, ours.evaluations)
    torch.testing.assert_close(other.end, ours.end, rtol=1e-4, atol=1e-4)
    assert not torch.equal(other.end, problem.start())


def test_who_has_one_solver_is_asked_for_no_other() -> None:
    everything = tasks(TINY.config, VARIANTS, [1], [2], ["euler", "dopri5"], None, torch.float32, CPU)
    by = {solver: {v for t in everything if t.problem.solver == solver for v in t.variants} for solver in ("euler",)}
    assert TORCHDIFFEQ not in by["euler"]
    dopri5 = {
        v for t in tasks(TINY.config, VARIANTS, [1], [2], ["dopri5"], None, torch.float32, CPU) for v in t.variants
    }
    assert TORCHDIFFEQ in dopri5
    assert "public" in dopri5 & by["euler"], "the published code has both"


def test_the_compiled_reference_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    who = opponents()
    assert who.runs(REFERENCE, TINY) is not None
    assert compiled == []
    assert who.runs(COMPILED_REFERENCE, TINY) is not None
    assert compiled == [{"dynamic": False}] * TINY.config.model.depth
