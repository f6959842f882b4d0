"""What glibc does with memory that a step has freed, counted in page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pixelflow_training import cli, heap

STEPS = """
import resource, sys
import torch
from pixelflow_training.heap import keep_freed_memory

def step():
    kept = [torch.ones(10 << 20) for _ in range(4)]  # 40 MiB each: more than glibc ever keeps by itself

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = 10 * 4 * 40 // 2
"""Those of 2 MiB in ten steps: the fewest faults there can be if the memory is fetched anew."""


def faults(keep: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if name not in heap.OF_THE_USER}
    command = [sys.executable, "-c", STEPS, keep]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answer, count = done.stdout.split()
    return answer, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_takes_the_memory_of_the_last() -> None:
    answer, count = faults("keep")
    assert answer == "True"
    assert count < HUGE_PAGES / 10
    assert faults("no")[1] >= HUGE_PAGES, "without it the test would show nothing"


@pytest.mark.parametrize("name", heap.OF_THE_USER)
def test_the_users_own_settings_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_options: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *option: set_options.append(option) or True)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: library)
    for other in heap.OF_THE_USER:
        monkeypatch.delenv(other, raising=False)
    assert heap.keep_freed_memory()
    assert len(set_options) == 2, "nothing stood against it"
    set_options.clear()
    monkeypatch.setenv(name, "131072")
    assert not heap.keep_freed_memory()
    assert not set_options


def test_an_older_glibc_keeps_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap.OF_THE_USER:
        monkeypatch.delenv(name, raising=False)
    taken: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == heap.MMAP_THRESHOLD and value > 2**25:
            return 0
        taken[option] = value
        return 1

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert heap.keep_freed_memory()
    assert taken == {heap.TRIM_THRESHOLD: heap.LARGEST_FREE_TOP, heap.MMAP_THRESHOLD: 2**25}


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap.OF_THE_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep_freed_memory()


def test_the_command_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    called = []
    monkeypatch.setattr(heap, "keep_freed_memory", lambda: called.append(True))
    with pytest.raises(Exception, match="no-such-recipe"):
        cli.run(config="no-such-recipe.yaml", output=tmp_path)  # type: ignore[arg-type]
    assert called == [True]
