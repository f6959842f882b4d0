"""``bench profile``: which kernel is of which class, what counts as busy, and a real trace of a CPU."""

from __future__ import annotations

import ast
import gzip
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness import ceilings
from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.profile import measure
from pixelflow_benchmarks.suites.profile.kernels import CLASSES, OURS, Row, busy_rows, class_of
from pixelflow_benchmarks.suites.profile.measure import class_floors, class_records, kernel_records, measure_profiles
from pixelflow_benchmarks.suites.stages.opponents import Opponents
from pixelflow_benchmarks.suites.stages.problem import StageProblem
from pixelflow_benchmarks.suites.stages.runs import EngineRun

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e12, dtype=torch.float32)
TINY = StageProblem(config=SHAPES["tiny"], stage=1, batch=2, steps=2, solver="euler", dtype=torch.float32, device=CPU)

# As profilers show them, the long ones cut at their ends.
GPU_NAMES = {
    "products": """
        nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT
        nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN
        sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x
        ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_32x6_tn
        void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_64x1_tn_align8>(cutlass_80...)
        void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false, ...>
        void gemmSN_TN_kernel<float, 128, 16, 2, 4, 8, 9, false, cublasGemvTensorStridedBatched<float const>, ...>
        void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false, ...>
        triton_tem_fused_addmm_gelu_3
    """,
    "attention": """
        void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<96, 128, 64, 4, false, false, ...>>
        void flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<96, 64, 128, 4, false, false, ...>>
        void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloop...>>>
        fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t, ...>)
        cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0
        triton_tem_fused_flex_attention_0
    """,
    "pointwise": """
        triton_poi_fused_addmm_gelu_5
        triton_red_fused__scaled_dot_product_flash_attention_addmm_mul_pow_2
        triton_per_fused__to_copy_native_layer_norm_0
        void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, ...>
        void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<...>>>
        void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, ...>>>
        void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>(int, ...)
    """,
    "copies": """
        Memcpy DtoD (Device -> Device)
        Memcpy HtoD (Pageable -> Device)
        Memset (Device)
        void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)...>
        void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<at::native::(anonymous...)...>
        void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>
        void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_...>>
        void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>(...)
    """,
    "other": "void cub::DeviceScanKernel<...>(int)",
}
CPU_NAMES = {
    "products": "aten::addmm aten::mm aten::bmm mkldnn::_linear_pointwise mkl::_mkl_linear pixelflow::onednn_linear",
    "attention": """
        aten::_scaled_dot_product_flash_attention_for_cpu pixelflow::varlen_attention pixelflow::varlen_attention_torch
    """,
    "pointwise": """
        aten::mul aten::gelu aten::native_layer_norm aten::sum pixelflow::norm_rope2d pixelflow::add_norm_modulate
        pixelflow::euler_step_in_place graph_0_cpp_fused_add_mean_mul_pow_rsqrt_0
    """,
    "copies": "aten::copy_ aten::cat aten::index_select aten::fill_",
    "other": "aten::linear aten::view aten::as_strided aten::reshape aten::empty aten::t aten::_to_copy Pregraph",
}


@pytest.mark.parametrize("kind", GPU_NAMES)
def test_kernels_are_told_by_their_names(kind: str) -> None:
    names = [line.strip() for line in GPU_NAMES[kind].strip().splitlines()]
    assert {name: class_of(name) for name in names} == dict.fromkeys(names, kind)


@pytest.mark.parametrize("kind", CPU_NAMES)
def test_operators_are_told_by_their_names(kind: str) -> None:
    names = CPU_NAMES[kind].split()
    assert {name: class_of(name) for name in names} == dict.fromkeys(names, kind)
    if kind == "pointwise":
        assert class_of("## Call CompiledFxGraph f6qknepp5xaawjqhm2vubl6h4s7c ##") == kind


def test_our_kernels_have_one_class_and_a_name_of_their_own() -> None:
    launched: list[tuple[str, str]] = []
    for path in sorted((ROOT / "triton_kernels/pixelflow_kernels").glob("*/*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                launched.append((node.name, path.parent.name))
    twice = [name for name, count in Counter(name for name, _ in launched).items() if count > 1]
    assert twice == [], "a profile could not tell them apart"
    known = {name: kind for kind, names in OURS.items() for name in names}
    assert known == {name: "attention" if op == "varlen_attention" else "pointwise" for name, op in launched}
    assert {name: class_of(name) for name in known} == known


# --- what the profiler says --------------------------------------------------------------------------------


@dataclass
class Event:
    """As ``key_averages()`` has it."""

    key: str
    device: str
    cpu: float = 0.0
    on_device: float = 0.0
    count: int = 1
    is_user_annotation: bool = False

    @property
    def device_type(self) -> Any:
        return SimpleNamespace(name=self.device)

    @property
    def self_cpu_time_total(self) -> float:
        return self.cpu

    @property
    def self_device_time_total(self) -> float:
        return self.on_device


EVENTS = [
    Event("stage 3", "CPU", 50, 900, is_user_annotation=True),
    Event("stage 3", "CUDA", 0, 1000),  # the range as the device passed through it
    Event("aten::addmm", "CPU", 20, 600, 4),  # what it launched is below
    Event("pixelflow::varlen_attention", "CPU", 30, 300, 2),
    Event("cudaGraphLaunch", "CPU", 5),
    Event("Memset (Device)", "CUDA", 0, 0),
    Event("_attention_forward_kernel", "CUDA", 0, 300, 2),
    Event("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "CUDA", 0, 600, 4),
]


def test_on_a_gpu_kernels_count_and_nothing_twice() -> None:
    assert busy_rows(iter(EVENTS), on_gpu=True) == [
        Row("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", 4, 600e-6),
        Row("_attention_forward_kernel", 2, 300e-6),
    ]


def test_on_a_cpu_operators_count_without_the_ranges() -> None:
    assert busy_rows(EVENTS, on_gpu=False) == [
        Row("pixelflow::varlen_attention", 2, 30e-6),
        Row("aten::addmm", 4, 20e-6),
        Row("cudaGraphLaunch", 1, 5e-6),
    ]


def test_classes_make_up_the_wall_time_beside_their_floors() -> None:
    rows = [
        Row("nvjet_tst_192x192", 12, 5.0),
        Row("_modulate_forward_kernel", 8, 1.5),
        Row("_attention_forward_kernel", 4, 2.0),
        Row("_rope2d_forward_kernel", 4, 0.5),
        Row("_euler_kernel", 1, 0.25),
        Row("void flash::flash_fwd_splitkv_combine_kernel", 1, 0.25),
    ]
    floors = {"products": 4.0, "attention": 1.0, "pointwise": 1.5}
    found = {r["class"]: r for r in class_records(rows, 10.0, floors)}  # type: ignore[arg-type]
    assert list(found) == list(CLASSES)
    assert {name: r["seconds"] for name, r in found.items()} == {
        "products": 5.0, "attention": 2.25, "pointwise": 2.25, "copies": 0, "other": 0, "idle": 0.5,
    }  # fmt: skip
    assert sum(r["share_of_wall"] for r in found.values()) == pytest.approx(1)
    assert {name: r["floor_seconds"] for name, r in found.items() if "floor_seconds" in r} == floors
    assert (found["products"]["calls"], found["attention"]["calls"], found["pointwise"]["calls"]) == (12, 5, 13)
    kernels = {r["name"]: r for r in kernel_records(rows, floors)}  # type: ignore[arg-type]
    assert {name: r["floor_seconds"] for name, r in kernels.items() if "floor_seconds" in r} == {
        "_modulate_forward_kernel": pytest.approx(1.0),
        "_attention_forward_kernel": 1.0,
        "_rope2d_forward_kernel": pytest.approx(0.5),
    }
    assert kernels["nvjet_tst_192x192"]["share_of_busy"] == pytest.approx(5 / 9.5)
    assert kernels["_modulate_forward_kernel"]["mean_seconds"] == 1.5 / 8
    busier = {r["class"]: r["seconds"] for r in class_records(rows, 9.0, floors)}  # type: ignore[arg-type]
    assert busier["idle"] == 0, "kernels of two streams ran at once"


def test_floors_of_the_classes_are_the_floor_of_the_stage() -> None:
    xl = replace(TINY, config=SHAPES["xl"], stage=3, batch=16, dtype=torch.bfloat16)
    found = class_floors(xl, 3, CEILINGS)
    assert sum(found.values()) == pytest.approx(3 * CEILINGS.floor(xl.flops, xl.pointwise_bytes))
    assert found["products"] / 3 == pytest.approx(32 * 3653e9 / 1e12, rel=1e-3)
    assert found["attention"] / 3 == pytest.approx(32 * 2165e9 / 1e12, rel=1e-3)


# --- for real ----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_: CEILINGS)
    folder = tmp_path / "new" / "profile"
    command = ["profile", "stage=1", "shape=tiny", "batch=2", "--device", "cpu", "repeats=3", "--steps", "2"]
    who = [word for name in ("torch/eager", "reference", "triton/graphs") for word in ("--variant", name)]
    result = CliRunner().invoke(bench, [*command, *who, "--top", "4", "--output", str(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.jsonl", "reference.trace.json.gz", "torch-eager.trace.json.gz",
    ]  # fmt: skip
    records = [json.loads(line) for line in (folder / "profile.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records if r["kind"] not in ("class", "kernel")] == [
        "environment", "ceilings", "measurement", "measurement", "absent", "end",
    ]  # fmt: skip
    assert {r["suite"] for r in records} == {"profile"}
    assert "absent: triton/graphs: " in result.output
    assert "torch/eager, stage 1, batch 2, euler, tiny, float32" in result.output
    measured = {r["variant"]: r for r in records if r["kind"] == "measurement"}
    for variant, r in measured.items():
        assert (r["case"], r["batch"], r["stage"], r["evaluations"]) == ("stage 1, batch 2, euler", 2, 1, 2)
        assert r["right"]
        assert r["seconds"]["repeats"] == 3
        kernels = [k for k in records if k["kind"] == "kernel" and k["variant"] == variant]
        classes = {k["class"]: k for k in records if k["kind"] == "class" and k["variant"] == variant}
        assert list(classes) == list(CLASSES)
        assert sum(k["share_of_busy"] for k in kernels) == pytest.approx(1)
        assert sum(c["share_of_wall"] for c in classes.values()) == pytest.approx(1)
        assert r["busy_seconds"] == pytest.approx(sum(k["seconds"] for k in kernels))
        assert r["profiled_seconds"] == pytest.approx(sum(c["seconds"] for c in classes.values()))
        names = [k["name"] for k in kernels]
        assert not {"stage 1", "step 0", "block 0", "modulations"} & {*names}
        by = dict(zip(names, kernels, strict=True))
        # q, k, v, o, two of the MLP in each of two blocks, and patches, head, modulations, conditioning
        assert by["aten::addmm"]["calls"] == classes["products"]["calls"] == 2 * (2 * 6 + 2 + 2 + 1 + 4)
        assert classes["attention"]["calls"] == 2 * 2
        rows = [line for line in result.output.splitlines() if "aten::" in line]
        assert len(rows) == 2 * 4
    assert_ranges(folder / "torch-eager.trace.json.gz")


def assert_ranges(file: Path) -> None:
    """The trace has the stage, in it its steps, in them their blocks, and the operators in these."""
    with gzip.open(file, "rt") as text:
        events = [e for e in json.load(text)["traceEvents"] if e.get("ph") == "X"]
    ranges = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}
    assert {"stage 1", "step 0", "step 1", "block 0", "block 1", "modulations"} <= {*ranges}
    assert sum(e["name"] == "block 0" for e in events) == 2

    def within(inner: tuple[float, float], outer: str) -> bool:
        begin, end = ranges[outer]
        return begin <= inner[0] and inner[1] <= end

    assert within(ranges["step 0"], "stage 1")
    assert within(ranges["step 1"], "stage 1")
    assert within(ranges["block 1"], "step 1")  # the last of its name
    attention = [(e["ts"], e["ts"] + e["dur"]) for e in events if "flash_attention" in e["name"]]
    assert len(attention) == 4
    assert within(attention[-1], "block 1")
    assert not within(attention[0], "block 1")


def test_what_is_refused(tmp_path: Path) -> None:
    def said(*options: str) -> str:
        return str(CliRunner().invoke(bench, ["profile", "--device", "cpu", "--shape", "tiny", *options]).exception)

    (tmp_path / "old.txt").write_text("")
    assert "output: got" in said("--stage", "1", "--output", str(tmp_path))
    assert "where something is already" in said("--stage", "1", "--output", str(tmp_path / "old.txt"))
    assert "stage: got 3, expected one of 0, 1" in said("--output", str(tmp_path / "x"))
    assert "variant: got 'public', expected one of 'reference'" in said("--stage", "1", "variant=public")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.txt"]


def test_values_with_an_equals_sign_are_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stage=0").write_text("")
    result = CliRunner().invoke(bench, ["profile", "--output", "stage=0", "stage=1", "shape=tiny", "device=cpu"])
    assert str(result.exception) == (
        "output: got stage=0, where something is already, expected the name of a new folder"
    )
    assert CliRunner().invoke(bench, ["profile", "colour=red"]).exit_code == 2


def test_what_is_wrong_has_no_time_and_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opponents = Opponents(TINY.config, random_weights(TINY.config, CPU), torch.float32, None)
    monkeypatch.setattr(
        measure, "stage_faults", lambda problem, checks, truth: {name: ["off"] * ("torch" in name) for name in checks}
    )
    found = list(measure_profiles(TINY, ["torch/eager", "reference"], opponents, CEILINGS, 3, tmp_path))
    wrong, right = [r for r in found if r["kind"] == "measurement"]
    assert (wrong["variant"], wrong["right"], wrong["fault"], "seconds" in wrong) == (
        "torch/eager",
        False,
        "off",
        False,
    )
    assert (right["variant"], right["right"]) == ("reference", True)
    assert {r["variant"] for r in found if r["kind"] in ("class", "kernel")} == {"reference"}
    assert [path.name for path in tmp_path.iterdir()] == ["reference.trace.json.gz"]


def test_a_failure_of_one_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opponents = Opponents(TINY.config, random_weights(TINY.config, CPU), torch.float32, None)
    whole = Opponents.runs

    def runs(self: Opponents, name: str, problem: StageProblem) -> Any:
        if name == "torch/compiled":
            raise RuntimeError("FailOnRecompileLimitHit\nmore")
        return whole(self, name, problem)

    monkeypatch.setattr(Opponents, "runs", runs)
    found = list(measure_profiles(TINY, ["torch/compiled", "torch/eager"], opponents, CEILINGS, 3, tmp_path))
    measured = [r for r in found if r["kind"] == "measurement"]
    assert [r["right"] for r in measured] == [False, True]
    assert measured[0]["fault"] == "RuntimeError: FailOnRecompileLimitHit"


@pytest.mark.parametrize("failing", ["time_runs", "EngineRun.run"])
def test_runs_are_closed_however_it_ends(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, or after a run that failed its first time."""
    closed: list[object] = []
    monkeypatch.setattr(EngineRun, "close", lambda self: closed.append(self))

    def interrupting(*_: object, **more: object) -> Any:
        raise KeyboardInterrupt if failing == "time_runs" else RuntimeError("no kernel")

    monkeypatch.setattr(*((measure, "time_runs") if failing == "time_runs" else (EngineRun, "run")), interrupting)
    opponents = Opponents(TINY.config, random_weights(TINY.config, CPU), torch.float32, None)
    found = measure_profiles(TINY, ["torch/eager"], opponents, CEILINGS, 3, tmp_path)
    if failing == "time_runs":
        with pytest.raises(KeyboardInterrupt):
            next(found)
    else:
        assert [r["fault"] for r in found] == ["RuntimeError: no kernel"]
    assert len(closed) == 1
