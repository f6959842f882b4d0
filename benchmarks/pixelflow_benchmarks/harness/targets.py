"""The project's performance targets as data; tables show each of them beside the figure, with a verdict.

The budget is for the published class-to-image model in bfloat16 on one H100 (SXM, 80 GB HBM3) whose large products ran
at 798 TFLOP/s and whose copies ran at 3.0 TB/s. Other devices have no budget of their own: their figures are compared
with the H100's, and the table says so. Relative targets (a share of the floor, a share of a copy's rate, a multiple of
an opponent's speed) ask the same of every GPU, in terms of its own run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pixelflow_engine.flops import PEAKS

from .results import Record
from .tables import TextTable

WHOSE, DEVICE = "H100", "NVIDIA H100 80GB HBM3"
PEAK_FLOPS = PEAKS[DEVICE]
"""Dense bfloat16 operations a second on the data sheet; training's share is relative to it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach.

    Attributes:
        value: the target.
        stretch: a better value to aim for; None if there is none.
        lower: whether less is better, as for a time.
    """

    value: float
    stretch: float | None = None
    lower: bool = False

    def verdict(self, got: float) -> str:
        """Return ``stretch``, ``hit``, or by how much the target was missed."""
        sign = -1 if self.lower else 1
        if self.stretch is not None and sign * got >= sign * self.stretch:
            return "stretch"
        if sign * got >= sign * self.value:
            return "hit"
        return f"missed by {100 * abs(got / self.value - 1):.0f} %"


@dataclass(frozen=True, slots=True)
class StageBudget:
    """Milliseconds of a stage per image and step, batch 16, Euler, with guidance (stage 0 has no null half).

    Attributes:
        floor: milliseconds that products and bytes take at the rates in the module's docstring.
        milliseconds: the target.
    """

    floor: float
    milliseconds: Target

    @property
    def share(self) -> Target:
        """The target as a share of the floor, which can be compared with any device's run."""
        best = self.milliseconds.stretch
        return Target(self.floor / self.milliseconds.value, None if best is None else self.floor / best)


STAGES = {
    0: StageBudget(0.089, Target(0.17, 0.15, lower=True)),
    1: StageBudget(0.73, Target(1.0, 0.94, lower=True)),
    2: StageBudget(3.16, Target(4.25, 3.95, lower=True)),
    3: StageBudget(16.7, Target(24.2, 22.3, lower=True)),
}
STAGE_BATCH = 16
IMAGES = {(16, 30): Target(0.9, lower=True), (16, 10): Target(0.3, lower=True), (1, 30): Target(1.0, lower=True)}
"""Seconds per image, by (batch, Euler steps per stage)."""
TIMES_PUBLIC = Target(6.0)
"""Whole images: speed relative to the published code, including its loop over blocks of noise."""
ATTENTION = {1024: Target(330.0), 4096: Target(400.0, 450.0)}
"""Forward pass, TFLOP/s at head dimension 72 (counted at 72, without padding), by tokens of an image."""
ATTENTION_BACKWARD = {4096: Target(300.0, 380.0)}
"""Backward pass alone, in the same units."""
POINTWISE = Target(0.8)
"""Share of a copy's rate that memory-bound kernels should reach, from stage 2 up."""
POINTWISE_FROM = 1024
"""Smallest number of tokens of an image for :data:`POINTWISE`: stage 2."""
TRAINING_BATCH = 32
"""Smallest batch, in images per step, to which the following targets apply."""
TRAINING_SHARE = Target(0.39, 0.45)
"""Share of :data:`PEAK_FLOPS`."""
TRAINING_IMAGES = Target(72.0)
"""Images per second and GPU."""
TRAINING_TIMES_PUBLIC = Target(3.0)


def is_whose(head: Mapping[str, object]) -> bool:
    """Return whether a run was on the GPU of the budget."""
    return head.get("gpu") == DEVICE


def applies(head: Mapping[str, object]) -> bool:
    """Return whether a run used the budget's model and type, on a GPU."""
    return "gpu" in head and head.get("shape", "xl") == "xl" and head.get("dtype") == "bfloat16"


def heading(head: Mapping[str, object], said: str) -> str:
    """Return a column's title, which names the budget's device if the run was on another GPU."""
    return said if is_whose(head) else f"{WHOSE}'s {said}"


def stage_cells(head: Mapping[str, object], record: Record) -> tuple[str, str]:
    """Return a stage's target time and target share of the floor, each with the verdict; empty if none applies."""
    budget = STAGES.get(record["stage"])
    fits = record["batch"] == STAGE_BATCH and record["solver"] == "euler"
    if budget is None or not (fits and applies(head)):
        return "", ""
    time, share = budget.milliseconds, budget.share
    return (
        f"{time.value:g}: {time.verdict(1000 * record['seconds']['median'])}",
        f"{100 * share.value:.0f} %: {share.verdict(record['fraction_of_floor'])}",
    )


def image_cell(head: Mapping[str, object], record: Record, public: str) -> str:
    """Return the targets of whole images, absolute and relative to the published code, each with the verdict."""
    if not applies(head):
        return ""
    said = []
    if target := IMAGES.get((record["batch"], record["steps"])):
        said.append(f"{target.value:g} s: {target.verdict(record['seconds']['median'])}")
    if public in record.get("times", {}):
        said.append(_times(TIMES_PUBLIC, record["times"][public]["median"]))
    return "; ".join(said)


def kernel_cell(head: Mapping[str, object], record: Record, tokens: int, forward: Record | None) -> str:
    """Return a kernel's target with the verdict.

    Args:
        head: environment of the run.
        record: the measurement.
        tokens: tokens of an image.
        forward: if ``record`` is attention's forward and backward pass, the same variant's forward pass, which is
            subtracted to obtain the backward pass alone; None otherwise.
    """
    if not applies(head):
        return ""
    if not record["flops"]:
        if tokens < POINTWISE_FROM:
            return ""
        return f"{100 * POINTWISE.value:.0f} % of copy: {POINTWISE.verdict(record['fraction_of_copy'])}"
    if forward is None:
        target, rate = ATTENTION.get(tokens), record["teraflops"]
    else:
        target, seconds = ATTENTION_BACKWARD.get(tokens), _median(record) - _median(forward)
        rate = (record["flops"] - forward["flops"]) / seconds / 1e12 if seconds > 0 else 0.0
    if target is None:
        return ""
    whose = "" if is_whose(head) else f"{WHOSE}'s "
    what = "" if forward is None else "backward "
    return f"{what}{whose}{target.value:g} TFLOP/s: {target.verdict(rate)}{f' ({rate:.0f})' if forward else ''}"


def training_cell(head: Mapping[str, object], record: Record, public: str) -> str:
    """Return the targets of a training step, each with the verdict."""
    if not applies(head) or record["batch"] < TRAINING_BATCH:
        return ""
    share = record["flops"] / _median(record) / PEAK_FLOPS
    said = [
        f"{100 * TRAINING_SHARE.value:.0f} % of {PEAK_FLOPS / 1e12:.0f} TFLOP/s: {TRAINING_SHARE.verdict(share)}",
        f"{TRAINING_IMAGES.value:g} images/s: {TRAINING_IMAGES.verdict(record['images_per_second'])}",
    ]
    if public in record.get("times", {}):
        said.append(_times(TRAINING_TIMES_PUBLIC, record["times"][public]["median"]))
    return "; ".join(said)


def budget_table() -> TextTable:
    """Return all targets as a table for the documentation."""
    rows = [
        (f"stage {stage}, ms an image and step, batch {STAGE_BATCH}", _row(of.milliseconds), f"{of.floor:g}")
        for stage, of in STAGES.items()
    ]
    rows += [
        (f"whole image, s, {steps} steps a stage, batch {batch}", _row(of), "") for (batch, steps), of in IMAGES.items()
    ]
    rows.append(("whole image, times the published code's speed", _row(TIMES_PUBLIC), ""))
    rows += [(f"attention, TFLOP/s, {tokens} tokens", _row(of), "") for tokens, of in ATTENTION.items()]
    rows += [
        (f"attention's backward pass, TFLOP/s, {tokens} tokens", _row(of), "")
        for tokens, of in ATTENTION_BACKWARD.items()
    ]
    rows += [
        (f"kernels bound by memory, of a copy's rate, {POINTWISE_FROM} tokens and more", _row(POINTWISE), ""),
        (f"training, of {PEAK_FLOPS / 1e12:.0f} TFLOP/s, batch {TRAINING_BATCH} and more", _row(TRAINING_SHARE), ""),
        ("training, images/s", _row(TRAINING_IMAGES), ""),
        ("training, times the published loop's speed", _row(TRAINING_TIMES_PUBLIC), ""),
    ]
    title = f"Aims, not measurements: the published model in bfloat16 on an {WHOSE}."
    return TextTable(title, ("what", "target (stretch)", "floor"), tuple(rows))


def _row(target: Target) -> str:
    return f"{target.value:g}" + (f" ({target.stretch:g})" if target.stretch is not None else "")


def _times(target: Target, got: float) -> str:
    return f"{target.value:g} times published: {target.verdict(got)}"


def _median(record: Record) -> float:
    return float(record["seconds"]["median"])
