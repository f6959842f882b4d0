"""The published code's stages, by what of a checkout is asked for in few lines: its steps, its Dopri5, its memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.public_sampling import SamplingServer
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.stages import opponents as opponents_module
from pixelflow_benchmarks.suites.stages.measure import measure_task
from pixelflow_benchmarks.suites.stages.opponents import PUBLIC, Opponents
from pixelflow_benchmarks.suites.stages.problem import ATTEMPTS, REFERENCE, StageProblem, StageSolver
from pixelflow_benchmarks.suites.stages.tasks import Task

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e12, dtype=torch.float32)
TINY = StageProblem(config=SHAPES["tiny"], stage=1, batch=2, steps=3, solver="euler", dtype=torch.float32, device=CPU)

CHECKOUT = {
    "diffusers/models/embeddings.py": """
import numpy

def get_2d_rotary_pos_embed(embed_dim, crops_coords, grid_size):
    return numpy.zeros((grid_size[0] ** 2, embed_dim)), numpy.ones((grid_size[0] ** 2, embed_dim))
""",
    "pixelflow/model.py": """
import torch
from pixelflow_engine.reference import PixelFlowTransformer

class PixelFlowModel(PixelFlowTransformer):
    def __init__(self, attention_bias, **fields):
        super().__init__(**fields)

    def forward(self, hidden_states, timestep, class_labels, latent_size, pos_embed):
        assert pos_embed.shape == ((hidden_states.shape[-1] // self.patch_size) ** 2, 8, 2)
        return super().forward(hidden_states, timestep, class_labels, latent_size)

    def c2i_forward_cfg_torchdiffq(self, hidden_states, timestep, class_labels, latent_size, pos_embed, cfg_scale):
        half = hidden_states[: len(hidden_states) // 2]
        v = self.forward(torch.cat([half, half]), timestep, class_labels, latent_size, pos_embed)
        null, conditional = v.chunk(2)
        return torch.cat([null + cfg_scale * (conditional - null)] * 2)
""",
    "pixelflow/scheduling_pixelflow.py": """
import torch
from pixelflow_engine.reference import euler_times, make_stages

class PixelFlowScheduler:
    def __init__(self, steps, num_stages):
        self.stages = make_stages(num_stages)
        self.Timesteps_per_stage = {s: torch.tensor(stage.window) for s, stage in enumerate(self.stages)}

    def set_timesteps(self, steps, stage, device, shift):
        self.tau, self.Timesteps = euler_times(self.stages[stage], steps, shift)
        self.place = 0

    def step(self, model_output, sample):
        step = (self.tau[self.place + 1] - self.tau[self.place]).float()
        self.place += 1
        return sample + step * model_output
""",
    "pixelflow/solver_ode_wrapper.py": """
import torch
from torchdiffeq import odeint

class ODE:
    def __init__(self, *, t0, t1, sampler_type, num_steps, atol, rtol):
        self.t, self.tolerance = torch.linspace(t0, t1, num_steps), {"atol": atol, "rtol": rtol}

    def sample(self, x, model, T_start, T_end, **options):
        def field(t, x):
            return model(x, torch.ones(len(x)) * (T_start + (T_end - T_start) * t), **options)

        return odeint(field, x, self.t, method="dopri5", **self.tolerance)
""",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """Such a checkout, whose modules are gone afterwards."""
    for name, text in CHECKOUT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("pixelflow", "diffusers"):
            del sys.modules[name]


class InThisProcess(PublicProcess):
    """Answers as the other process does, without one."""

    ended = False

    def __init__(self, path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.server = SamplingServer(path, "tiny", "float32", "cpu")
        self.folder = SimpleNamespace(name=str(path))  # type: ignore[assignment]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        request = json.loads(json.dumps(request))
        found: dict[str, Any] = json.loads(json.dumps(getattr(self.server, request.pop("do"))(**request)))
        return found

    def close(self) -> None:
        """There is nothing to end."""


@pytest.fixture
def opponents(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Opponents:
    monkeypatch.setattr(opponents_module, "PublicProcess", InThisProcess)
    return Opponents(TINY.config, random_weights(TINY.config, CPU), torch.float32, checkout)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_it_is_checked_and_timed(solver: StageSolver, stage: int, opponents: Opponents) -> None:
    problem = replace(TINY, solver=solver, stage=stage)
    records = list(measure_task(Task(problem, (REFERENCE, PUBLIC)), opponents, CEILINGS, repeats=2))
    assert opponents.absent == {}
    assert [(r["variant"], r["right"]) for r in records] == [(REFERENCE, True), (PUBLIC, True)]
    assert [*records[0]["times"]] == [REFERENCE, PUBLIC]
    assert records[1]["times"][PUBLIC]["median"] == 1
    assert "peak_bytes" not in records[1], "a CPU tells none"


def test_its_euler_steps_are_the_references(opponents: Opponents) -> None:
    plain, public = (opponents.runs(name, TINY) for name in (REFERENCE, PUBLIC))
    assert plain is not None
    assert public is not None
    ours, theirs = plain.run(keep_first=True), public.run(keep_first=True)
    assert ours.first is not None
    assert theirs.first is not None
    torch.testing.assert_close(theirs.first, ours.first)
    torch.testing.assert_close(theirs.end, ours.end)
    assert (theirs.steps, theirs.evaluations) == (3, 3)
    assert public.run().end.shape == (1,), "states are fetched when they are asked for"


def test_its_dopri5_ends_after_as_many_attempts_as_everybodys(opponents: Opponents) -> None:
    """It has no bound of its own, and with random weights it could go on for long."""
    problem = replace(TINY, solver="dopri5", steps=30)
    run = opponents.runs(PUBLIC, problem)
    assert run is not None
    ran = run.run(keep_first=True)
    assert (ran.steps, ran.evaluations) == (ATTEMPTS, 2 + 6 * ATTEMPTS)
    assert ran.first is None
    assert ran.end.shape == problem.shape, "without the other half of the guidance"
    assert not torch.equal(ran.end, problem.start())
    assert bool(ran.end.isfinite().all())


def test_an_easy_stage_is_integrated_to_its_end(opponents: Opponents, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is constant in time and space needs no more than one or two attempts."""
    problem = replace(TINY, solver="dopri5", steps=2)
    run = opponents.runs(PUBLIC, problem)
    assert run is not None
    server = opponents._made[PUBLIC].server
    monkeypatch.setattr(server.model, "c2i_forward_cfg_torchdiffq", lambda x, t, **options: torch.full_like(x, 2.0))
    ran = run.run(keep_first=True)
    assert ran.steps < ATTEMPTS
    torch.testing.assert_close(ran.end, problem.start() + 2)


def test_its_peak_is_that_of_its_process(opponents: Opponents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights included, which lie there alone: nothing is added to what it says."""
    from pixelflow_benchmarks.suites.stages.runs import PublicRun

    said = {"steps": 3, "evaluations": 3, "peak_bytes": 12345}
    ask = InThisProcess.ask

    def with_peak(self: InThisProcess, request: dict[str, Any]) -> dict[str, Any]:
        return ask(self, request) | (said if request["do"] == "run" else {})

    monkeypatch.setattr(InThisProcess, "ask", with_peak)
    records = list(measure_task(Task(TINY, (REFERENCE, PUBLIC)), opponents, CEILINGS, repeats=1))
    assert records[1]["peak_bytes"] == 12345
    run = opponents.runs(PUBLIC, TINY)
    assert isinstance(run, PublicRun)
    assert run.peak_bytes is None, "of this problem nothing was run yet"


def test_a_checkout_that_lacks_something_is_named_and_the_rest_runs(
    opponents: Opponents, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "pixelflow/scheduling_pixelflow.py").write_text("import a_package_that_is_missing\n")
    records = list(measure_task(Task(TINY, (REFERENCE, PUBLIC)), opponents, CEILINGS, repeats=1))
    assert [(r["variant"], r["right"]) for r in records] == [(REFERENCE, True)]
    assert opponents.absent == {PUBLIC: "ModuleNotFoundError: No module named 'a_package_that_is_missing'"}


@pytest.mark.parametrize(
    ("until", "calls"),
    [
        ("stdin", ["wait"]),
        ("terminate", ["wait", "terminate", "wait"]),
        ("kill", ["wait", "terminate", "wait", "kill", "wait"]),
    ],
)
def test_a_process_that_stays_is_ended(until: str, calls: list[str]) -> None:
    """A process that exits when its stdin is closed, only when it is told to, or not even then."""
    made: list[str] = []

    class Staying:
        stdin, stdout = io.StringIO(), io.StringIO()

        def __init__(self) -> None:
            self.gone = False

        def wait(self, timeout: float | None = None) -> None:
            made.append("wait")
            if not (self.gone or (until == "stdin" and self.stdin.closed)):
                assert timeout is not None, "it would wait for ever"
                raise subprocess.TimeoutExpired("public", timeout)

        def terminate(self) -> None:
            made.append("terminate")
            self.gone = until == "terminate"

        def kill(self) -> None:
            made.append("kill")
            self.gone = True

    public = PublicProcess.__new__(PublicProcess)
    public.process, public.folder = Staying(), TemporaryDirectory()  # type: ignore[assignment]
    public.close()
    assert made == calls
    assert public.process.stdout is not None
    assert public.process.stdout.closed
    assert not Path(public.folder.name).exists()
