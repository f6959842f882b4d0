"""Result files: what is written is what is read; and what is said about the device."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.harness import environment as environment_module
from pixelflow_benchmarks.harness.environment import device_name, environment, state
from pixelflow_benchmarks.harness.results import newest, read_runs, recording, result_file, result_files
from pixelflow_benchmarks.harness.tables import faults
from support.results import run_of, write_runs

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_a_run_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    with recording(tmp_path, "kernels", CPU, batch=16) as keep:
        keep({"kind": "measurement", "case": "a", "variant": "ours", "right": True})
        keep.all([{"kind": "absent", "variant": "flash", "reason": "not installed"}])
    (path,) = result_files(tmp_path)
    assert path.parent.name == device_name(CPU)
    (run,) = read_runs(path)
    assert (run.suite, run.began) == ("kernels", keep.run.began)
    assert run.records == keep.run.records
    assert [r["kind"] for r in run.records] == ["environment", "measurement", "absent", "end"]
    assert run.environment["batch"] == 16
    assert {"commit", "torch", "python", "processor", "threads", "load"} <= run.environment.keys()


def test_a_fault_is_told_whatever_else_its_record_has() -> None:
    run = run_of("kernels", {"kind": "measurement", "case": "a", "variant": "ours", "fault": "off"}, {"fault": "lost"})
    assert faults(run) == ["a, ours: off", "None, None: lost"]


def test_a_file_is_only_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    for suite in ("kernels", "stages", "kernels"):
        with recording(file, suite, CPU) as keep:
            keep({"kind": "skipped"})
        if suite == "kernels":
            before = file.read_text()
    runs = read_runs(file)
    assert [run.suite for run in runs] == ["kernels", "stages", "kernels"]
    assert file.read_text() == before
    found = newest(runs, "kernels")
    assert found is runs[2]
    assert newest(runs, "images") is None


def test_what_is_cut_short_keeps_what_it_has(tmp_path: Path) -> None:
    def cut() -> None:
        with recording(tmp_path / "r.jsonl", "stages", CPU) as keep:
            keep({"kind": "skipped"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    (run,) = read_runs(tmp_path / "r.jsonl")
    assert [r["kind"] for r in run.records] == ["environment", "skipped"], "no end"


def test_numbers_that_are_none_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"), recording(tmp_path / "r.jsonl", "stages", CPU) as keep:
        keep({"kind": "measurement", "seconds": {"median": float("nan")}})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"suite": "a", "run": "b", "kind": "environment"}\n{"suite": "a", "ru', 2),
        ('{"kind": "environment"}\n', 1),
        ("[1, 2]\n", 1),
        ('{"suite": "a", "run": "b", "kind": "measurement"}\n', 1),
    ],
)
def test_what_is_no_result_file_is_refused(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"results: .*r\.jsonl, line {line}: expected a"):
        read_runs(tmp_path / "r.jsonl")


def test_what_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"^results: .*picture\.jsonl, line 1: expected UTF-8"):
        read_runs(tmp_path / "picture.jsonl")


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixelflow_benchmarks.harness import results

    when = datetime(2026, 5, 6, 7, tzinfo=UTC)
    for commit, name in (
        ("0123456789abcdef", "2026-05-06-0123456789"),
        ("unknown+changes", "2026-05-06-unknown+changes"),
    ):
        monkeypatch.setattr(results, "environment", lambda commit=commit: {"commit": commit})
        assert result_file(tmp_path, CPU, when) == tmp_path / device_name(CPU) / f"{name}.jsonl"
    assert result_file(tmp_path / "x.jsonl", CPU, when) == tmp_path / "x.jsonl"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output: got the file .*/file, expected a folder or a name that ends in"):
        result_file(tmp_path / "file", CPU, when)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    write_runs(tmp_path / "log.jsonl", run_of("kernels"))
    kept = write_runs(tmp_path / "a-gpu" / "2026-01-02-abc.jsonl", run_of("kernels"))
    assert result_files(tmp_path) == [kept]


# --- the device --------------------------------------------------------------------------------------------


class Driver:
    """NVML's bindings, as far as they are asked; ``withheld`` are readings that this board does not give."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "mem", "gpu"
    nvmlClocksEventReasonNone, nvmlClocksEventReasonGpuIdle = 0, 1  # noqa: N815
    nvmlClocksEventReasonSwPowerCap, nvmlClocksEventReasonHwSlowdown = 4, 8  # noqa: N815
    nvmlClocksEventReasonAll = 13  # noqa: N815

    def __init__(self, *withheld: str) -> None:
        self.withheld = withheld

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def read(*_: Any) -> Any:
            if name in self.withheld:
                raise self.NVMLError("not supported")
            return {
                "nvmlDeviceGetClockInfo": 1980,
                "nvmlDeviceGetTemperature": 61,
                "nvmlDeviceGetPowerUsage": 350_500,
                "nvmlDeviceGetEnforcedPowerLimit": 700_000,
                "nvmlDeviceGetCurrentClocksEventReasons": 12,
            }.get(name)

        return read


def given(driver: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u", name="A GPU"))
    return state(CUDA)


def test_the_state_of_a_gpu_is_what_its_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(Driver(), monkeypatch) == {
        "sm_mhz": 1980, "memory_mhz": 1980, "celsius": 61, "watts": 350.5, "watts_limit": 700.0,
        "held_down_by": ["SwPowerCap", "HwSlowdown"],
    }  # fmt: skip


def test_what_a_driver_withholds_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = given(
        Driver(
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        ),
        monkeypatch,
    )
    assert found.keys() == {"sm_mhz", "memory_mhz", "celsius", "watts_limit"}
    assert given(Driver("nvmlInit"), monkeypatch) == {}, "no driver at all"


def test_the_real_names_of_the_reasons() -> None:
    import pynvml

    bits = pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonSwThermalSlowdown
    assert held_down(pynvml, bits) == ["GpuIdle", "SwThermalSlowdown"]
    assert held_down(pynvml, pynvml.nvmlClocksEventReasonApplicationsClocksSetting) == ["ApplicationsClocksSetting"]
    if (older := getattr(pynvml, "nvmlClocksThrottleReasonReliability", None)) is not None:  # not in all bindings
        assert held_down(pynvml, older) == ["Reliability"], "under its older name"
    assert held_down(pynvml, 0) == []
    assert held_down(pynvml, 1 << 40) == ["0x10000000000"], "what a newer driver says is not lost"


def held_down(bindings: Any, bits: int) -> list[str]:
    """As a board with these bits has it, by the names of those bindings."""
    board = SimpleNamespace(**vars(bindings) | {"nvmlDeviceGetCurrentClocksEventReasons": lambda handle: bits})
    return environment_module._holding_down(board, None)


def test_an_older_driver_tells_the_reasons_under_an_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(Driver):
        nvmlDeviceGetCurrentClocksThrottleReasons = staticmethod(lambda handle: 4)  # noqa: N815

    assert given(Older("nvmlDeviceGetCurrentClocksEventReasons"), monkeypatch)["held_down_by"] == ["SwPowerCap"]


def test_a_gpu_that_the_driver_knows_by_no_such_name_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of one has not."""
    assert given(Driver("nvmlDeviceGetHandleByUUID"), monkeypatch) == {}


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-cpu-2-70ghz"),
        ("../..", "unknown"),
    ],
)
def test_a_devices_name_is_that_of_a_folder(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "processor", lambda: name)
    assert device_name(CPU) == folder


def test_a_machine_without_a_gpu_has_an_environment_too() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert "gpu" not in found
    assert state(CPU).keys() == {"load"}
    assert json.dumps(found)
