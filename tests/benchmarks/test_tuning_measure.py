"""Launch configurations measured: with kernels and times of our own, and every candidate of the real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.harness.timing import Timing
from pixelflow_benchmarks.suites.tuning.choose import GAIN, choose
from pixelflow_benchmarks.suites.tuning.measure import refusal, tune
from pixelflow_benchmarks.suites.tuning.spaces import SPACES, TIED, Config
from pixelflow_benchmarks.suites.tuning.trial import Trial
from pixelflow_benchmarks.suites.tuning.tunables import KERNELS, Tunable, tunables

CPU = torch.device("cpu")
X = torch.linspace(1, 2, 100)
PRESENT = {"BLOCK": 64, "num_warps": 4}


def config(block: int, **more: int) -> Config:
    return {"BLOCK": block, "num_warps": 4, **more}


class Kernel:
    """Squares numbers; what a configuration does wrong or how long it takes is written in the tables."""

    def __init__(self, exact: bool = True, **wrong: Callable[[torch.Tensor], object]) -> None:
        self.exact, self.wrong = exact, wrong
        self.launched: list[tuple[str, Config]] = []
        self.microseconds: dict[int, float] = {}

    def trial(self, problem: str = "large", shape_class: str = "wide") -> Trial:
        out = torch.empty(100)

        def launch(config: Config) -> tuple[torch.Tensor]:
            self.launched.append((problem, config))
            torch.mul(X, X, out=out)
            if change := self.wrong.get(f"at{config['BLOCK']}"):
                change(out)
            return (out,)

        return Trial(
            problem=problem,
            shape_class=shape_class,
            present=PRESENT,
            launch=launch,
            buffers=(out,),
            exact=(0,) if self.exact else (),
            plain=None if self.exact else lambda: (X * X,),
            truth=None if self.exact else lambda: (X.double() ** 2,),
        )

    def time(
        self, variants: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
    ) -> dict[str, Timing]:
        timings = {}
        for name, call in variants.items():
            call()
            value = self.microseconds.get(self.launched[-1][1]["BLOCK"], 1.0) * 1e-6
            timings[name] = Timing((0.99 * value, value, 1.01 * value))
        return timings

    def records(self, *blocks: int, trials: tuple[Trial, ...] | None = None, **options: Any) -> list[dict[str, Any]]:
        trials = trials or (self.trial(),)
        tunable = Tunable("op.kernel", tuple(config(block) for block in blocks), lambda: iter(trials))
        return list(tune([tunable], CPU, 3, timer=self.time, **options))


def raiser(error: Exception) -> Callable[[torch.Tensor], object]:
    def change(_: torch.Tensor) -> object:
        raise error

    return change


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300000, 232448, "shared memory")


def ptxas() -> Exception:
    from triton.runtime.errors import PTXASError

    return PTXASError("`ptxas` failed\nwith error code 255")


def compilation() -> Exception:
    from triton.compiler.errors import CompilationError

    return CompilationError("x = 1", object(), "not a power of two")


def test_the_present_configuration_comes_first_and_once() -> None:
    kernel = Kernel()
    records = kernel.records(32, 64, 128)
    assert [(r["config"]["BLOCK"], r["present"], r["result"]) for r in records] == [
        (64, True, "timed"),
        (32, False, "timed"),
        (128, False, "timed"),
    ]
    assert records[0].items() >= {"kind": "candidate", "kernel": "op.kernel", "problem": "large"}.items()
    assert records[0].items() >= {"shape_class": "wide", "median": 1e-6, "repeats": 3, "same_bits": True}.items()


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (out_of_resources, "OutOfResources: out of resource: shared memory, Required: 300000"),
        (ptxas, "PTXASError: PTXAS error: `ptxas` failed with error code 255"),
        (compilation, "CompilationError: x = 1 not a power of two"),
        (lambda: RuntimeError("PassManager::run failed"), "RuntimeError: PassManager::run failed"),
    ],
)
def test_what_cannot_be_had_is_recorded(error: Callable[[], Exception], reason: str, jobs: int) -> None:
    kernel = Kernel(at32=raiser(error()))
    records = kernel.records(32, 128, jobs=jobs)
    assert [r["result"] for r in records] == ["timed", "failed", "timed"]
    assert records[1]["reason"].startswith(reason)
    assert "median" not in records[1]
    assert [c["BLOCK"] for _, c in kernel.launched].count(32) == 1, "not tried again"


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_crash_is_no_candidates_fault(jobs: int) -> None:
    kernel = Kernel(at32=raiser(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        kernel.records(32, 128, jobs=jobs)
    assert caught.value.__notes__ == ["large: {'BLOCK': 32, 'num_warps': 4}"]
    assert refusal(ValueError("PassManager::run failed")) is None


def one_value_off(out: torch.Tensor) -> None:
    out[50] = torch.nextafter(out[50], torch.tensor(9.0))


def test_level_a_is_the_present_configurations_bits() -> None:
    records = Kernel(at32=one_value_off, at128=lambda out: out[7:8].fill_(torch.nan)).records(32, 128, 256)
    assert [r["result"] for r in records] == ["timed", "wrong", "wrong", "timed"]
    assert records[1]["reason"] == "output 0: 1 of 100 values differ from the present ones"
    assert "median" not in records[1]


def test_level_d_is_bounded_by_plain_and_float64() -> None:
    records = Kernel(exact=False, at32=one_value_off, at128=lambda out: out.add_(1e-4)).records(32, 128)
    assert [r["result"] for r in records] == ["timed", "timed", "wrong"]
    assert [r.get("same_bits") for r in records] == [True, False, None]
    assert "bound" in records[2]["reason"]


def test_what_is_not_written_is_noticed() -> None:
    """A launch that writes nothing would otherwise pass with the values of the one before."""
    kernel = Kernel()
    trial = kernel.trial()

    def launch(config: Config) -> tuple[torch.Tensor, ...]:
        return trial.buffers if config["BLOCK"] == 32 else trial.launch(config)

    lazy = Trial(**{name: getattr(trial, name) for name in trial.__dataclass_fields__} | {"launch": launch})
    assert [r["result"] for r in kernel.records(32, trials=(lazy,))] == ["timed", "wrong"]


def test_without_the_present_bits_nothing_exact_is_right() -> None:
    broken = {"at64": raiser(out_of_resources())}
    assert [r["result"] for r in Kernel(**broken).records(32)] == ["failed", "wrong"]
    assert [r["result"] for r in Kernel(exact=False, **broken).records(32)] == ["failed", "timed"]


def test_what_fell_behind_is_not_tried_on_the_next_problem() -> None:
    kernel = Kernel(at256=one_value_off)
    kernel.microseconds = {32: 1.3, 128: 1.2, 512: 0.5}
    trials = (kernel.trial("large"), kernel.trial("small"), kernel.trial("other", shape_class="narrow"))
    records = kernel.records(32, 128, 256, 512, trials=trials)
    tried = {p: [r["config"]["BLOCK"] for r in records if r["problem"] == p] for p in ("large", "small", "other")}
    assert tried == {"large": [64, 32, 128, 256, 512], "small": [64, 128, 512], "other": [64, 32, 128, 256, 512]}


def test_the_present_configuration_is_tried_again_though_it_failed() -> None:
    kernel = Kernel(exact=False, at64=raiser(out_of_resources()))
    records = kernel.records(32, trials=(kernel.trial("large"), kernel.trial("small")))
    assert [(r["problem"], r["result"]) for r in records if r["present"]] == [("large", "failed"), ("small", "failed")]


def test_no_kernel_begins_after_the_budget() -> None:
    kernel, now = Kernel(), iter([0.0, 5.0, 9.0, 10.0, 99.0])
    several = [Tunable(f"op.k{i}", (), lambda: iter((kernel.trial(),))) for i in range(4)]
    records = list(tune(several, CPU, 3, budget=10, timer=kernel.time, clock=lambda: next(now)))
    assert [(r["kind"], r["kernel"]) for r in records] == [
        ("candidate", "op.k0"),
        ("candidate", "op.k1"),
        ("left out", "op.k2"),
        ("left out", "op.k3"),
    ]


# --- the kernels themselves --------------------------------------------------------------------------------


def assert_chosen_from(records: list[dict[str, Any]], kernel: str) -> list[bool]:
    """A choice for each shape class, by the measured times; returns which of them propose another configuration.

    Every class's present configuration was timed, and no class of short sequences has one of long sequences beside it.
    """

    def key(config: Config) -> tuple[tuple[str, int], ...]:
        return tuple(sorted(config.items()))

    def mean(ratios: list[float]) -> float:
        return math.prod(ratios) ** (1 / len(ratios))

    choices, changed = choose(records), []
    assert [(c.kernel, c.shape_class) for c in choices] == [
        (kernel, name) for name in dict.fromkeys(r["shape_class"] for r in records)
    ]
    for choice in choices:
        of = [r for r in records if r["shape_class"] == choice.shape_class]
        present = {r["problem"]: r for r in of if r["present"]}
        assert all(choice.present == r["config"] and r["result"] == "timed" for r in present.values())
        assert choice.problems == (*present,)
        times = {p: {key(r["config"]): r for r in of if r["problem"] == p and r["result"] == "timed"} for p in present}
        throughout = set.intersection(*({*several} for several in times.values()))
        assert (choice.timed, choice.tried) == (len(throughout), len({key(r["config"]) for r in of}))
        assert {k: choice.chosen.get(k) for k in TIED.get(kernel, ())} == {
            k: choice.present.get(k) for k in TIED.get(kernel, ())
        }
        ratios, bounds = (
            {c: mean([times[p][c][mine] / r[theirs] for p, r in present.items()]) for c in throughout}
            for mine, theirs in (("median", "median"), ("high", "low"))
        )
        ratio, bits = (
            ratios[key(choice.chosen)],
            [several[key(choice.chosen)]["same_bits"] for several in times.values()],
        )
        assert choice.ratio == pytest.approx(ratio, rel=1e-9)
        assert choice.same_bits == all(bits)
        assert choice.changed == (choice.ratio != 1.0)
        if choice.changed:
            assert ratio < 1 - GAIN + 1e-9
            assert bounds[key(choice.chosen)] < 1 + 1e-9
        better = [ratios[c] for c in throughout if ratios[c] < 1 - GAIN - 1e-9 and bounds[c] < 1 - 1e-9]
        if kernel not in TIED:
            assert ratio <= min(better, default=1.0) * (1 + 1e-9)
        changed.append(choice.changed)
    return changed


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_is_accepted_by_its_kernel_and_right(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of two heads and images of at most 16 tokens, in float32."""
    from pixelflow_benchmarks.suites.kernels import adamw as adamw_case
    from pixelflow_benchmarks.suites.kernels import case
    from pixelflow_benchmarks.suites.tuning import adamw, cascade, modulate, rope2d, varlen_attention

    # Among four keys one takes nearly all of a softmax: what is left of a gradient then is less than what is rounded.
    sides = (4, 4, 4, 4) if kernel.startswith("varlen_attention") else (2, 2, 4, 4)
    for module in (case, cascade, adamw):
        monkeypatch.setattr(module, "STAGE_SIDES", sides)
    for module in (rope2d, varlen_attention):
        monkeypatch.setattr(module, "HEADS", 2)
    for module in (rope2d, modulate):
        monkeypatch.setattr(module, "WIDTH", 144)
    monkeypatch.setattr(adamw_case, "WIDTH", 24)
    # The interpreter knows neither warps nor stages nor registers.
    different = {repr(sorted((k, v) for k, v in c.items() if k.isupper())): c for c in SPACES[kernel]}
    (tunable,) = tunables([kernel], (0, 3), 1, torch.float32, CPU)
    small = Tunable(kernel, tuple(different.values()), tunable.trials)

    def each_faster_than_the_one_before(variants: Mapping[str, object], *_: object) -> dict[str, Timing]:
        return {name: Timing((0.9 ** int(name),) * 3) for name in variants}

    records = list(tune([small], CPU, 3, timer=each_faster_than_the_one_before))
    assert records
    assert [r for r in records if r["result"] != "timed"] == []
    changed = assert_chosen_from(records, kernel)
    assert any(changed) or kernel in TIED or len(different) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen_attention.forward", "varlen_attention.backward_keys", "modulate.backward"])
def test_candidates_are_compiled_in_threads_captured_and_timed(kernel: str) -> None:
    (tunable,) = tunables([kernel], (0,), 2, torch.bfloat16, torch.device("cuda"))
    few = Tunable(kernel, tunable.space[:4], tunable.trials)
    records = list(tune([few], torch.device("cuda"), 3, jobs=3))
    assert len(records) >= 4
    assert [r for r in records if r["present"] and r["result"] != "timed"] == []
    timed = [r for r in records if r["result"] == "timed"]
    assert all(r["captured"] and r["registers"] > 0 and r["spills"] >= 0 for r in timed)
    assert all(r["repeats"] == 3 and 0 < r["low"] <= r["median"] <= r["high"] for r in timed)
    assert {r["result"] for r in records} <= {"timed", "spills", "failed"}
    assert_chosen_from(records, kernel)
