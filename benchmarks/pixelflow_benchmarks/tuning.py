"""Measure launch configurations, and choose from the measurements: two steps with records between them.

:func:`tune` runs on the GPU that is tuned for: every candidate is checked, then timed beside the present configuration.
:func:`choose` reads the records and needs no GPU. A configuration decides the order of sums, and so bits: a choice
replaces the present one only where it is clearly faster.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from .kernel_cases.case import Outputs, level_d
from .timing import Call, Timing, time_calls
from .tuning_cases import Trial, Tunable
from .tuning_cases.spaces import LENGTHS, TIED, Config

Record = dict[str, Any]
Timer = Callable[[Mapping[str, Call], torch.device, int], Mapping[str, Timing]]

GAIN = 0.02
"""How much less time a new configuration has to take, as a share of the present one's."""

BEHIND = 1.25
"""A candidate that takes so many times the present time on one problem is not tried on the next."""


# --- measuring ---------------------------------------------------------------------------------------------


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

    Args:
        tunables: kernels, the most important first.
        device: where they run.
        rounds: measurements of each configuration.
        jobs: threads that compile.
        budget: seconds after which no further kernel is begun.
        timer, clock: other ones in tests.

    Yields:
        records: ``kind`` ``"candidate"``, ``kernel``, ``problem``, ``shape_class``, ``config``, ``present`` (it is the
        frozen one), ``result``: ``"timed"`` (then also the fields of :class:`~pixelflow_benchmarks.timing.Timing`, and
        ``same_bits`` as the present one's), or ``"wrong"``, ``"failed"``, ``"spills"`` with ``reason``. On a GPU
        ``registers`` and ``spills``. What failed or fell far behind is not tried on the next problems of its shape
        class. A kernel that the budget has no time for has one record of kind ``"left out"``.
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
    """A record for each configuration, of which the first is the present one."""
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
        records[int(place)] |= asdict(timing)
    return records


def _faults(
    trial: Trial, found: Outputs, present: Outputs | None, plain: Outputs | None, truth: Outputs | None
) -> list[str]:
    """Level A outputs: not the present configuration's bits. Others: further from float64 than level D allows."""
    faults = []
    for i, out in enumerate(found):
        if i in trial.exact:
            if present is None:
                faults.append(f"output {i}: no bits to compare with, as the present configuration does not run")
            elif not torch.equal(out, present[i]):  # a NaN that was left there is not equal to itself
                different = int((out != present[i]).sum())
                faults.append(f"output {i}: {different} of {out.numel()} values differ from the present ones")
        elif plain is None or truth is None:
            faults.append(f"output {i}: nothing to compare with")
        else:
            size = trial.growth * truth[i].abs().max().item()
            error, bound = level_d(out.to(plain[i].dtype), plain[i], truth[i], size)
            if not error <= bound:
                faults.append(f"output {i}: error {error:.3e}, bound {bound:.3e}")
    return faults


# --- compiling ---------------------------------------------------------------------------------------------


def _compile(trial: Trial, configs: Sequence[Config], device: torch.device, jobs: int) -> dict[int, str]:
    """Launch every configuration once, the first alone; of those that cannot be had, the reason by place.

    Most of a compilation runs outside the interpreter's lock, so threads help. What the launches write is not used.
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

    found = [attempt(configs[0])]  # it sets up what the launches share
    if jobs == 1:
        found += map(attempt, configs[1:])
    else:
        with ThreadPoolExecutor(jobs, initializer=begin) as pool:
            found += pool.map(attempt, configs[1:])
    return {i: reason for i, reason in enumerate(found) if reason is not None}


def refusal(error: Exception) -> str | None:
    """Why a kernel cannot be had in a configuration; None for an error that is not about that."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    known = isinstance(error, (OutOfResources, PTXASError, CompilationError))
    # A failed compiler pass has no class of its own. A kernel that crashed leaves no device to go on with.
    if not known and not (isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)):
        return None
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _launched(jit: Any, device: torch.device) -> Iterator[dict[str, int]]:
    """What the kernel takes that is launched inside, known afterwards: ``registers``, ``spills``; on a GPU only."""
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


# --- choosing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """What the measurements say about one shape class.

    Attributes:
        kernel, shape_class: where it is kept.
        present, chosen: configurations; the same where nothing is clearly faster.
        ratio: time of the chosen one as a share of the present one's, the geometric mean over problems; None where the
            present one could not be measured.
        problems: on which it was decided.
        timed, tried: how many configurations were timed on all of them, and how many there were.
        same_bits: every output had the bits that the present configuration gives.
    """

    kernel: str
    shape_class: str
    present: Config
    chosen: Config
    ratio: float | None
    problems: tuple[str, ...]
    timed: int
    tried: int
    same_bits: bool

    @property
    def changed(self) -> bool:
        """Whether another configuration is proposed."""
        return self.chosen != self.present


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A configuration that was timed on all of its shape class's problems, beside the present one."""

    config: Config
    records: tuple[Record, ...]
    present: tuple[Record, ...]  # of the same problems; its own where the present one could not be measured

    @property
    def ratios(self) -> list[float]:
        """Times as shares of the present ones."""
        return [_seconds(a, "median") / _seconds(b, "median") for a, b in zip(self.records, self.present, strict=True)]

    @property
    def bounds(self) -> list[float]:
        """The same from its slow quartile and the present one's fast quartile."""
        return [_seconds(a, "high") / _seconds(b, "low") for a, b in zip(self.records, self.present, strict=True)]


@dataclass(frozen=True, slots=True)
class _Class:
    """All candidates of a shape class; ``works`` is False where the present configuration could not be measured."""

    present: Config
    works: bool
    candidates: tuple[_Candidate, ...]
    problems: tuple[str, ...]
    tried: int


def choose(records: Iterable[Record]) -> list[Choice]:
    """The best configuration of each shape class by the geometric mean over its problems.

    It replaces the present one where it takes at least 2% (:data:`GAIN`) less time and even its slow quartile is below
    the present one's fast quartile; a present one that does not run is replaced by the fastest that does. What is tied
    over the shape classes of short and long members (:data:`~.tuning_cases.spaces.TIED`) changes in both or in neither.
    """
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        if record["kind"] == "candidate":
            kernel, name = record["kernel"], record["shape_class"]
            stem = name.rpartition("-")[0] if kernel in TIED else name
            groups.setdefault((kernel, stem), {}).setdefault(name, []).append(record)
    choices = []
    for (kernel, stem), found in groups.items():
        classes = {name: _class_of(of) for name, of in found.items()}
        for name, best in _choose_together(kernel, stem, classes).items():
            choices.append(_choice(kernel, name, classes[name], best))
    return choices


def _choose_together(kernel: str, stem: str, classes: Mapping[str, _Class]) -> dict[str, _Candidate | None]:
    """A candidate for each class of a group, None to keep what is there."""
    tied = TIED.get(kernel, ())

    def values(config: Config) -> tuple[int, ...]:
        return tuple(config.get(key, 0) for key in tied)

    best = {}
    for name, of in classes.items():
        kept = [c for c in of.candidates if values(c.config) == values(of.present)]
        kept = [c for c in kept if not of.works or _clearly_faster([c])]
        best[name] = min(kept, key=lambda c: _mean(c.ratios), default=None)
    if not tied or {*classes} != {f"{stem}-{length}" for length in LENGTHS}:
        return best
    if not all(of.works for of in classes.values()):
        return best
    shared = set.intersection(*({values(c.config) for c in of.candidates} for of in classes.values()))
    for value in sorted(shared - {values(of.present) for of in classes.values()}):
        together: dict[str, _Candidate | None] = {}
        for name, of in classes.items():
            fitting = [c for c in of.candidates if values(c.config) == value]
            together[name] = min(fitting, key=lambda c: _mean(c.ratios))
        if _clearly_faster([c for c in together.values() if c]) and _cost(together, classes) < _cost(best, classes):
            best = together
    return best


def _clearly_faster(candidates: Sequence[_Candidate]) -> bool:
    """By more than the noise, over all problems of all of them."""
    ratios, bounds = [r for c in candidates for r in c.ratios], [b for c in candidates for b in c.bounds]
    return _mean(ratios) <= 1 - GAIN and _mean(bounds) < 1


def _cost(choice: Mapping[str, _Candidate | None], classes: Mapping[str, _Class]) -> float:
    """Mean time as a share of the present one's, over all problems of all classes."""
    return _mean([r for name, c in choice.items() for r in (c.ratios if c else [1.0] * len(classes[name].problems))])


def _class_of(records: Sequence[Record]) -> _Class:
    timed: dict[str, dict[str, Record]] = {}  # by configuration, then problem
    for record in records:
        if record["result"] == "timed":
            timed.setdefault(_key(record["config"]), {})[record["problem"]] = record
    present = next(r["config"] for r in records if r["present"])
    base = timed.get(_key(present), {})
    works = bool(base)
    problems = tuple(dict.fromkeys(r["problem"] for r in records if not works or r["problem"] in base))
    candidates = []
    for by_problem in timed.values():
        if not {*problems} <= {*by_problem}:
            continue
        own = tuple(by_problem[problem] for problem in problems)
        beside = tuple(base[problem] for problem in problems) if works else own
        # Where only one of both could be captured, the other's figure has the host's time in it.
        if all(a["captured"] == b["captured"] for a, b in zip(own, beside, strict=True)):
            candidates.append(_Candidate(own[0]["config"], own, beside))
    if not works and candidates:  # measured against one another: any of them will do as the unit
        unit = candidates[0].records
        candidates = [_Candidate(c.config, c.records, unit) for c in candidates]
    return _Class(present, works, tuple(candidates), problems, len({_key(r["config"]) for r in records}))


def _choice(kernel: str, name: str, of: _Class, best: _Candidate | None) -> Choice:
    return Choice(
        kernel=kernel,
        shape_class=name,
        present=of.present,
        chosen=of.present if best is None else best.config,
        ratio=None if not of.works else 1.0 if best is None else _mean(best.ratios),
        problems=of.problems,
        timed=len(of.candidates),
        tried=of.tried,
        same_bits=best is None or all(record["same_bits"] for record in best.records),
    )


def merged(table: Mapping[str, Mapping[str, Config]], choices: Iterable[Choice]) -> dict[str, dict[str, Config]]:
    """The table with what is proposed; what was not tuned, or is kept, stays as it is."""
    found = {kernel: {name: dict(config) for name, config in of.items()} for kernel, of in table.items()}
    for choice in choices:
        if choice.changed:
            found.setdefault(choice.kernel, {})[choice.shape_class] = dict(choice.chosen)
    return found


def _key(config: Config) -> str:
    return repr(sorted(config.items()))


def _seconds(record: Record, key: str) -> float:
    """Times are differences of two measurements: that of a very short kernel may come out as nothing."""
    return max(record[key], 1e-9)


def _mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))
