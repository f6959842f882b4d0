"""``pytest benchmarks --benchmark-only``: every case under its name, and nothing wrong gets a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.suites.kernels import cascade
from pixelflow_benchmarks.suites.kernels import case as case_module
from pixelflow_benchmarks.suites.kernels.cases import OPS, all_cases

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run without a GPU, and its JSON by ``case, variant``."""
    out = folder / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={out}"]
    roots = os.pathsep.join([str(folder), *filter(None, sys.path)])
    # pytest-benchmark times nothing in a process of pytest-xdist, for which it would take this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "addopts=-ra", *arguments],
        cwd=ROOT,
        env=env | {"PYTHONPATH": roots, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    written = json.loads(text)["benchmarks"] if out.exists() and (text := out.read_text()) else []
    by_name = {f"{b['extra_info']['case']}, {b['extra_info']['variant']}": b for b in written}
    return found, by_name


def test_cases_are_timed_under_their_names(tmp_path: Path) -> None:
    wanted = "(euler and stage0 and (eager or reference) and not compiled) or (b1 and exact) or (attention and ours)"
    wanted += " or (b4 and plain)"
    done, found = run(tmp_path, "-k", wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {*found} == {
        "ode_step.euler/stage0-b1, eager",
        "stage 0, batch 2, euler, reference",
        "stage 0, batch 2, euler, torch/eager",
        "batch 1, euler 2, engine, exact",
        "batch 4, engine, plain",
    }
    assert {b["group"] for b in found.values()} == {b["extra_info"]["case"] for b in found.values()}
    assert all(b["stats"]["rounds"] == 20 and b["stats"]["min"] > 0 for b in found.values())
    assert found["ode_step.euler/stage0-b1, eager"]["extra_info"]["bytes"] == 4 * 8 * 8 * 48 * 4
    assert "'triton' cannot run" in done.stdout, "who is absent is named, with the reason"


WRONG = """
from pixelflow_benchmarks.suites.kernels import ode_step
from pixelflow_benchmarks.suites.images import opponents
from pixelflow_benchmarks.suites.training.runs import EngineRun
from pixelflow_engine.packed_stages import PackedStages
from pixelflow_engine.plain_stages import PlainStages

euler_step, images, stages = ode_step.euler_step, opponents.engine_images, PlainStages.run
taken = EngineRun.taken
ode_step.euler_step = lambda *a: euler_step(*a) * 1.001
opponents.engine_images = lambda *a: images(*a) * 0.999


def run(self, x, plan, on_step):
    def off(step, tau, states):
        return on_step(step, tau, lambda: [x * 1.01 for x in states()])

    return stages(self, x, plan, off)


def twice(self, losses):
    found = taken(self, losses)
    for gradient in found.by_name.values():
        gradient *= 2
    return found


PlainStages.run, EngineRun.taken = run, twice
"""


def test_what_is_wrong_fails_and_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "seeded.py").write_text(WRONG)
    wanted = "(ode_step and euler and (ours or eager)) or (stage0 and euler and eager and torch) or (images and exact)"
    wanted += " or (b4 and plain)"
    done, found = run(tmp_path, "-p", "seeded", "-k", wanted)
    assert done.returncode == 1, done.stdout + done.stderr
    assert {*found} == {"ode_step.euler/stage0-b1, eager"}
    for said in (
        "ode_step.euler/stage0-b1, ours: output 0: ",
        "stage 0, batch 2, euler, torch/eager: error ",
        "batch 1, euler 2, engine, exact: ",
        "batch 4, engine, plain: gradient",
    ):
        assert said in done.stdout
    assert "4 failed, 1 passed" in done.stdout


def entry_points() -> ModuleType:
    spec = importlib.util.spec_from_file_location("entry_points", ROOT / "benchmarks" / "test_kernel_speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass asks for it
    spec.loader.exec_module(module)
    return module


def test_no_case_of_the_kernels_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is collected without making a tensor is what the cases are."""
    for module in (case_module, cascade):
        monkeypatch.setattr(module, "STAGE_SIDES", (1, 2, 4, 8))
    monkeypatch.setitem(sys.modules, "entry_points", ModuleType("entry_points"))
    entry = entry_points()
    entry.ON_GPU, entry.BATCH = True, 1
    made = {
        (case.name, variant)
        for case in all_cases(OPS, range(4), 1, torch.float32, torch.device("cpu"))
        for variant in (*case.variants, *case.absent)
    }
    collected = {(parameter.id.rpartition("-b1-")[0] + "-b1", parameter.values[2]) for parameter in entry.cases()}
    assert made == collected
    assert len([*entry.cases()]) == len(collected)


def test_a_plain_run_of_pytest_does_not_collect_them() -> None:
    import tomllib

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
