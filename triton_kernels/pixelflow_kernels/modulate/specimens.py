"""What the ahead-of-time report compiles of modulate: each variant at the published widths and the small model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pixelflow_kernels.configs import launch_config
from pixelflow_kernels.machine_code import Promises, Specimen

TYPES = ("bf16", "fp16", "fp32")
WIDTHS = {1152: TYPES, 1024: ("bf16", "fp32"), 144: ("bf16", "fp32")}

# The operands that a variant lacks: of the forward kernel, of the backward kernel.
VARIANTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "layer_norm_modulate": (
        ("y_ptr", "gate_ptr", "weight_ptr", "residual_ptr"),
        ("grad_residual_ptr", "y_ptr", "gate_ptr", "weight_ptr", "grad_y_ptr", "partial_gate_ptr"),
    ),
    "add_gated_layer_norm_modulate": (("weight_ptr",), ("weight_ptr",)),
    "add_gated_rms_norm_modulate": ((), ()),
    "add_gated_rms_norm": (("shift_ptr", "scale_ptr"), ("scale_ptr", "partial_shift_ptr")),
    "add_rms_norm_modulate": (("gate_ptr",), ("y_ptr", "gate_ptr", "grad_y_ptr", "partial_gate_ptr")),
}
_HIGH = ("gate_ptr", "weight_ptr", "shift_ptr", "scale_ptr")


def specimens(arch: int) -> Iterator[Specimen]:
    """Every kernel, variant, type and width."""
    from . import backward

    for width, types in WIDTHS.items():
        for dtype in types:
            for variant, (without, without_backward) in VARIANTS.items():
                yield _forward(variant, without, dtype, width, arch)
                yield _backward(variant, without_backward, dtype, width, arch)
        options = launch_config("modulate.sum", "any", arch)
        constants = {"WIDTH": width, "TOKENS": launch_config("modulate.backward", _class(width), arch)["TOKENS"]}
        constants |= {name: options.pop(name) for name in [*options] if name.isupper()}
        arguments = dict.fromkeys(("partial_ptr", "out_ptr"), "*fp32") | {"cu_seqlens_ptr": "*i32"}
        yield Specimen(
            name=f"modulate.sum/fp32/c{width}",
            kernel=backward._sum_kernel,
            types=arguments | dict.fromkeys(("num_slots", "num_images"), "i32"),
            constants=constants,
            options=options | {"enable_fp_fusion": True},
            promises=Promises(wide_loads=1, narrow=0),
        )


def _forward(variant: str, without: tuple[str, ...], dtype: str, width: int, arch: int) -> Specimen:
    from . import forward

    main, tail = forward.parts(width)
    options = launch_config("modulate.forward", _class(width), arch)
    names = [n for n in forward._forward_kernel.arg_names if n not in without]
    types = {n: t for n in names if (t := _type(n, dtype))}
    # Whole rounds of 16 bytes a lane: the last 128 of 1152 channels in two-byte types take 8.
    lanes = 32 * options["num_warps"]
    loads = [t for n, t in types.items() if n in ("x_ptr", "y_ptr", *_HIGH)]
    wide = sum(part * _bytes(t) // 16 // lanes for t in loads for part in (main, tail))
    return Specimen(
        name=f"modulate.forward.{variant}/{dtype}/c{width}",
        kernel=forward._forward_kernel,
        types=types,
        constants=dict.fromkeys(without) | {"EPS": 1e-6, "WIDTH": width, "MAIN": main, "TAIL": tail},
        options=options | {"enable_fp_fusion": False},
        promises=Promises(wide_loads=wide, narrow=0 if width >= 1024 else None, ffma=0, shared=0, registers=96),
    )


def _backward(variant: str, without: tuple[str, ...], dtype: str, width: int, arch: int) -> Specimen:
    from . import backward, forward

    main, tail = forward.parts(width)
    options = launch_config("modulate.backward", _class(width), arch)
    tokens = options.pop("TOKENS")
    names = [n for n in backward._backward_kernel.arg_names if n not in without]
    types = {n: t for n in names if (t := _type(n, dtype))}
    lanes = 32 * options["num_warps"]
    loads = [t for n, t in types.items() if n in ("grad_ptr", "grad_residual_ptr", "residual_ptr", "y_ptr", *_HIGH)]
    wide = sum(part * _bytes(t) // 16 // lanes for t in loads for part in (main, tail))
    sizes = {"EPS": 1e-6, "WIDTH": width, "TOKENS": tokens, "MAIN": main, "TAIL": tail}
    return Specimen(
        name=f"modulate.backward.{variant}/{dtype}/c{width}",
        kernel=backward._backward_kernel,
        types=types,
        constants=dict.fromkeys(without) | sizes,
        options=options | {"enable_fp_fusion": True},
        promises=Promises(wide_loads=wide, registers=128),
    )


def _class(width: int) -> str:
    from . import forward

    return forward.shape_class(width)


def _type(name: str, dtype: str) -> str | None:
    if name in ("image_index_ptr", "cu_seqlens_ptr"):
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32" if name in _HIGH or name.startswith("partial") else f"*{dtype}"
    return "i32" if name.startswith(("stride", "num")) else None


def _bytes(type_name: str) -> int:
    return 4 if type_name == "*fp32" else 2
