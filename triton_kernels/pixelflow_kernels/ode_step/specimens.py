"""Specimens of ode_step for the ahead-of-time report: each kernel as the sampler runs it, and unusual layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pixelflow_kernels.configs import launch_config
from pixelflow_kernels.machine_code import Promises, Specimen

TYPES = ("bf16", "fp16", "fp32")  # dtypes of the velocity; the state is fp32
TOKEN = 48  # values per token in the published model's output: 3 channels, patches of 4 x 4
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
"""The Dormand-Prince pair, as an example of a tableau; the tableau used for sampling is defined in the engine."""

_SCALARS = {
    "step_ptr": "*fp64",
    "guidance_ptr": "*fp64",
    "tolerance_ptr": "*fp64",
    "partial_ptr": "*fp64",
    "accept_ptr": "*i8",
}


def specimens(arch: int) -> Iterator[Specimen]:
    """Yield Euler, all stages, norms and the controller, with and without guidance, and with velocities in a slice."""
    for dtype in TYPES:
        for guided in (True, False):
            yield _euler(arch, dtype, guided, 0)
            yield _start(arch, dtype, guided, probe=False)
            yield _start(arch, dtype, guided, probe=True)
            yield _error(arch, dtype, guided, 0)
            for count in range(2, len(STAGES) + 1):
                yield _stage(arch, dtype, count, guided, 0)
        yield _euler(arch, dtype, True, TOKEN)
        yield _error(arch, dtype, True, TOKEN)
        yield _stage(arch, dtype, len(STAGES), True, TOKEN)
    yield _stage(arch, None, 1, False, 0)
    yield _accept(arch)
    yield from _small(arch)


def _euler(arch: int, dtype: str, guided: bool, width: int) -> Specimen:
    from .kernels import _euler_kernel

    constants = {"STEP_PER_IMAGE": False}
    return _pointwise(arch, "euler", "euler", _euler_kernel, dtype, guided, width, constants, 1)


def _stage(arch: int, dtype: str | None, count: int, guided: bool, width: int) -> Specimen:
    from .kernels import _stage_kernel

    weights = STAGES[count - 1]
    constants = {
        "WEIGHTS": weights,
        "COUNT": count,
        "FIRST": 0,
        "FRESH": dtype is not None,
        "STEP_PER_IMAGE": True,
    }
    reads = 1 + sum(w != 0 for w in weights) - (dtype is not None)
    return _pointwise(arch, f"stage{count}", "stage", _stage_kernel, dtype, guided, width, constants, reads)


def _error(arch: int, dtype: str, guided: bool, width: int) -> Specimen:
    from .norm_kernels import _error_kernel

    constants = {
        "SOLUTION": (*STAGES[-1], 0.0),
        "ERROR": ERROR,
        "COUNT": len(ERROR),
        "FIRST_OF_SOLUTION": 0,
        "FIRST_OF_ERROR": 0,
        "FRESH": True,
    }
    return _pointwise(arch, "error", "error", _error_kernel, dtype, guided, width, constants, len(ERROR) - 1)


def _start(arch: int, dtype: str, guided: bool, probe: bool) -> Specimen:
    from .norm_kernels import _start_kernel

    name = "probe" if probe else "start"
    return _pointwise(arch, name, "start", _start_kernel, dtype, guided, 0, {"PROBE": probe}, 1 + probe)


def _pointwise(
    arch: int,
    name: str,
    config_name: str,
    kernel: Any,
    dtype: str | None,
    guided: bool,
    width: int,
    constants: dict[str, Any],
    reads: int,
) -> Specimen:
    """Specimen of a kernel that reads ``reads`` fp32 tensors and the velocity, all of them 16 bytes at a time."""
    config = launch_config(f"ode_step.{config_name}", "large", arch)
    # Upper-case names are the kernel's constants, the others are the compiler's options.
    options = {key: config.pop(key) for key in list(config) if not key.isupper()}
    num_warps = options["num_warps"]
    constants = {
        **constants,
        **config,
        "GUIDED": guided,
        "GUIDANCE_PER_IMAGE": guided,
        "WIDTH": width,
        "APART": arch >= 100,
        **({} if dtype else {"velocity_ptr": None}),
        **({} if guided else {"guidance_ptr": None}),
    }
    per_thread = config["BLOCK"] // (32 * num_warps)
    size = 4 if dtype == "fp32" else 2
    wide = reads * per_thread * 4 // 16 + (0 if dtype is None else (1 + guided) * per_thread * size // 16)
    layout = f"w{width}" if width else "dense"
    guidance = "guided" if guided else "plain"
    return Specimen(
        name=f"ode_step.{name}/{dtype or 'fp32'}/{guidance}-{layout}",
        kernel=kernel,
        types={n: _type(n, dtype or "fp32") for n in kernel.arg_names if n not in constants},
        constants=constants,
        options={**options, "enable_fp_fusion": False},
        promises=Promises(wide_loads=wide, narrow=0, ffma=0, flushes=0, shared=4 * config["BLOCK"]),
    )


def _type(name: str, dtype: str) -> str:
    if name == "velocity_ptr":
        return f"*{dtype}"
    return _SCALARS.get(name, "*fp32" if name.endswith("_ptr") else "i32")


def _accept(arch: int) -> Specimen:
    from .kernels import _accept_kernel

    config = launch_config("ode_step.accept", "large", arch)
    num_warps = config.pop("num_warps")
    constants = {"LAST": len(ERROR) - 1, **config}
    return Specimen(
        name="ode_step.accept/fp32/dense",
        kernel=_accept_kernel,
        types={n: _type(n, "fp32") for n in _accept_kernel.arg_names if n not in constants},
        constants=constants,
        options={"num_warps": num_warps, "enable_fp_fusion": False},
        promises=Promises(wide_loads=2 * config["BLOCK"] // (32 * num_warps) * 4 // 16, ffma=0, flushes=0, shared=0),
    )


def _small(arch: int) -> Iterator[Specimen]:
    """Yield the kernels over a few numbers per image.

    All promise not to spill; the controller also uses no shared memory, and its first kernel fuses no multiply-add.
    """
    from .control_kernels import _begin_kernel, _end_kernel
    from .norm_kernels import _finish_kernel

    config = launch_config("ode_step.control", "any", arch)
    options = {"num_warps": config.pop("num_warps"), "enable_fp_fusion": False}
    counts = {"status_ptr": "*i32", "accepted_ptr": "*i64", "rejected_ptr": "*i64", "accept_ptr": "*i8"}
    begin: dict[str, Any] = {"NODES": NODES, "COUNT": len(NODES), **config}
    end: dict[str, Any] = {"EXPONENT": -1 / 5, "SAFETY": 0.9, "SMALLEST": 0.2, "LARGEST": 10.0, **config}
    for name, kernel, constants in (("begin", _begin_kernel, begin), ("end", _end_kernel, end)):
        types = {n: counts.get(n, "*fp64" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
        types = {n: t for n, t in types.items() if n not in constants}
        promises = Promises(ffma=0 if name == "begin" else None, shared=0)
        yield Specimen(
            name=f"ode_step.{name}/fp64/any", kernel=kernel, types=types, constants=constants, options=options,
            promises=promises,
        )  # fmt: skip
    config = launch_config("ode_step.finish", "any", arch)
    options = {"num_warps": config.pop("num_warps"), "enable_fp_fusion": False}
    for batch_wide in (False, True):
        only = {"BATCH_WIDE": batch_wide, **config}
        types = {n: "*fp64" if n.endswith("_ptr") else "i32" for n in _finish_kernel.arg_names if n not in only}
        yield Specimen(
            name=f"ode_step.finish/fp64/{'batch' if batch_wide else 'image'}",
            kernel=_finish_kernel,
            types=types,
            constants=only,
            options=options,
        )
