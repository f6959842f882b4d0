"""``bench coldstart``: processes in turns, images checked before times are kept, nothing left behind."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.suites.coldstart import measure
from pixelflow_benchmarks.suites.coldstart.job import ChildError, Job, caches, cold_start, run_process
from pixelflow_benchmarks.suites.coldstart.job import seconds_of_process as seconds_of
from pixelflow_benchmarks.suites.coldstart.measure import TOTAL, measure_cold_starts
from pixelflow_benchmarks.suites.coldstart.table import coldstart_table
from pixelflow_benchmarks.suites.coldstart.variants import ON_GPU, Variant, checker, checkpoint_of, in_order

CPU = torch.device("cpu")
EMPTY, FILLED = "torch, compiled, empty cache", "torch, compiled, filled cache"
IMAGE = torch.linspace(0, 1, 12).view(1, 3, 2, 2)


def job_of(variant: Variant, images: Path, checkpoint: str = "nowhere") -> Job:
    return Job(
        checkpoint=checkpoint,
        device="cpu",
        dtype="float32",
        backend=variant.backend,
        compile=variant.compile,
        graphs=variant.graphs,
        steps=2,
        images=str(images),
    )


class Started:
    """Stands in for processes: leaves images as they do, takes longer from start to start, and may fail.

    Args:
        fail: what a start of that number (from 0) does to its two images; an error it raises is the process's.
    """

    def __init__(self, fail: dict[int, Callable[[list[Tensor]], None]] | None = None) -> None:
        self.fail = fail or {}
        self.seen: list[tuple[bool, Path, bool]] = []

    def __call__(self, job: Job, cache: Path) -> dict[str, Any]:
        number = len(self.seen)
        self.seen.append((job.compile, cache, cache.exists()))
        caches(cache)
        images = [IMAGE.clone(), IMAGE.clone()]
        self.fail.get(number, lambda images: None)(images)
        torch.save(images, job.images)
        return {"seconds": {"first image": number + 0.5, TOTAL: number + 1.0}, "cache_hits": number}


def records_of(started: Started, folder: Path, names: tuple[str, ...], repeats: int = 3, **options: Any) -> Run:
    def check(name: str, image: Tensor) -> str | None:
        return None if bool(image.isfinite().all()) else "not finite"

    found = measure_cold_starts(
        in_order(names), job_of, check, folder, repeats, commands=False, start=started, **options
    )
    return Run("coldstart", "now", [{"kind": "environment"}, *found])


def test_turns_and_caches(tmp_path: Path) -> None:
    started = Started()
    run = records_of(started, tmp_path, ("torch", FILLED))
    assert [compiled for compiled, _, _ in started.seen] == [False, True, True] * 3
    folders = [cache for compiled, cache, _ in started.seen if compiled]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3, "a new one in each turn"
    assert [filled for compiled, _, filled in started.seen if compiled] == [False, True] * 3
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    found = {(r["variant"], r["case"]): r for r in run.of_kind("measurement")}
    assert found.keys() == {(name, case) for name in ("torch", EMPTY, FILLED) for case in ("first image", TOTAL)}
    assert all(r["right"] and r["per"] == "process" for r in found.values())
    seconds = {"median": 6, "low": pytest.approx(4.2), "high": pytest.approx(7.8), "repeats": 3}
    assert found[FILLED, TOTAL]["seconds"] == seconds, "of 3, 6 and 9"
    assert found[FILLED, "first image"]["cache_hits"] == 8


def test_a_filled_cache_brings_in_who_fills_it() -> None:
    assert [v.name for v in in_order([FILLED])] == [EMPTY, FILLED]
    assert [v.name for v in in_order([FILLED, "torch", EMPTY])] == [EMPTY, FILLED, "torch"]
    assert in_order(v.name for v in ON_GPU) == list(ON_GPU)


def test_no_turn_begins_after_the_deadline(tmp_path: Path) -> None:
    started = Started()
    run = records_of(started, tmp_path, ("torch",), deadline=0.0)
    assert len(started.seen) == 1
    assert run.of_kind("measurement")[0]["seconds"]["repeats"] == 1
    started = Started()
    run = records_of(started, tmp_path, ("torch", FILLED), deadline=0.0)
    assert len(started.seen) == 1, "nor any other process of the first turn"
    assert {r["variant"] for r in run.of_kind("measurement")} == {"torch"}


def dies(images: list[Tensor]) -> None:
    raise ChildError("ImportError: no engine")


def spoil(place: int, value: float) -> Callable[[list[Tensor]], None]:
    def change(images: list[Tensor]) -> None:
        images[place][0, 0, 0, 0] = value

    return change


@pytest.mark.parametrize(
    ("fail", "fault"),
    [
        ({0: dies}, "ImportError: no engine"),
        ({2: dies}, "ImportError: no engine"),
        ({0: spoil(0, torch.nan)}, "not finite"),
        ({0: spoil(1, 0.5)}, "1 of 12 values of the second image differ from the first process's"),
        ({2: spoil(0, 0.5)}, "1 of 12 values of the first image differ from the first process's"),
    ],
)
def test_nothing_wrong_gets_a_time(fail: Any, fault: str, tmp_path: Path) -> None:
    started = Started(fail)
    run = records_of(started, tmp_path, ("torch",), repeats=4)
    (record,) = run.records[1:]
    assert record == {"kind": "measurement", "variant": "torch", "case": TOTAL, "right": False, "fault": fault}
    assert len(started.seen) == next(iter(fail)) + 1, "it is not started again"
    assert not list(tmp_path.iterdir())


def test_a_cache_that_could_not_be_filled(tmp_path: Path) -> None:
    run = records_of(Started({1: dies}), tmp_path, ("torch", FILLED), repeats=2)
    (absent,) = run.of_kind("absent")
    assert absent["variant"] == FILLED
    assert absent["reason"] == "no cache was filled: ImportError: no engine"
    found = {(r["variant"], r["case"]): r["right"] for r in run.of_kind("measurement")}
    assert found == {("torch", "first image"): True, ("torch", TOTAL): True, (EMPTY, TOTAL): False}


def test_the_table(tmp_path: Path) -> None:
    run = records_of(Started({1: dies}), tmp_path, ("torch", EMPTY), repeats=2)
    head = {"processor": "P", "threads": "2", "load": 0.5, "torch": "T", "shape": "tiny", "dtype": "float32"}
    run.records[0] |= head | {"steps": 2}
    one = {"median": 2.5, "low": 2.0, "high": 3.0, "repeats": 2}
    line = {"kind": "measurement", "variant": "command line", "case": "pixelflow --help", "right": True, "seconds": one}
    run.records.append(line)
    table = coldstart_table(run)
    assert table.header == ("variant", TOTAL, "first image")
    assert table.rows == (
        ("torch", "2.00 (1.40 to 2.60)", "1.50"),
        (EMPTY, "wrong: no time", "ImportError: no engine"),
        ("pixelflow --help", "2.50 (2.00 to 3.00)", ""),
    )


def test_who_is_checked_how(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("tiny", tmp_path / "model", torch.float32)
    assert {path.name for path in Path(checkpoint.source).iterdir()} == {"config.json", "model.safetensors"}
    from pixelflow_engine import PixelFlowEngine

    engine = PixelFlowEngine.from_pretrained(checkpoint.source)
    image: Any = engine([0], num_inference_steps=2, guidance_scale=2.4, seed=0, output_type="pt").images
    fault = checker(checkpoint, 2, torch.float32, CPU)
    assert fault("torch", image) is None
    near = image.clone()
    near[0, 0, 0, 0] = torch.nextafter(near[0, 0, 0, 0], torch.tensor(2.0))
    assert fault("torch", near) == "1 of 768 values differ from the reference"
    assert fault(EMPTY, near) is None
    assert "bound" in str(fault(EMPTY, image + 1e-4))
    assert fault(EMPTY, image * torch.nan) == "not finite"


def test_processes() -> None:
    assert run_process([sys.executable, "-c", "import os; print(os.environ['WORD'])"], {"WORD": "said"}) == "said\n"
    with pytest.raises(ChildError, match=r"^OSError: second$"):
        run_process([sys.executable, "-c", "import sys; print('out'); sys.exit('first\\nOSError: second')"], {})
    with pytest.raises(ChildError, match="status 3, without a word"):
        run_process([sys.executable, "-c", "import sys; sys.exit(3)"], {})
    assert seconds_of([sys.executable, "-c", "import time; time.sleep(0.05); print('word')"], "word") > 0.05
    with pytest.raises(ChildError, match="'word' is not in what it said"):
        seconds_of([sys.executable, "-c", "pass"], "word")


def test_a_child_that_fails(tmp_path: Path) -> None:
    job = job_of(in_order(["torch"])[0], tmp_path / "images.pt", str(tmp_path / "nowhere"))
    with pytest.raises(ChildError, match=r"CheckpointError: .*nowhere: no such file or folder"):
        cold_start(job, tmp_path / "cache")


def test_the_engine_is_imported_in_the_phase_of_that_name() -> None:
    """Its package is lazy. The clock is read where a phase begins and ends: torch's, the engine's, the next one."""
    program = """
import sys
from types import SimpleNamespace
from pixelflow_benchmarks.suites.coldstart import child
read = []
child.time = SimpleNamespace(monotonic=lambda: read.append("pixelflow_engine.engine" in sys.modules) or 0.0)
try:
    child.start({"began": 0.0, "device": "cpu", "dtype": "float32", "checkpoint": "nowhere"}, 0.0)
except Exception as error:
    print(type(error).__name__, read)
"""
    said = run_process([sys.executable, "-c", program], {})
    assert said == "CheckpointError [False, False, False, True, True]\n"


def test_files_of_the_engine_and_of_compilers_are_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(measure, "run_process", lambda command, variables: ran.append(command))
    measure.read_files_once()
    ((*python, program),) = ran
    said = run_process([*python, f"{program}; import sys; print(*sys.modules)"], {})
    assert {"torch", "pixelflow_engine.engine", "torch._inductor.compile_fx", "triton"} <= {*said.split()}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "coldstart.jsonl"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    # Where Inductor is first imported in this process, it makes its folder in the temporary one, which must stay empty.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    command = ["coldstart", "--device", "cpu", "--shape", "tiny", "--steps", "2", "--repeats", "1"]
    names = ("torch", "triton, graphs, filled cache")
    options = [word for name in names for word in ("--variant", name)]
    result = CliRunner().invoke(bench, [*command, *options, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "temporary").iterdir()), "nothing is left behind"
    records = [json.loads(line) for line in output.read_text().splitlines()]
    found = {r["case"]: r["seconds"]["median"] for r in records if r["kind"] == "measurement"}
    assert list(found) == [
        "interpreter",
        "import torch",
        "import engine",
        "load checkpoint",
        "build engine",
        "first image",
        TOTAL,
        "second image",
    ]
    parts = sum(seconds for case, seconds in found.items() if case not in (TOTAL, "second image"))
    assert 0.8 * found[TOTAL] < parts <= found[TOTAL]
    absent = [r["variant"] for r in records if r["kind"] == "absent"]
    assert absent == ["triton, graphs, empty cache", "triton, graphs, filled cache"]
    assert "absent: triton, graphs, empty cache" in result.output


def test_an_unknown_variant_is_refused() -> None:
    result = CliRunner().invoke(bench, ["coldstart", "--variant", "cuda"])
    assert "variant: got 'cuda', expected one of 'triton, graphs, empty cache', " in str(result.exception)
