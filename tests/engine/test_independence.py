"""Levels B and C on ``backend="torch"``: the same bits again, in another process, and beside other images.

Two things make the last bits of an image depend on its *place* on a CPU, though never on what its batch mates hold. The
matrix library shares a product of few rows (fewer than 12 with two threads) between threads by rows and rounds
the rows at the seam differently. And torch's vectorized SiLU and GELU leave the last few values of a tensor, where its
size is not a multiple of 32, to a scalar routine. So place is tested where neither happens: a width that is a multiple
of 32, and one thread or 12 images.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pixelflow_engine import Checkpoint, ModelConfig, PixelFlowConfig, PixelFlowEngine, SchedulerConfig
from support.cascades import checkpoint_of, exact_engine
from support.reference_models import random_reference

SHAPE = {"heads": 2, "head_dim": 16, "depth": 2, "patch_size": 2, "num_classes": 5}


def build_engine() -> PixelFlowEngine:
    model = random_reference(3, dtype=torch.float32, **SHAPE)  # type: ignore[arg-type]
    config = PixelFlowConfig(
        model=ModelConfig(num_attention_heads=2, attention_head_dim=16, depth=2, patch_size=2, num_classes=5),
        scheduler=SchedulerConfig(num_stages=3),
        resolution=16,
    )
    return PixelFlowEngine.from_checkpoint(Checkpoint(config, model.state_dict(), "random"))


@pytest.fixture(scope="module")
def engine() -> PixelFlowEngine:
    return build_engine()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(engine: PixelFlowEngine, labels: list[int], seeds: list[int], **options: object) -> NDArray[np.float32]:
    out = engine(labels, seed=seeds, num_inference_steps=3, output_type="np", **options)  # type: ignore[arg-type]
    return np.asarray(out.images)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_the_same_call_gives_the_same_bits(engine: PixelFlowEngine, solver: str) -> None:
    first = images(engine, [1, 2, 3], [4, 5, 6], solver=solver)
    assert np.array_equal(first, images(engine, [1, 2, 3], [4, 5, 6], solver=solver))
    assert not np.array_equal(first, images(engine, [1, 2, 3], [4, 5, 7], solver=solver))


def test_another_process_gives_the_same_bits(engine: PixelFlowEngine) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()[-1]
        for _ in range(2)
    ]
    assert runs == [digest(engine)] * 2


def digest(engine: PixelFlowEngine) -> str:
    return hashlib.sha256(images(engine, [1, 2, 3, 0], [4, 5, 6, 7], solver="dopri5").tobytes()).hexdigest()


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize("batch", [2, 3, 5, 8])
def test_batch_mates_do_not_matter(engine: PixelFlowEngine, solver: str, batch: int) -> None:
    """At one place, whatever the others are: other labels, other seeds, the null class."""
    for place in (0, batch // 2, batch - 1):
        labels, seeds = [2] * batch, list(range(batch))
        others, other_seeds = [5] * batch, list(range(100, 100 + batch))
        others[place], other_seeds[place] = labels[place], seeds[place]
        a = images(engine, labels, seeds, solver=solver)[place]
        b = images(engine, others, other_seeds, solver=solver)[place]
        assert np.array_equal(a, b), (place, batch)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize(("padded", "same"), [(40, True), (0, False)], ids=["one length", "each its own"])
def test_prompts_of_batch_mates_do_not_matter_at_one_padded_length(solver: str, padded: int, same: bool) -> None:
    """Whatever length they have under their masks. Padded to the longest of a call, they do: the negative control."""
    shape = {**SHAPE, "num_classes": 0, "cross_attention_dim": 12}
    model = random_reference(3, dtype=torch.float32, **shape)  # type: ignore[arg-type]
    engine = exact_engine(checkpoint_of(model, 3, 16))
    generator = torch.Generator().manual_seed(5)
    own, null, *others = (torch.randn(length, 12, generator=generator) for length in (3, 1, 3, 40))
    found = []
    for other in others:
        several = [own, other]
        length = max([padded, *map(len, several)])
        states = torch.stack([F.pad(prompt, (0, 0, 0, length - len(prompt))) for prompt in several])
        mask = torch.stack([(torch.arange(length) < len(prompt)).float() for prompt in several])
        out = engine(
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            null_encoder_hidden_states=F.pad(null, (0, 0, 0, length - 1))[None],
            null_encoder_attention_mask=mask.new_zeros(1, length).index_fill(1, torch.tensor([0]), 1.0),
            seed=[7, 8],
            num_inference_steps=3,
            solver=solver,  # type: ignore[arg-type]
            rtol=0.1,
            atol=0.1,
            output_type="np",
        )
        found.append(np.asarray(out.images)[0])
    assert np.array_equal(*found) == same


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize("batch", [2, 3, 5, 7])
def test_the_place_in_the_batch_does_not_matter(engine: PixelFlowEngine, solver: str, batch: int) -> None:
    labels, seeds = [i % 6 for i in range(batch)], [10 + i for i in range(batch)]
    forward = images(engine, labels, seeds, solver=solver)
    backward = images(engine, labels[::-1], seeds[::-1], solver=solver)
    assert np.array_equal(forward, backward[::-1])


@pytest.mark.parametrize("batch", [12, 13])
def test_nor_with_several_threads_in_larger_batches(engine: PixelFlowEngine, batch: int) -> None:
    labels, seeds = [i % 6 for i in range(batch)], [10 + i for i in range(batch)]
    forward = images(engine, labels, seeds)
    assert np.array_equal(forward, images(engine, labels[::-1], seeds[::-1])[::-1])


@pytest.mark.usefixtures("one_thread")
def test_a_shared_error_norm_does_make_batch_mates_matter(engine: PixelFlowEngine) -> None:
    """The negative control: what torchdiffeq does is seen by the very comparison above."""
    a = images(engine, [2, 2], [0, 1], solver="dopri5", error_norm="batch")[0]
    b = images(engine, [2, 5], [0, 101], solver="dopri5", error_norm="batch")[0]
    assert not np.array_equal(a, b)


def test_the_callers_random_state_is_left_alone(engine: PixelFlowEngine) -> None:
    before = torch.get_rng_state()
    images(engine, [1], [1])
    engine([1], noise="public", seed=3, num_inference_steps=1)
    assert torch.equal(before, torch.get_rng_state())
    engine([1], noise="public", seed=None, num_inference_steps=1)
    assert not torch.equal(before, torch.get_rng_state())


def test_a_width_that_leaves_a_tail_does_make_the_place_matter() -> None:
    """The other negative control, and the reason for the width above."""
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    forward, backward = torch.nn.functional.silu(x), torch.nn.functional.silu(x.flip(0)).flip(0)
    assert torch.allclose(forward, backward, rtol=1e-6)
    if "AVX" in torch.backends.cpu.get_cpu_capability():
        assert not torch.equal(forward, backward)


if __name__ == "__main__":
    print(digest(build_engine()))
