"""``bench images``: images are compared before anything is timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness import timing
from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.harness.timing import Timing
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_reference, random_weights
from pixelflow_benchmarks.suites.images import measure as measure_module
from pixelflow_benchmarks.suites.images import opponents as opponents_module
from pixelflow_benchmarks.suites.images.measure import check_and_time, figures, measure_images
from pixelflow_benchmarks.suites.images.opponents import (
    EXACT,
    LOOP,
    ON_CPU,
    ON_GPU,
    OWN_NOISE,
    PUBLIC,
    REFERENCE,
    ImageOpponents,
    ImageProblem,
    PublicImages,
    drawn_at_once,
    reference_images,
)
from pixelflow_engine.reference import sample
from support.engines import uncompiled

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=3e12, flops_per_second=8e14, dtype=torch.float32)
PROBLEM = ImageProblem(config=SHAPES["tiny"], batch=2, steps=2, dtype=torch.float32, device=CPU)
TRUTH = torch.linspace(0, 1, 48, dtype=torch.float64).view(1, 3, 4, 4)
COMPILED = "engine, compiled"


def tiny_opponents() -> ImageOpponents:
    config = PROBLEM.config
    return ImageOpponents(config, random_weights(config, CPU), torch.float32, CPU)


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "images.jsonl"
    command = [
        "images",
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--steps",
        "2",
        "--repeats",
        "3",
        "--output",
        str(output),
    ]
    with uncompiled():
        result = CliRunner().invoke(bench, command)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["kind"] for r in records[:2]] == ["environment", "ceilings"]
    assert records[-1]["kind"] == "end"
    measured = {r["variant"]: r for r in records if r["kind"] == "measurement"}
    assert measured.keys() == {*ON_CPU} - {PUBLIC}, "there is no checkout"
    assert all(r["right"] and r["per"] == "image" and r["seconds"]["repeats"] == 3 for r in measured.values())
    assert all(r["times"].keys() == {REFERENCE, LOOP} for r in measured.values())
    assert measured[REFERENCE]["times"][REFERENCE]["median"] == 1
    shares = {name: r["shares"] for name, r in measured.items() if name != LOOP}  # whose profile would be the noise's
    assert all(0 < of[part] < 1 for of in shares.values() for part in ("attention", "products"))
    assert "shares" not in measured[LOOP]


def test_an_unknown_opponent_is_refused() -> None:
    result = CliRunner().invoke(bench, ["images", "--device", "cpu", "--shape", "tiny", "--variant", "fast"])
    assert isinstance(result.exception, ValueError)
    said = str(result.exception)
    assert "variant: got 'fast', expected one of" in said
    assert "'engine, exact', 'engine, compiled'" in said, "names that hold commas are quoted"
    assert said.count("'engine, compiled'") == 1


def test_all_draw_the_same_noise() -> None:
    opponents = tiny_opponents()
    with uncompiled():
        images = {name: opponents.call(name, PROBLEM)() for name in ON_CPU if name != PUBLIC}
    assert images[REFERENCE].shape == (2, 3, 16, 16)
    assert images[REFERENCE].std() > 0.1, "an image, not a constant"
    assert torch.equal(images[LOOP], images[EXACT])
    assert not torch.equal(images[COMPILED], images[EXACT]), "the packed stages round otherwise"
    assert (images[EXACT].double() - opponents.truth(PROBLEM)).abs().max() < 1e-4


def test_the_truth_is_made_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise of the batch: beyond float32's rounding, which the check grants, nothing is different."""
    sizes: list[int] = []

    def counted(*model: Any, shape: tuple[int, ...], **options: Any) -> Any:
        sizes.append(shape[0])
        return sample(*model, shape=shape, **options)

    monkeypatch.setattr(opponents_module, "sample", counted)
    problem, who = replace(PROBLEM, batch=3), tiny_opponents()
    found = who.truth(problem)
    assert sizes == [1, 1, 1]
    model = random_reference(problem.config, who.weights, torch.float64)
    whole = reference_images(model, problem, drawn_at_once(CPU), torch.float64)
    assert found.dtype == torch.float64
    assert found.shape == whole.shape
    assert (found - whole).abs().max() < torch.finfo(torch.float32).eps
    assert (found - whole[[1, 0, 2]]).abs().max() > 0.1, "images are not alike"


def test_without_memory_for_float64_nothing_gets_a_time() -> None:
    def lacking() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 69 GiB\nand more")

    calls: dict[str, Callable[[], Tensor]] = dict.fromkeys((REFERENCE, EXACT), lambda: TRUTH.float())
    records = list(check_and_time(PROBLEM, calls, lacking, CEILINGS, repeats=1))
    assert [r["variant"] for r in records] == [REFERENCE, EXACT]
    said = "not compared with float64, OutOfMemoryError: CUDA out of memory. Tried to allocate 69 GiB"
    assert all(not r["right"] and r["fault"] == said and "seconds" not in r for r in records)


def test_who_cannot_run_is_named_and_the_rest_runs() -> None:
    records = list(measure_images(PROBLEM, tiny_opponents(), ("engine, triton", EXACT, PUBLIC), CEILINGS, repeats=1))
    assert [(r["kind"], r["variant"]) for r in records] == [
        ("absent", "engine, triton"),
        ("absent", PUBLIC),
        ("measurement", REFERENCE),
        ("measurement", EXACT),
    ]
    assert "'triton' cannot run" in records[0]["reason"]
    assert "no checkout" in records[1]["reason"]


def test_no_turn_is_begun_after_a_minute_though_nobody_gave_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURNS_SECONDS", -1.0)
    calls: dict[str, Callable[[], Tensor]] = dict.fromkeys((REFERENCE, EXACT), lambda: TRUTH.float())
    records = list(check_and_time(PROBLEM, calls, lambda: TRUTH, CEILINGS, repeats=3))
    assert [r["seconds"]["repeats"] for r in records] == [1, 1]


def test_energy_is_measured_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "joules_of", lambda run, device: {"joules": 12.0, "watts": 3.0})
    calls: dict[str, Callable[[], Tensor]] = {REFERENCE: lambda: TRUTH.float()}
    (found,) = check_and_time(PROBLEM, calls, lambda: TRUTH, CEILINGS, repeats=1)
    assert (found["joules"], found["watts"]) == (12 / PROBLEM.batch, 3.0), "an image's"
    (late,) = check_and_time(PROBLEM, calls, lambda: TRUTH, CEILINGS, 1, deadline=time.perf_counter() - 1)
    assert "seconds" in late
    assert "joules" not in late


def test_who_cannot_run_is_named_once() -> None:
    """And not asked for again for another batch: a checkout would start a process each time."""
    who, past = tiny_opponents(), time.perf_counter() + 600
    first, second = (
        list(measure_images(replace(PROBLEM, batch=batch), who, (PUBLIC,), CEILINGS, 1, past)) for batch in (1, 2)
    )
    assert [r["kind"] for r in first] == ["absent", "measurement"]
    assert [r["kind"] for r in second] == ["measurement"]


def test_who_lacks_memory_in_one_case_is_asked_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    who = tiny_opponents()
    made = ImageOpponents.call

    def call(self: ImageOpponents, name: str, problem: ImageProblem) -> Any:
        if name == EXACT and problem.batch == 2:
            raise RuntimeError("out of memory")
        return made(self, name, problem)

    monkeypatch.setattr(ImageOpponents, "call", call)
    first, second = (
        list(measure_images(replace(PROBLEM, batch=batch), who, (EXACT,), CEILINGS, repeats=1)) for batch in (2, 1)
    )
    assert first[0] == {
        "kind": "absent",
        "variant": EXACT,
        "reason": "RuntimeError: out of memory",
        "case": replace(PROBLEM, batch=2).case,
    }
    assert [(r["kind"], r["variant"]) for r in second] == [("measurement", REFERENCE), ("measurement", EXACT)]


def test_the_published_code_makes_images_in_its_own_process() -> None:
    """Of which the first are fetched, to be compared."""

    class Process:
        asked: ClassVar[list[dict[str, Any]]] = []

        def __init__(self, folder: str) -> None:
            self.folder = SimpleNamespace(name=folder)

        def ask(self, request: dict[str, Any]) -> None:
            self.asked.append(request)
            if request["keep"] is not None:
                torch.save(TRUTH.float(), request["keep"])

    with TemporaryDirectory() as folder:
        call = PublicImages(Process(folder), PROBLEM)  # type: ignore[arg-type]
        assert torch.equal(call(), TRUTH.float())
        assert torch.equal(call(), TRUTH.float())
    first, second = Process.asked
    assert (first["labels"], first["steps"], first["seed"], first["guidance"]) == ([0, 7], 2, 0, 2.4)
    assert first["keep"].startswith(folder)
    assert second == {**first, "keep": None}


def raising() -> Tensor:
    raise RuntimeError("no compiler\nand more")


@pytest.mark.parametrize(
    ("variant", "call", "said"),
    [
        (EXACT, lambda: TRUTH.float().nextafter(torch.tensor(2.0)), "48 of 48 values differ"),
        (LOOP, lambda: 1 - TRUTH.float(), "values differ"),
        (COMPILED, lambda: TRUTH.float() + 1e-4, "error 1.0"),
        (COMPILED, lambda: TRUTH.float() * torch.nan, "error nan"),
        (COMPILED, raising, "RuntimeError: no compiler"),
        (COMPILED, lambda: TRUTH.float().nextafter(torch.tensor(2.0)), None),
        (OWN_NOISE, lambda: 1 - TRUTH.float(), None),
        (OWN_NOISE, lambda: TRUTH.float() * torch.nan, "not finite"),
    ],
)
def test_nothing_wrong_gets_a_time(variant: str, call: Callable[[], Tensor], said: str | None) -> None:
    calls: dict[str, Callable[[], Tensor]] = dict.fromkeys((REFERENCE, LOOP, EXACT, COMPILED), lambda: TRUTH.float())
    calls[variant] = call
    records = {r["variant"]: r for r in check_and_time(PROBLEM, calls, lambda: TRUTH, CEILINGS, repeats=1)}
    assert records.keys() == calls.keys()
    faults = {name: r["fault"] for name, r in records.items() if "fault" in r}
    timed = {name for name, r in records.items() if "seconds" in r}
    if said is None:
        assert faults == {}
        assert timed == calls.keys()
    else:
        assert list(faults) == [variant]
        assert said in faults[variant]
        assert timed == calls.keys() - {variant}
        assert all(variant not in r.get("times", {}) for r in records.values())


def test_the_reference_has_no_time_where_it_fails_and_the_others_have_none_either() -> None:
    calls = {REFERENCE: raising, EXACT: lambda: TRUTH.float()}
    records = list(check_and_time(PROBLEM, calls, lambda: TRUTH, CEILINGS, repeats=1))
    assert [r["right"] for r in records] == [False, False]
    assert "nothing to compare with" in records[1]["fault"]


def test_the_floor_is_that_of_all_stages() -> None:
    """Thirty steps of the published model: 2 x 5818 GFLOP at the last stage, no null half at the first."""
    xl = ImageProblem(config=SHAPES["xl"], batch=1, steps=30, dtype=torch.bfloat16, device=CPU)
    per_stage = [57.5e9, 2 * 236.5e9, 2 * 1048e9, 2 * 5818e9]
    assert xl.flops == pytest.approx(30 * sum(per_stage), rel=0.01)
    values = 30 * (64 + 2 * 256 + 2 * 1024 + 2 * 4096) * 1152 * 28
    assert xl.pointwise_bytes == 24 * values
    found = figures(replace(xl, batch=2), Timing((3.0, 5.0, 4.0)), CEILINGS)
    assert found["seconds"]["median"] == pytest.approx(2.0)
    assert found["images_per_second"] == pytest.approx(0.5)
    assert found["floor_seconds"] == pytest.approx(xl.flops / 8e14 + xl.pointwise_bytes / 3e12)
    assert found["fraction_of_floor"] == pytest.approx(found["floor_seconds"] / 2)


def test_the_most_important_variants_of_a_gpu_come_first() -> None:
    assert ON_GPU[:2] == ("engine, triton, compiled", REFERENCE)
    assert {LOOP, OWN_NOISE} <= {*ON_GPU}
