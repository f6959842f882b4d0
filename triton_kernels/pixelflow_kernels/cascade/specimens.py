"""Specimens of the cascade for the ahead-of-time report: each kernel at the published widths and stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pixelflow_kernels.configs import launch_config
from pixelflow_kernels.machine_code import Promises, Specimen

CHANNELS, PATCH = 3, 4
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
WIDTHS = {"fp32": ("w64", "w32"), "bf16": ("w64",), "fp16": ("w64",), "fp64": ("w64",)}


def specimens(arch: int) -> Iterator[Specimen]:
    """Yield every kernel and dtype, with given and with drawn noise, and training pairs of one and of four stages."""
    for dtype, classes in WIDTHS.items():
        for shape_class in classes:
            yield _renoise(dtype, shape_class, arch, given=True)
            yield _renoise(dtype, shape_class, arch, given=False)
    yield _initial(arch)
    for stages in (1, 4):
        for images, tokens in (("u8", "bf16"), ("fp32", "fp32")):
            yield _pairs(images, tokens, stages, arch, given=True)
            yield _pairs(images, tokens, stages, arch, given=False)


def keeps_apart(arch: int) -> bool:
    """Return whether the installed compiler keeps products and sums separate when fusion is disabled.

    Triton 3.6 ships ptxas 12.9.86 for sm_100, which fuses packed operations (mul.rn.f32x2, add.rn.f32x2) despite its
    own --fmad=false, so level A does not hold there. ptxas 13.1.80 of Triton 3.7 does not fuse them.
    """
    import triton

    return arch < 100 or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def refinements(pairs: int) -> int:
    """Number of fused multiply-adds in ``pairs`` correctly rounded divisions and as many square roots.

    Nothing else may fuse. A division and a root take seven together; the two routines for out-of-range numbers take
    fifteen in total. Drawing two normals takes one division and one root.
    """
    return 15 + 7 * pairs


def _renoise(dtype: str, shape_class: str, arch: int, *, given: bool) -> Specimen:
    from . import kernels

    config = launch_config("cascade.renoise", shape_class, arch)
    blocks = config["BLOCK_R"] * config["BLOCK_C"] // (32 * config["num_warps"])  # per thread
    size = SIZES[dtype]
    state = blocks * size // 16
    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "alpha": "fp64", "beta": "fp64"}
    types |= dict.fromkeys(("rows", "stride_x_row", "stride_out_row", "row_tiles", "column_tiles", "stage"), "i32")
    types |= {"noise_ptr": "*fp32"} if given else {"seeds_ptr": "*i64"}
    return Specimen(
        name=f"cascade.{'renoise_given' if given else 'renoise'}/{dtype}/{shape_class}",
        kernel=kernels._renoise_kernel,
        types=types,
        constants={"seeds_ptr" if given else "noise_ptr": None, **_constants(config)},
        options=_options(config),
        promises=Promises(
            wide_loads=state + (blocks if given else 0),
            narrow=0,
            ffma=(0 if given else refinements(2 * blocks)) if keeps_apart(arch) else None,
            flushes=0,
        ),
    )


def _initial(arch: int) -> Specimen:
    from . import kernels

    config = launch_config("cascade.initial", "all", arch)
    return Specimen(
        name="cascade.initial/fp32/all",
        kernel=kernels._initial_kernel,
        types={"seeds_ptr": "*i64", "out_ptr": "*fp32", "stride_out_image": "i32", "tiles": "i32"},
        constants=_constants(config),
        options=_options(config),
        promises=Promises(
            ffma=refinements(2 * config["BLOCK"] // (32 * config["num_warps"])) if keeps_apart(arch) else None,
            flushes=0,
            shared=0,
        ),
    )


def _pairs(images: str, tokens: str, stages: int, arch: int, *, given: bool) -> Specimen:
    from . import pairs

    config = launch_config("cascade.pairs", "all", arch)
    types = {
        "images_ptr": f"*{images}",
        "index_ptr": "*i64",
        "flip_ptr": "*i1",
        "cu_seqlens_ptr": "*i32",
        "spans_ptr": "*fp64",
        "tau_ptr": "*fp64",
        "tokens_ptr": f"*{tokens}",
        "targets_ptr": "*fp32",
    }
    types |= {"noise_ptr": "*fp32"} if given else {"seeds_ptr": "*i64"}
    numbers = ("stride_image", "stride_channel", "stride_row", "num_images", "height", "width", "tiles")
    threads = 32 * config["num_warps"]
    # Cells per thread in each branch; if there are fewer cells than threads, several threads compute the same cell.
    cells = [max(config["BLOCK"] // 4 ** (d + 1) // threads, 1) for d in range(stages)]
    return Specimen(
        name=f"cascade.{'pairs_given' if given else 'pairs'}/{images}-{tokens}/s{stages}",
        kernel=pairs._pair_kernel,
        types=types | dict.fromkeys(numbers, "i32"),
        constants={
            "seeds_ptr" if given else "noise_ptr": None,
            "stride_column": 1,
            "STAGES": stages,
            "CHANNELS": CHANNELS,
            "PATCH": PATCH,
            **_constants(config),
        },
        options=_options(config),
        promises=Promises(
            wide_loads=cells[0] if given else None,
            ffma=(0 if given else refinements(2 * sum(cells))) if keeps_apart(arch) else None,
            flushes=0,
        ),
    )


def _constants(config: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in config.items() if name.isupper()}


def _options(config: dict[str, int]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.isupper()} | {"enable_fp_fusion": False}
