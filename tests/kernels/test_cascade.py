"""cascade on a CPU: the meaning against double precision and the published covariance, the operations' registration,
what is refused; and the machine code of the kernels, compiled for GPUs that are not there.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note
from torch import Tensor

from pixelflow_engine import schedule
from pixelflow_engine.config import SchedulerConfig
from pixelflow_engine.layers import patchify
from pixelflow_engine.noise import CounterNoise
from pixelflow_engine.reference import make_stages, training_pair
from pixelflow_kernels import PackedLayout, checks
from pixelflow_kernels.cascade import (
    initial_normals,
    law,
    op,
    reference,
    training_pairs,
    upsample_draw_renoise,
    upsample_renoise,
)
from pixelflow_kernels.philox import SAMPLING, TRAINING, _log, box_muller, counter_normals, seed_tensor
from support import cascade
from support.cascade import ALPHA, BETA, SEEDS
from support.kernels import assert_same_bits, same_bits
from support.packs import draws

CPU = torch.device("cpu")


# --- noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("purpose", [SAMPLING, TRAINING])
def test_normals_are_those_of_philox_in_double_precision(seed: int, purpose: int) -> None:
    got = counter_normals(seed_tensor([seed]), 3, 50, purpose)[0].double()
    want = torch.tensor([cascade.normals(seed, 3, purpose, i) for i in range(50)], dtype=torch.float64)
    # log: 2 ulp; its root 1 + 1/2; sine or cosine: 2; the product: 1/2; the angle's own rounding: 1 ulp of pi/4.
    radius = want.unflatten(-1, (2, 2)).norm(dim=-1).repeat_interleave(2, -1)
    assert ((got - want).abs() <= 12 * cascade.U * radius).all()


def test_the_radius_is_rounded_as_ieee_754_says() -> None:
    """A root that is one unit off, as MKL's, moves one radius in five."""
    words = torch.from_numpy(np.random.default_rng(5).integers(0, 2**32, 100_000))
    # At this angle word the angle is half a unit in the last place: its cosine is exactly 1.
    x, _ = box_muller(words, torch.full_like(words, 1 << 29))
    u = (2 * (words >> 9) + 1).float() * 2.0**-24
    assert_same_bits(x, torch.from_numpy(np.sqrt((-2.0 * _log(u)).numpy())))


def test_the_engines_counter_noise_is_the_operations() -> None:
    seeds = seed_tensor(SEEDS)
    source = CounterNoise(tuple(SEEDS), CPU)
    assert_same_bits(initial_normals(seeds, (3, 6, 10)), source.initial((8, 3, 6, 10)))
    assert_same_bits(initial_normals(seeds, (1, 3, 3)), source.initial((8, 1, 3, 3)))
    x = cascade.states((8, 3, 3, 5), torch.float32, 1)
    for stage in (1, 2, 7):
        want = upsample_renoise(x, source.block(stage, (8, 3, 6, 10)), alpha=ALPHA, beta=BETA)
        assert_same_bits(upsample_draw_renoise(x, seeds, stage=stage, alpha=ALPHA, beta=BETA), want)


def test_block_noise_against_the_symmetric_root_of_its_covariance() -> None:
    for seed in SEEDS:
        got = CounterNoise((seed,), CPU).block(2, (1, 2, 4, 6))[0].double().numpy()
        want = cascade.correlated(cascade.image_normals(seed, 2, SAMPLING, (2, 4, 6)))
        # 12 ulp of the normals (radius below 5.77), four sums and three products of values below that: 24 ulp.
        assert np.abs(got - want).max() <= 24 * cascade.U * 5.77


def test_a_number_depends_on_seed_stage_and_place_alone() -> None:
    x = torch.randn(3, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    seeds = seed_tensor([7, 9, 7])
    together = upsample_draw_renoise(x, seeds, stage=1, alpha=ALPHA, beta=BETA)
    alone = upsample_draw_renoise(x[1:2], seeds[1:2], stage=1, alpha=ALPHA, beta=BETA)
    assert same_bits(together[1], alone[0])
    zero = torch.zeros_like(x)
    noise = upsample_draw_renoise(zero, seeds, stage=1, alpha=ALPHA, beta=BETA)
    assert same_bits(noise[0], noise[2])
    assert not same_bits(noise, upsample_draw_renoise(zero, seeds, stage=2, alpha=ALPHA, beta=BETA))
    assert not same_bits(noise, upsample_draw_renoise(zero, seeds + 2**32, stage=1, alpha=ALPHA, beta=BETA))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (0, 3, 2, 2), (1, 1, 1, 1), (3, 5, 4, 2)])
def test_given_noise_has_the_bits_of_numpy(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x = cascade.states(shape, dtype, 3)
    noise = cascade.states((*shape[:2], 2 * shape[2], 2 * shape[3]), torch.float32, 4)
    got = upsample_renoise(x, noise, alpha=ALPHA, beta=BETA)
    assert_same_bits(got, cascade.renoised_bits(x, noise, ALPHA, BETA))
    across = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert same_bits(upsample_renoise(across, noise, alpha=ALPHA, beta=BETA), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_round_every_step(dtype: torch.dtype) -> None:
    x = cascade.states((2, 3, 5, 7), dtype, 3)
    noise = cascade.states((2, 3, 10, 14), torch.float32, 4)
    big, short = x.float().repeat_interleave(2, -1).repeat_interleave(2, -2), noise.to(dtype).float()
    kept, fresh = (ALPHA * big).to(dtype).float(), (BETA * short).to(dtype).float()
    assert_same_bits(upsample_renoise(x, noise, alpha=ALPHA, beta=BETA), (kept + fresh).to(dtype))


def test_the_gammas_are_one() -> None:
    for stage, (start, end) in zip(schedule.make_stages(SchedulerConfig()), cascade.SPANS, strict=True):
        assert (stage.start, stage.end) == pytest.approx((start, end), abs=1e-7)
    assert np.allclose(cascade.symmetric_root(cascade.covariance()).sum(0), law.MEAN_SCALE, atol=1e-9)


# --- training pairs ----------------------------------------------------------------------------------------


def check_pairs(pack: cascade.Pack, tokens: Tensor, targets: Tensor) -> None:
    """Against double precision."""
    eps = cascade.given(pack) if pack.noise is not None else cascade.drawn(pack)
    largest = pack.noise.abs().max().item() if pack.noise is not None and len(pack.noise) else 5.77
    for name, got, want, bound in zip(
        ("tokens", "targets"), (tokens, targets), cascade.truth(pack, eps), cascade.bounds(pack, largest), strict=True
    ):
        assert tuple(got.shape) == want.shape
        error = np.abs(got.double().numpy() - want).max(initial=0)
        assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}"


@draws(300)
@given(pack=cascade.pair_packs())
def test_pairs_against_double_precision(pack: cascade.Pack) -> None:
    note(f"{tuple(pack.images.shape)} {pack.images.dtype}, grids {pack.grids}, patch {pack.patch_size}")
    tokens, targets = training_pairs(pack.images, pack.layout, **pack.keywords())
    assert tokens.dtype == targets.dtype == torch.float32
    check_pairs(pack, tokens, targets)
    short, same = training_pairs(pack.images, pack.layout, **pack.keywords(), token_dtype=torch.bfloat16)
    assert_same_bits(short, tokens.bfloat16())
    assert_same_bits(same, targets)


@pytest.mark.parametrize("stages", [5, 6])
def test_deep_cascades(stages: int) -> None:
    pack = cascade.make_pack(
        seed=stages, stages=stages, patch_size=2, channels=1, smallest=(1, 2), halvings=[0, stages - 1, 2], draw=True
    )
    check_pairs(pack, *training_pairs(pack.images, pack.layout, **pack.keywords()))


def test_pairs_are_the_references_where_torch_rounds_alike() -> None:
    """The reference's training pair in float32: torch's own bilinear halving may add the four in another order."""
    pack = cascade.make_pack(
        seed=1, stages=4, patch_size=4, channels=3, smallest=(2, 2), halvings=[0, 1, 3, 2], uint8=False, flips=False
    )
    tokens, targets = training_pairs(pack.images, pack.layout, **pack.keywords())
    assert pack.noise is not None
    first = 0
    for i, (rows, columns) in enumerate(pack.grids):
        last = first + rows * columns
        stage = make_stages(4)[3 - [0, 1, 3, 2][i]]
        shape = (3, rows * 4, columns * 4)
        eps = reference.unpatchify(pack.noise[first:last], shape, 4)[0]
        step = round(pack.tau[i].item() * 1000)
        x_tau, target, _ = training_pair(pack.images[int(pack.index[i])], stage, 4, step, eps)
        for got, want in ((tokens, x_tau), (targets, target)):
            assert (got[first:last] - patchify(want[None], 4)).abs().max() <= 8 * cascade.U
        first = last


def test_halving() -> None:
    """In numpy, rounding by rounding; and torch's own, which has the same bits where no sum rounds."""
    for x in (cascade.states((2, 3, 12, 20), torch.float32, 2), cascade.specials((2, 3, 12, 20), 2)):
        with np.errstate(all="ignore"):
            half = np.float32(0.5)
            across = x.numpy()[..., 0::2] * half + x.numpy()[..., 1::2] * half
            down = torch.from_numpy(across[:, :, 0::2] * half + across[:, :, 1::2] * half)
        assert_same_bits(reference.halve(x), down)
    for dtype in (torch.float32, torch.float64):
        whole = torch.randint(-255, 256, (2, 3, 12, 20), generator=torch.Generator().manual_seed(2)).to(dtype)
        want = F.interpolate(whole, scale_factor=0.5, mode="bilinear", align_corners=False)
        assert_same_bits(reference.halve(whole), want)
    assert_same_bits(reference.up(x), F.interpolate(x, scale_factor=2, mode="nearest"))


def test_all_bytes_are_the_rounded_quotients() -> None:
    """The kernel's two-term product, in numpy: for every byte the bits of ``x / 127.5 - 1``."""
    x = np.arange(256, dtype=np.float32)
    high, low = (np.float32(float.fromhex(v)) for v in ("0x1.01p-7", "0x1.010102p-23"))
    want = reference.signed(torch.arange(256, dtype=torch.uint8))
    assert_same_bits(torch.from_numpy((x * high + x * low) - np.float32(1)), want)
    assert_same_bits(want, torch.arange(256).float() / 127.5 - 1)
    exact = torch.tensor([2 * i / 255 for i in range(256)], dtype=torch.float64).float() - 1
    assert_same_bits(want, exact)


def test_training_noise_is_not_that_of_sampling() -> None:
    seeds = seed_tensor([3])
    sampling, training = (reference.block_normals(seeds, 1, (3, 8, 8), purpose) for purpose in (SAMPLING, TRAINING))
    assert not (sampling == training).any()


# --- registration ------------------------------------------------------------------------------------------


def small_pack(draw: bool, uint8: bool = True) -> cascade.Pack:
    return cascade.make_pack(
        seed=4, stages=2, patch_size=2, channels=3, smallest=(2, 4), halvings=[0, 0, 1], draw=draw, uint8=uint8
    )


def test_opcheck() -> None:
    x, noise, seeds = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 4, 8), seed_tensor([1, 2**64 - 1])
    torch.library.opcheck(op._initial_normals, (seeds, 3, 4, 6))
    torch.library.opcheck(op._initial_normals, (seeds, 1, 3, 3))  # not a whole number of counters
    for dtype in checks.DTYPES:
        torch.library.opcheck(op._renoise, (x.to(dtype), noise, None, 0, ALPHA, BETA))
        torch.library.opcheck(op._renoise, (x.to(dtype), None, seeds, 1, ALPHA, BETA))
    across = torch.randn(2, 3, 4, 2).transpose(2, 3)
    torch.library.opcheck(op._renoise, (across, noise, None, 0, ALPHA, BETA))
    for draw in (False, True):
        for uint8 in (False, True):
            pack = small_pack(draw, uint8)
            arguments = (*pack.arguments(), pack.shape()[0], 2)
            torch.library.opcheck(op._training_pairs, (*arguments, torch.float32, False))
            torch.library.opcheck(op._training_pairs, (*arguments, torch.bfloat16, False))


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 2, 4)])
def test_channels_last_comes_out_contiguous(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(*shape[:2], 2 * shape[2], 2 * shape[3]).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op._renoise, (x, noise, None, 0, ALPHA, BETA))
    for out in (upsample_renoise(x, noise, alpha=ALPHA, beta=BETA), reference.upsample_renoise(x, noise, ALPHA, BETA)):
        assert out.is_contiguous()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_changes_nothing(default: torch.dtype) -> None:
    pack = small_pack(True)
    usual = training_pairs(pack.images, pack.layout, **pack.keywords())
    torch.set_default_dtype(default)
    try:
        other = training_pairs(pack.images, pack.layout, **pack.keywords())
        halves = reference.signed(pack.images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(halves, reference.signed(pack.images))
    for a, b in zip(other, usual, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_under_compile(backend: str) -> None:
    pack, layout = small_pack(True), small_pack(True).layout

    def everything(seeds: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = initial_normals(seeds, (3, 4, 4))
        x = upsample_draw_renoise(x * 0.5, seeds, stage=1, alpha=ALPHA, beta=BETA)
        x = upsample_renoise(x, torch.cat([x, x], 2).repeat_interleave(2, -1), alpha=ALPHA, beta=BETA)
        tokens, targets = training_pairs(images, layout, **pack.keywords(), token_dtype=torch.bfloat16)
        return x + 1, tokens * 2, targets - 1

    seeds = seed_tensor([1, 2, 3])
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    for got, want in zip(compiled(seeds, pack.images), everything(seeds, pack.images), strict=True):
        assert_same_bits(got, want)


def test_nothing_in_nothing_out() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert initial_normals(none, (3, 2, 2)).shape == (0, 3, 2, 2)
    assert upsample_draw_renoise(torch.zeros(0, 3, 2, 2), none, stage=1, alpha=1.0, beta=1.0).shape == (0, 3, 4, 4)
    pack = cascade.make_pack(seed=0, stages=2, patch_size=4, channels=3, smallest=(1, 1), halvings=[])
    for out in training_pairs(pack.images, pack.layout, **pack.keywords()):
        assert out.shape == (0, 48)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2, 4)}, "x: got shape"),
        ({"x": torch.zeros(2, 3, 0, 4)}, "x: got shape"),
        ({"x": torch.zeros(2, 3, 2, 4, dtype=torch.int32)}, "x: got torch.int32"),
        ({"x": torch.zeros(1, 2**10, 2**10, 2**9, device="meta")}, "x: got an image of"),
        ({"x": torch.zeros(2, 3, 2, 4, device="meta")}, "(noise|seeds): got device cpu"),
        ({"noise": torch.zeros(2, 3, 2, 4)}, r"noise: got shape \(2, 3, 2, 4\), expected \(2, 3, 4, 8\)"),
        ({"noise": torch.zeros(2, 3, 4, 8, dtype=torch.int64)}, "noise: got torch.int64"),
        ({"seeds": torch.zeros(2)}, "seeds: got torch.float32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds: got shape \(3,\)"),
        ({"stage": -1}, "stage: got -1"),
    ],
)
def test_renoise_refuses_by_name(change: dict[str, Any], message: str) -> None:
    common = {"x": torch.zeros(2, 3, 2, 4), "alpha": ALPHA, "beta": BETA} | {
        k: v for k, v in change.items() if k == "x"
    }
    for function, own in (
        (upsample_renoise, {"noise": torch.zeros(2, 3, 4, 8)}),
        (upsample_draw_renoise, {"seeds": seed_tensor([1, 2]), "stage": 1}),
    ):
        if "x" in change or set(change) <= set(own):
            with pytest.raises(ValueError, match=message):
                function(**common | own | change)


def test_initial_normals_refuse_by_name() -> None:
    with pytest.raises(ValueError, match=r"seeds: got torch\.int32"):
        initial_normals(torch.zeros(2, dtype=torch.int32), (3, 2, 2))
    with pytest.raises(ValueError, match="seeds: got shape"):
        initial_normals(torch.zeros(2, 1, dtype=torch.int64), (3, 2, 2))
    with pytest.raises(ValueError, match=r"shape: got \(3, 0, 2\)"):
        initial_normals(seed_tensor([1]), (3, 0, 2))
    with pytest.raises(ValueError, match="shape: got an image of"):
        initial_normals(seed_tensor([1]), (2**11, 2**10, 2**10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 16, dtype=torch.float64)}, "images: got torch.float64"),
        ({"images": torch.zeros(3, 8, 16)}, "images: got shape"),
        ({"images": torch.zeros(2, 3, 8, 24)}, "layout: got 4x8 tokens for image 0"),
        ({"images": torch.zeros(2, 3, 10, 20)}, "layout: got 4x8 tokens for image 0.*: 5x10"),
        ({"images": torch.zeros(1, 2**11, 2**10, 2**10, device="meta")}, "images: got an image of"),
        ({"layout": PackedLayout.from_grids([(4, 8), (2, 4), (1, 2)])}, "layout: got 1x2 tokens for image 2"),
        ({"layout": PackedLayout.from_grids([(4, 8)] * 3, "meta")}, "layout: got device meta"),
        ({"spans": torch.zeros(2, 3, dtype=torch.float64)}, "spans: got shape"),
        ({"spans": torch.zeros(7, 2, dtype=torch.float64)}, "spans: got shape"),
        ({"spans": torch.zeros(2, 2)}, "spans: got torch.float32"),
        ({"spans": torch.zeros(2, 2, dtype=torch.float64, device="meta")}, "spans: got device meta"),
        ({"patch_size": 0}, "patch_size: got 0"),
        ({"patch_size": 4}, "layout: got 4x8 tokens for image 0"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, r"index: got shape \(2,\), expected \(3,\)"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "index: got torch.int32"),
        ({"index": torch.tensor([0, 1, 2])}, "index: got 2, expected 0 to 1"),
        ({"index": torch.tensor([0, -1, 1])}, "index: got -1"),
        ({"tau": torch.zeros(3, dtype=torch.float16)}, "tau: got torch.float16"),
        ({"tau": torch.zeros(3, 1)}, "tau: got shape"),
        ({"flip": torch.zeros(3)}, "flip: got torch.float32"),
        ({"flip": torch.zeros(3, dtype=torch.bool, device="meta")}, "flip: got device meta"),
        ({"noise": None}, "noise: got neither noise nor seeds"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "noise: got seeds too"),
        ({"noise": None, "seeds": torch.zeros(3)}, "seeds: got torch.float32"),
        ({"noise": torch.zeros(71, 12)}, r"noise: got torch.float32 \(71, 12\), expected torch.float32 \(72, 12\)"),
        ({"noise": torch.zeros(72, 12, dtype=torch.float64)}, "noise: got torch.float64"),
        ({"noise": torch.zeros(72, 12, device="meta")}, "noise: got device meta"),
        ({"token_dtype": torch.float64}, "token_dtype: got torch.float64"),
    ],
)
def test_pairs_refuse_by_name(change: dict[str, Any], message: str) -> None:
    pack = small_pack(False)
    arguments = {"images": pack.images, "layout": pack.layout, **pack.keywords()}
    with pytest.raises(ValueError, match=message):
        training_pairs(**arguments | change)


# --- machine code ------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_machine_code(arch: int) -> None:
    """No spill, and no multiply-add is fused but inside the correctly rounded divisions and roots (level A)."""
    from pixelflow_kernels.cascade.specimens import keeps_apart, refinements, specimens
    from pixelflow_kernels.machine_code import compile_specimen

    wanted = ("cascade.renoise/fp32/w64", "cascade.renoise_given/fp32/w64", "cascade.pairs/u8-bf16/s4")
    found = {s.name: s for s in specimens(arch)}
    assert len(found) == 19
    for name in wanted:
        report = compile_specimen(found[name], arch)
        assert not report.broken(found[name].promises), name
        assert report.stack == 0
        wide = sum(n for opcode, n in report.opcodes.items() if opcode.startswith("STG") and ".128" in opcode)
        assert wide >= 4, f"{name}: {report.opcodes}"
    assert found[wanted[0]].promises.ffma == (refinements(8) if keeps_apart(arch) else None)
