"""Specimens of adamw for the ahead-of-time report: the norm, the scalars, and the update with its optional parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pixelflow_kernels.configs import launch_config
from pixelflow_kernels.machine_code import Promises, Specimen

UPDATES = (
    ("fp32", None, False, False),
    ("fp32", None, True, False),
    ("fp32", "bf16", True, True),
    ("bf16", None, True, False),
    ("bf16", "bf16", True, False),
    ("bf16", "bf16", True, True),
)
"""Dtype of gradients and of copies, whether there are averages, and whether gradients are zeroed."""


def specimens(arch: int) -> Iterator[Specimen]:
    """Yield all kernels. The published recipe has fp32 gradients and averages; the other updates vary its parts."""
    for dtype in ("fp32", "bf16"):
        yield _squares(arch, dtype)
    yield from _small(arch)
    for choice in UPDATES:
        yield _update(arch, *choice)


def refinements(values: int) -> int:
    """Number of fused multiply-adds for ``values`` correctly rounded roots and quotients in each of two loops.

    Nothing else may fuse. A root and a quotient take seven together; the two routines for out-of-range numbers take
    fifteen in total (see ``cascade/specimens.py``).
    """
    return 15 + 7 * 2 * values


def _squares(arch: int, dtype: str) -> Specimen:
    from .kernels import _squares_kernel

    constants, options = _split(launch_config("adamw.squares", "all", arch))
    wide = constants["BLOCK"] // (32 * options["num_warps"]) * (4 if dtype == "fp32" else 2) // 16
    return Specimen(
        name=f"adamw.squares/{dtype}/all",
        kernel=_squares_kernel,
        types={"pointers_ptr": "*i64", "chunks_ptr": "*i64", "partial_ptr": "*fp64"},
        constants={"TYPE": _type(dtype), **constants},
        options=options,
        promises=Promises(wide_loads=wide, ffma=0, flushes=0),
    )


def _update(arch: int, dtype: str, copy: str | None, averaged: bool, zeroed: bool) -> Specimen:
    from .kernels import _update_kernel

    constants, options = _split(launch_config("adamw.update", "all", arch))
    values = constants["BLOCK"] // (32 * options["num_warps"])  # per thread
    wide = (3 + averaged) * values * 4 // 16 + values * (4 if dtype == "fp32" else 2) // 16
    what = [*["averaged"] * averaged, *["copied"] * (copy is not None), *["zeroed"] * zeroed]
    return Specimen(
        name=f"adamw.update/{dtype}/{'-'.join(what) or 'plain'}",
        kernel=_update_kernel,
        types={"pointers_ptr": "*i64", "chunks_ptr": "*i64", "numbers_ptr": "*fp32", "tensors": "i32"},
        constants={
            "LISTS": 4 + averaged + (copy is not None),
            "GRADIENT_TYPE": _type(dtype),
            "COPY_TYPE": None if copy is None else _type(copy),
            "AVERAGED": averaged,
            "ZEROED": zeroed,
            "APART": arch >= 100,
            **constants,
        },
        options=options,
        promises=Promises(wide_loads=wide, ffma=refinements(values), flushes=0),
    )


def _small(arch: int) -> Iterator[Specimen]:
    """Yield the kernels that run as a single program: both promise not to spill, the scalars also no shared memory."""
    from .kernels import _norm_kernel, _numbers_kernel

    constants, options = _split(launch_config("adamw.norm", "all", arch))
    yield Specimen(
        name="adamw.norm/fp64/all",
        kernel=_norm_kernel,
        types={"partial_ptr": "*fp64", "norm_ptr": "*fp32", "count": "i32"},
        constants=constants,
        options=options,
    )
    constants, options = _split(launch_config("adamw.numbers", "all", arch))
    pointers = {"norm_ptr": "*fp32", "lr_ptr": "*fp64", "counters_ptr": "*i64", "numbers_ptr": "*fp32"}
    yield Specimen(
        name="adamw.numbers/fp64/all",
        kernel=_numbers_kernel,
        types={name: pointers.get(name, "fp64") for name in _numbers_kernel.arg_names},
        constants=constants,
        options=options,
        promises=Promises(shared=0),
    )


def _type(name: str) -> Any:
    import triton.language as tl

    return {"fp32": tl.float32, "bf16": tl.bfloat16}[name]


def _split(config: dict[str, int]) -> tuple[dict[str, int], dict[str, Any]]:
    """Split a launch configuration into kernel constants and compiler options."""
    constants = {name: value for name, value in config.items() if name.isupper()}
    options = {name: value for name, value in config.items() if not name.isupper()}
    return constants, options | {"enable_fp_fusion": False}
