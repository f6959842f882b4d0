"""The whole cascade on a CPU, engine beside reference: equal images first, then wall time in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pixelflow_engine import PixelFlowConfig, PixelFlowEngine
from pixelflow_engine.noise import PublicNoise as DrawnAtOnce
from pixelflow_engine.reference import PixelFlowTransformer, PublicNoise, guidance_weights, sample
from pixelflow_engine.reference.noise import NoiseSource

from .random_models import random_engine, random_reference, random_weights
from .tables import TextTable

Call = Callable[[], Tensor]

CPU = torch.device("cpu")
SEED = 0
GUIDANCE = 2.4

LOOP = "reference, noise block by block"
NO_LOOP = "reference"
EXACT = "engine, exact"
COMPILED = "engine, compiled"


def cascade_calls(config: PixelFlowConfig, batch: int, steps: int, compiled: bool) -> tuple[dict[str, Call], Call]:
    """What is compared, in float32, and the same in float64.

    Args:
        config: of the model, whose weights are random.
        batch: images.
        steps: Euler's, at each stage.
        compiled: with the engine that torch.compile has made faster.

    Returns:
        calls by name, each giving ``[B, c, H, W]`` in [0, 1] from the same random stream; and the truth.
    """
    weights = random_weights(config, CPU)
    labels = torch.arange(batch) % config.model.num_classes
    model = random_reference(config, weights, torch.float32)

    def reference(model: PixelFlowTransformer, noise: NoiseSource) -> Tensor:
        side, stages = config.resolution, config.scheduler.num_stages
        ends = sample(
            model,
            shape=(batch, config.model.in_channels, side, side),
            num_stages=stages,
            num_inference_steps=[steps] * stages,
            guidance=guidance_weights(GUIDANCE, stages),
            noise=noise,
            class_labels=labels,
        )
        return (ends[-1] / 2 + 0.5).clamp(0, 1)

    def with_loop() -> Tensor:
        torch.manual_seed(SEED)  # the published code draws from the global stream
        return reference(model, PublicNoise())

    def at_once() -> NoiseSource:
        return DrawnAtOnce(torch.Generator().manual_seed(SEED), CPU)

    def engine_call(engine: PixelFlowEngine) -> Call:
        def call() -> Tensor:
            out = engine(
                labels,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                seed=SEED,
                noise="public",
                output_type="pt",
            )
            assert isinstance(out.images, Tensor)
            return out.images

        return call

    calls: dict[str, Call] = {LOOP: with_loop, NO_LOOP: lambda: reference(model, at_once())}
    calls[EXACT] = engine_call(random_engine(config, weights, torch.float32, "torch"))
    if compiled:
        calls[COMPILED] = engine_call(random_engine(config, weights, torch.float32, "torch", compile=True))
    return calls, lambda: reference(random_reference(config, weights, torch.float64), at_once())


def faults(images: Mapping[str, Tensor], truth: Tensor) -> dict[str, str]:
    """What is wrong with each, where something is.

    Engine and both references have the same bits; the compiled engine is no further from float64 than twice the
    reference plus two roundings.
    """
    found = {}
    expected = images[NO_LOOP]
    bound = 2 * _distance(expected, truth) + torch.finfo(torch.float32).eps
    for name, got in images.items():
        if name == COMPILED:
            if not (error := _distance(got, truth)) <= bound:
                found[name] = f"error {error:.3e}, bound {bound:.3e}"
        elif not torch.equal(got, expected):
            found[name] = f"{int((got != expected).sum())} of {got.numel()} values differ from the reference"
    return found


def _distance(images: Tensor, truth: Tensor) -> float:
    return (images.double() - truth).abs().max().item()


def measure_cascade(calls: Mapping[str, Call], truth: Call, rounds: int) -> Iterator[dict[str, Any]]:
    """Check, then time in turns; nothing wrong gets a time.

    Yields:
        ``check`` of each call, with the seconds of its first run, compilation included; ``shares`` of each; a ``round``
        of seconds for each turn; the ``ratio`` of times for pairs of one turn.
    """
    images, right, graphs = {}, {}, {}
    for name, call in calls.items():
        before, began = graphs_compiled(), time.perf_counter()
        try:
            images[name] = call()
        except Exception as error:  # a compiler fails in many ways; the others are measured all the same
            text = str(error).strip().splitlines() or [""]
            yield {"kind": "check", "variant": name, "right": False, "fault": f"{type(error).__name__}: {text[0]}"}
        else:
            right[name], graphs[name] = time.perf_counter() - began, graphs_compiled() - before
    wrong = faults(images, truth())
    for name, seconds in right.items():
        record = {"kind": "check", "variant": name, "right": name not in wrong}
        record |= {"first_seconds": seconds, "graphs_compiled": graphs[name]}
        yield record | ({"fault": wrong[name]} if name in wrong else {})
    timed = {name: calls[name] for name in right if name not in wrong}
    for name, call in timed.items():
        yield {"kind": "shares", "variant": name, **shares(call)}
    turns: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds):
        for name, call in timed.items():
            began = time.perf_counter()
            call()
            turns[name].append(time.perf_counter() - began)
        yield {"kind": "round", "round": turn, "seconds": {name: values[-1] for name, values in turns.items()}}
    for name, values in turns.items():
        yield {"kind": "time", "variant": name, **quartiles(values)}
    for name in (EXACT, COMPILED):
        for opponent in (LOOP, NO_LOOP):
            if name in turns and opponent in turns:
                pairs = [b / a for a, b in zip(turns[name], turns[opponent], strict=True)]
                yield {"kind": "ratio", "variant": name, "over": opponent, **quartiles(pairs)}


def shares(call: Call) -> dict[str, float]:
    """Of one run's time on the CPU: attention's and matrix products' share."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        call()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(times.values())
    products = ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise", "mkl::_mkl_linear")
    attention = sum(value for key, value in times.items() if "dot_product" in key)
    return {"attention": attention / total, "products": sum(times.get(key, 0) for key in products) / total}


def graphs_compiled() -> int:
    """How many graphs torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of fewer than three values the extremes."""
    if len(values) < 3:
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def cascade_table(records: list[dict[str, Any]]) -> TextTable:
    """A row per variant: seconds, their quartiles, how many times faster than either reference."""
    environment = records[0]
    by = {(r["kind"], r["variant"], r.get("over")): r for r in records if "variant" in r}
    rows = []
    for (kind, name, _), check in by.items():
        if kind != "check":
            continue
        if not check["right"]:
            rows.append((name, "wrong: no time", check["fault"], "", "", ""))
            continue
        timing, share = by["time", name, None], by["shares", name, None]
        ratios = [by.get(("ratio", name, over)) for over in (LOOP, NO_LOOP)]
        rows.append(
            (
                name,
                f"{timing['median']:.2f}",
                f"{timing['low']:.2f} to {timing['high']:.2f}",
                *("" if r is None else f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in ratios),
                f"{100 * share['attention']:.0f} / {100 * share['products']:.0f} %",
            )
        )
    title = (
        f"Whole cascade on a CPU, seconds ({environment['processor']}, {environment['threads']} threads, load "
        f"{environment['load']:.1f}), batch {environment['batch']}, {environment['steps']} steps a stage."
    )
    header = ("variant", "median", "quartiles", "times faster than with loop", "than reference", "attention / products")
    return TextTable(title, header, tuple(rows))
