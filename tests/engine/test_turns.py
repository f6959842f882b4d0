"""Two threads sample with one engine: whoever comes next goes on after what the one before launched.

On a CPU a recording stands in for the graphs. It notes what its users say of their streams; that a CUDA stream then
waits is CUDA's part (``test_engine_gpu``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine
from support.engines import tiny_engine
from support.kernels import assert_same_bits
from support.recording import RecordingCapture, packed_engine

STAGES = 3
CALLS: list[dict[str, Any]] = [{"class_labels": [1, 2], "seed": 5}, {"class_labels": [3, 0], "seed": 7}]


def sampled(engine: PixelFlowEngine, call: dict[str, Any], **options: Any) -> Tensor:
    images = engine(output_type="pt", num_inference_steps=2, **(call | options)).images
    assert isinstance(images, Tensor)
    return images


def at_once(work: Callable[[int], None]) -> None:
    """Run it with 0 and with 1 in two threads that begin together; an error of either is one of the test."""
    together, failed = threading.Barrier(2), []

    def run(i: int) -> None:
        try:
            together.wait(60)
            work(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


def check_turns(turns: list[tuple[str, int, int]]) -> None:
    """Every turn but the first begins after what the turn before it left, by whichever thread."""
    assert [kind for kind, _, _ in turns] == ["left", *["followed", "left"] * (len(turns) // 2)]
    for (_, _, left), (_, follower, followed), (_, leaver, _) in zip(
        turns[::2], turns[1::2], turns[2::2], strict=False
    ):
        assert followed == left
        assert follower == leaver


def test_turns_follow_one_another_whoever_takes_them() -> None:
    engine = packed_engine(capture := RecordingCapture())
    alone = [sampled(packed_engine(), call) for call in CALLS]
    found: list[list[Tensor]] = [[], []]
    at_once(lambda i: found[i].extend(sampled(engine, CALLS[i]) for _ in range(2)))
    for images, expected in zip(found, alone, strict=True):
        for image in images:
            assert_same_bits(image, expected)
    check_turns(capture.turns)
    assert sum(kind == "left" for kind, _, _ in capture.turns) == 4 * STAGES, "a turn for every stage of every call"
    assert len({thread for _, thread, _ in capture.turns}) == 2


def test_a_turn_that_fails_is_followed_too() -> None:
    """What it launched before the error may still run."""
    engine = packed_engine(capture := RecordingCapture())

    def stop(event: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        sampled(engine, CALLS[0], callback_on_step_end=stop)
    assert_same_bits(sampled(engine, CALLS[1]), sampled(packed_engine(), CALLS[1]))
    check_turns(capture.turns)
    assert len(capture.turns) == 1 + 2 * STAGES


def test_tensors_outlive_what_replays_them() -> None:
    """Closing a capture waits for all streams; until then nothing is given up that they may read."""
    engine = packed_engine(capture := RecordingCapture())
    sampled(engine, CALLS[0])
    held, close = [], capture.close

    def closing() -> None:
        held.append(len(engine._programs.programs))
        close()

    capture.close = closing  # type: ignore[method-assign]
    engine.close()
    assert held == [STAGES]
    assert not engine._programs.programs


@pytest.mark.parametrize("turns", [[("left", 1, 0), ("followed", 2, 5), ("left", 2, 2)], [("left", 1, 0)] * 2])
def test_the_check_can_fail(turns: list[tuple[str, int, int]]) -> None:
    with pytest.raises(AssertionError):
        check_turns(turns)


def test_a_call_from_a_callback_takes_no_turn() -> None:
    """It has tensors of its own, in the stream of the turn that it interrupts."""
    engine = packed_engine(capture := RecordingCapture())
    inner: list[Tensor] = []
    sampled(engine, CALLS[0], callback_on_step_end=lambda _: inner.append(sampled(engine, CALLS[1])))
    assert len(inner) == 2 * STAGES
    assert len(capture.turns) == 2 * STAGES - 1


@pytest.mark.parametrize(
    ("build", "solver"), [(tiny_engine, "dopri5"), (packed_engine, "ab2")], ids=["exact", "packed"]
)
def test_two_threads_without_graphs(build: Callable[[], PixelFlowEngine], solver: str) -> None:
    """Neither waits for the other; both have the bits that they have alone."""
    engine = build()
    options = {"solver": solver, "rtol": 0.2, "atol": 0.05}
    alone = [sampled(engine, call, **options) for call in CALLS]
    assert not torch.equal(*alone)
    found: list[list[Tensor]] = [[], []]
    at_once(lambda i: found[i].extend(sampled(engine, CALLS[i], **options) for _ in range(3)))
    for images, expected in zip(found, alone, strict=True):
        assert len(images) == 3
        for image in images:
            assert_same_bits(image, expected)
