"""What cases declare: operations beside PyTorch's own counter, bytes beside what the operations are handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pixelflow_benchmarks.opponents.random_models import SHAPES, random_reference, random_weights
from pixelflow_benchmarks.suites.blocks import trace_engine_block
from pixelflow_benchmarks.suites.images.opponents import ImageProblem, drawn_at_once, reference_images
from pixelflow_benchmarks.suites.kernels import adamw, cascade, modulate, rope2d
from pixelflow_benchmarks.suites.kernels import case as case_module
from pixelflow_benchmarks.suites.kernels import varlen_attention as attention_cases
from pixelflow_benchmarks.suites.kernels.cases import OPS, all_cases
from pixelflow_benchmarks.suites.stages.problem import StageProblem
from pixelflow_engine import ModelConfig, PixelFlowConfig, SchedulerConfig
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.reference.sampler import guided_velocity

CPU = torch.device("cpu")
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SMALL = PixelFlowConfig(
    model=ModelConfig(num_attention_heads=3, attention_head_dim=8, depth=2, patch_size=4, num_classes=7),
    scheduler=SchedulerConfig(num_stages=3),
    resolution=32,
)


def problem_of(config: PixelFlowConfig, stage: int, batch: int, dtype: torch.dtype = torch.float32) -> StageProblem:
    return StageProblem(config=config, stage=stage, batch=batch, steps=2, solver="euler", dtype=dtype, device=CPU)


def counted(call: Callable[[], object]) -> dict[str, int]:
    """Operations of a call by the module that did them; attention is written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def per_image(found: dict[str, int]) -> dict[str, int]:
    """Of the modules that have a row per image, under their names in the model."""
    inner = {name.partition("PixelFlowTransformer.")[2]: n for name, n in found.items()}
    blocks = [f"transformer_blocks.{i}.norm1.linear" for i in range(8)]
    wanted = ["timestep_embedder", "latent_size_embedder", "proj_out_1", *blocks]
    return {name: inner[name] for name in wanted if name in inner}


@pytest.mark.parametrize(("config", "stages"), [(SMALL, 3), (SHAPES["tiny"], 2)], ids=["small", "tiny"])
def test_a_stage_s_operations(config: PixelFlowConfig, stages: int) -> None:
    """But for the rows per image that its description names, the operations of the reference, in every stage."""
    assert config.scheduler.num_stages == stages
    model = random_reference(config, random_weights(config, CPU), torch.float32)
    C, depth = config.model.width, config.model.depth
    sequences = []
    for stage in range(stages):
        problem = problem_of(config, stage, batch=3)
        time = torch.full((3,), 500.0)
        found = counted(
            lambda p=problem, t=time: guided_velocity(
                model, p.start(), t, p.weight, p.labels(), None, None, torch.float32
            )
        )
        rows = per_image(found)
        n = problem.sequences
        embedding = 2 * n * (256 * C + C * C)
        assert rows == {
            "timestep_embedder": embedding,
            "latent_size_embedder": embedding,
            "proj_out_1": 2 * n * C * 2 * C,
            **{f"transformer_blocks.{i}.norm1.linear": 2 * n * C * 6 * C for i in range(depth)},
        }
        assert problem.flops == found["PixelFlowTransformer"] - sum(rows.values()), stage
        sequences.append(n)
    assert sequences == [3, *[6] * (stages - 1)], "the first stage has no null half"


def test_an_image_s_operations() -> None:
    """Of all evaluations; the small product that correlates the noise between them is none of the model's."""
    config = SHAPES["tiny"]
    model = random_reference(config, random_weights(config, CPU), torch.float32)
    problem = ImageProblem(config=config, batch=2, steps=3, dtype=torch.float32, device=CPU)
    found = counted(lambda: reference_images(model, problem, drawn_at_once(CPU)))
    assert problem.flops == found["PixelFlowTransformer"] - sum(per_image(found).values())


@pytest.mark.parametrize("stage", range(4))
def test_a_stage_s_bytes(stage: int) -> None:
    """But for what its description names, the traffic that is traced in the fused block, in every stage."""
    config = SHAPES["xl"]
    problem = problem_of(config, stage, batch=16, dtype=torch.bfloat16)
    n, tokens, C = problem.sequences, problem.sequences * problem.tokens, config.model.width
    side = round(problem.tokens**0.5)
    ops = trace_engine_block(FusedOperations("triton"), True, n, side)
    traced = {op.name: 0 for op in ops if op.kind == "pointwise"}
    for op in ops:
        if op.kind == "pointwise":
            traced[op.name] += op.bytes_moved
    table = 4 * side * (config.model.attention_head_dim // 2)
    lengths = 4 * (n + 1)
    left_out = {
        "norm_rope2d": 2 * 2 * C + 2 * 4 * tokens + table,  # two weights, rows and columns
        # Twice: three rows per image, an image for each token; once a weight.
        "add_norm_modulate": 2 * (3 * 4 * n * C + 4 * tokens + lengths) + 2 * C,
    }
    assert {*traced} == {*left_out}
    assert problem.pointwise_bytes == config.model.depth * (sum(traced.values()) - sum(left_out.values()))
    assert problem.pointwise_bytes == 24 * tokens * C * config.model.depth


# --- kernels -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of few heads and small images, whose attention kernel is its CPU implementation."""
    for module in (case_module, cascade, adamw):
        monkeypatch.setattr(module, "STAGE_SIDES", (2, 4, 8, 16))
    for module in (rope2d, attention_cases):
        monkeypatch.setattr(module, "HEADS", 2)
        monkeypatch.setattr(module, "HEAD_DIM", 8)
    for module in (rope2d, modulate, attention_cases, adamw):
        monkeypatch.setattr(module, "WIDTH", 16)

    def attention(q: Tensor, k: Tensor, v: Tensor, *numbers: Any, backend: str, multiple_of: int) -> Tensor:
        if backend != "triton":
            raise ValueError("not here")
        out: Tensor = torch.ops.pixelflow.varlen_attention(q, k, v, *numbers, q.shape[-1] ** -0.5, multiple_of)[0]
        return out

    monkeypatch.setattr(attention_cases, "varlen_attention", attention)


class Handed(TorchDispatchMode):
    """Tensors that our operations are handed and give, by name: ``add_norm_modulate.x``, ``add_norm_modulate -> 0``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "pixelflow":
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
            for k, value in given.items():
                leaves = torch.utils._pytree.tree_leaves(value)
                self.found += [(f"{name}.{k}", leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            results = torch.utils._pytree.tree_leaves(out)
            self.found += [(f"{name} -> {i}", value) for i, value in enumerate(results) if value is not None]
        return out


PER_IMAGE = {"cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "step", "guidance", "seeds", "index", "spans", "tau"}
PER_IMAGE |= {"tolerance"}
LSE = {"varlen_attention -> 1", "varlen_attention_backward.lse"}
TABLES = {"gradient_norm -> 0", *(f"adamw_ema.{name}" for name in ("counters", "lr", "norm"))}
TABLES |= {f"{op}.{name}" for op in ("adamw_ema", "gradient_norm") for name in ("pointers", "known", "chunks")}
WRITTEN = {f"adamw_ema.{name}" for name in ("parameters", "exp_avgs", "exp_avg_sqs", "averages")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_case_s_bytes(op: str, dtype: torch.dtype) -> None:
    """But for what the description of a case names, those of the tensors that ours is handed and gives."""
    cases = [*all_cases([op], range(4), 3, dtype, CPU)]
    assert cases
    for case in cases:
        with Handed() as trace:
            case.variants["ours"]()
        assert trace.found, case.name
        moved = 0
        for name, tensor in trace.found:
            if name.rpartition(".")[2] in PER_IMAGE:
                assert tensor.numel() <= 2 * 6 + 1, (case.name, name)
            elif name not in LSE | TABLES:
                moved += tensor.numel() * tensor.element_size() * (2 if name in WRITTEN else 1)
        if "rms_residual.forward+backward" in case.name:
            moved += 4 * 16  # its weight's gradient is made of the rows of the others
        for name, tensor in trace.found:
            if name.rpartition(".")[2] == "slopes":
                moved -= tensor[0].nbytes  # Dopri5's second slope has the weight 0 in its solution and its error
        assert case.bytes_moved == moved, case.name


@pytest.mark.parametrize("op", OPS)
def test_a_case_s_operations(op: str) -> None:
    """Those of the plain computation; of attention as PyTorch counts it where it is one kernel."""
    mapping = {
        FLASH: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        FLASH_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    for case in all_cases([op], range(4), 3, torch.float32, CPU):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            case.plain()
        assert case.flops == counter.get_total_flops(), case.name
        assert (case.flops > 0) == (op == "varlen_attention")
