"""Measurement of launch configurations: on the GPU that is tuned for, every candidate is checked, then timed.

A configuration determines the order of sums and therefore the bits of results. :mod:`.choose` evaluates the records.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from pixelflow_benchmarks.harness.timing import Call, Timing, time_calls
from pixelflow_benchmarks.suites.kernels.case import Outputs, level_d

from .spaces import Config
from .trial import Trial
from .tunables import Tunable

Record = dict[str, Any]
Timer = Callable[[Mapping[str, Call], torch.device, int], Mapping[str, Timing]]

BEHIND = 1.25
"""A candidate slower than the present configuration by more than this factor is not tried on the next problems."""


def tune(
    tunables: Iterable[Tunable],
    device: torch.device,
    rounds: int,
    *,
    jobs: int = 1,
    budget: float = math.inf,
    timer: Timer = time_calls,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Record]:
    """Yield a record per kernel, problem and configuration, as soon as the problem is measured.

    A candidate that fails or is much slower (:data:`BEHIND`) is not tried on the next problems of its shape class.

    Args:
        tunables: kernels, the most important first.
        device: device to run on.
        rounds: measurements of each configuration.
        jobs: number of threads that compile.
        budget: seconds after which no further kernel is begun.
        timer, clock: replaced in tests.

    Yields:
        Records of kind ``"candidate"`` with ``kernel``, ``problem``, ``shape_class``, ``config``, ``present`` (whether
        it is the frozen configuration) and ``result``. The result is ``"timed"``, with ``median``, ``low``, ``high``,
        ``repeats``, ``captured`` and ``same_bits`` (whether the outputs have the present configuration's bits); or
        ``"wrong"``, ``"failed"`` or ``"spills"``, with ``reason``. On a GPU, what was launched has ``registers`` and
        ``spills``. A kernel that there was no time left for has a single record of kind ``"left out"``.
    """
    began = clock()
    for tunable in tunables:
        if clock() - began >= budget:
            yield {"kind": "left out", "kernel": tunable.kernel}
            continue
        out: list[tuple[str, Config]] = []
        for trial in tunable.trials():
            name = trial.shape_class
            candidates = [c for c in tunable.space if c != trial.present and (name, c) not in out]
            present: Record = {}
            for record in _measure(tunable.kernel, trial, [trial.present, *candidates], device, rounds, jobs, timer):
                present = present or record
                yield record
                limit = BEHIND * present.get("median", math.inf)
                if record["result"] != "timed" or record["median"] > limit:
                    out.append((name, record["config"]))


def _measure(
    kernel: str, trial: Trial, configs: list[Config], device: torch.device, rounds: int, jobs: int, timer: Timer
) -> list[Record]:
    """Return a record for each configuration; the first configuration is the present one."""
    records: list[Record] = []
    refused = _compile(trial, configs, device, jobs)
    plain = None if trial.plain is None else trial.plain()
    truth = None if trial.truth is None else trial.truth()
    present: Outputs | None = None
    for i, config in enumerate(configs):
        record: Record = {"kind": "candidate", "kernel": kernel, "problem": trial.problem}
        record |= {"shape_class": trial.shape_class, "config": config, "present": i == 0}
        records.append(record)
        if i in refused:
            record |= {"result": "failed", "reason": refused[i]}
            continue
        for buffer in trial.buffers:
            buffer.fill_(torch.nan)
        with _launched(trial.jit, device) as usage:
            found = trial.launch(config)
        record |= usage
        if i == 0:
            present = tuple(x.clone() for x in found)
        if faults := _faults(trial, found, present, plain, truth):
            record |= {"result": "wrong", "reason": "; ".join(faults)}
        elif i > 0 and usage.get("spills"):
            record |= {"result": "spills", "reason": f"{usage['spills']} words of local memory per thread"}
        else:
            same = present is not None and all(torch.equal(a, b) for a, b in zip(found, present, strict=True))
            record |= {"result": "timed", "same_bits": same}
    variants: dict[str, Call] = {
        str(i): partial(trial.launch, record["config"])
        for i, record in enumerate(records)
        if record["result"] == "timed"
    }
    timings = timer(variants, device, rounds) if variants else {}
    for place, timing in timings.items():
        records[int(place)] |= {**timing.spread(), "captured": timing.captured}
    return records


def _faults(
    trial: Trial, found: Outputs, present: Outputs | None, plain: Outputs | None, truth: Outputs | None
) -> list[str]:
    """Return faults: level A outputs must have the present configuration's bits, all others must pass level D."""
    faults = []
    for i, out in enumerate(found):
        if i in trial.exact:
            if present is None:
                faults.append(f"output {i}: no bits to compare with, as the present configuration does not run")
            elif not torch.equal(out, present[i]):  # a NaN that was not overwritten is unequal to itself
                different = int((out != present[i]).sum())
                faults.append(f"output {i}: {different} of {out.numel()} values differ from the present ones")
        elif plain is None or truth is None:
            faults.append(f"output {i}: nothing to compare with")
        elif said := level_d(out.to(plain[i].dtype), plain[i], truth[i], trial.growth):
            faults.append(f"output {i}: {said}")
    return faults


# --- compiling ---------------------------------------------------------------------------------------------


def _compile(trial: Trial, configs: Sequence[Config], device: torch.device, jobs: int) -> dict[int, str]:
    """Launch every configuration once, and return, by index, why those that do not compile or launch fail.

    Most of a compilation runs without the interpreter's lock, so that threads help. The first configuration is launched
    alone. What the launches write is not used.
    """

    def attempt(config: Config) -> str | None:
        from triton.errors import TritonError

        try:
            trial.launch(config)
        except (TritonError, RuntimeError) as error:
            if (reason := refusal(error)) is not None:
                return reason
            error.add_note(f"{trial.problem}: {config}")
            raise
        return None

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # gives the thread a CUDA context

    found = [attempt(configs[0])]  # sets up what the launches share
    if jobs == 1:
        found += map(attempt, configs[1:])
    else:
        with ThreadPoolExecutor(jobs, initializer=begin) as pool:
            found += pool.map(attempt, configs[1:])
    return {i: reason for i, reason in enumerate(found) if reason is not None}


def refusal(error: Exception) -> str | None:
    """Return why a kernel cannot be compiled or launched in a configuration; None for an error of another kind."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    known = isinstance(error, (OutOfResources, PTXASError, CompilationError))
    # A failed compiler pass has no exception class of its own. Other errors are fatal: after a kernel has crashed, the
    # device cannot be used any more.
    if not known and not (isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)):
        return None
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _launched(jit: Any, device: torch.device) -> Iterator[dict[str, int]]:
    """Yield a dictionary for the ``registers`` and ``spills`` of the kernel that is launched inside.

    It is filled when the context is left, on a GPU only.
    """
    usage: dict[str, int] = {}
    if device.type != "cuda" or jit is None:
        yield usage
        return
    from triton import knobs

    functions: list[int] = []

    def note(metadata: Any) -> None:
        functions.append(metadata.get()["function"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        yield usage
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    index = torch.cuda.current_device() if device.index is None else device.index
    compiled = [kernel for kernel in jit.device_caches[index][0].values() if kernel.function in functions]
    if compiled:
        usage["registers"] = max(kernel.n_regs for kernel in compiled)
        usage["spills"] = max(kernel.n_spills for kernel in compiled)
