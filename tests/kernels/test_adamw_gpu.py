"""The compiled adamw kernels on a device: the update level A, nothing waits, steps replayed from a CUDA graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pixelflow_kernels.adamw import FusedAdamW, TensorTable, gradient_norm
from support import ode
from support.adamw import ALIGNED, F32, ODD, SETTINGS, expected, lists
from support.kernels import assert_same_bits

pytestmark = pytest.mark.gpu

SHAPES = [(7, 33), (1152, 48), (1,), (0, 5), (50_001,), (2_000_003,)]
NAMES = ("parameters", "exp_avgs", "exp_avg_sqs", "averages", "copies")


@pytest.mark.parametrize("gradient", [F32, torch.bfloat16])
@pytest.mark.parametrize("copied", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guards", [(ALIGNED,), (ODD,), (ALIGNED, ODD, ALIGNED)])
@pytest.mark.parametrize("zeroed", [False, True])
def test_update_has_the_bits_of_eager_pytorch(
    gradient: torch.dtype, copied: torch.dtype | None, guards: tuple[int, ...], zeroed: bool
) -> None:
    from pixelflow_kernels.adamw import kernels

    made = lists(SHAPES, 3, gradient=gradient, copy=copied, guards=guards, hostile=True, device="cuda")
    table = TensorTable.of({name: made[name] for name in made.guarded})
    before, numbers = made.values(), torch.rand(9, device="cuda") + 0.1
    kernels.launch_update(table.pointers, table.chunks, numbers, gradient, copied, True, zeroed)
    for name, tensors in expected(before, numbers, zeroed).items():
        for i, (got, value) in enumerate(zip(made[name], tensors, strict=True)):
            assert_same_bits(got, value, f"{name}[{i}]")
    made.assert_inside()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    gradients = [ode.normal(*shape, seed=i).to("cuda", dtype) for i, shape in enumerate(SHAPES)]
    true = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    norm = gradient_norm(gradients)
    assert norm.item() == pytest.approx(true, rel=2.0**-24 + 1e-12, abs=0)
    assert all(torch.equal(gradient_norm(gradients), norm) for _ in range(5))


def build(device: str) -> FusedAdamW:
    made = [[ode.normal(*shape, seed=i + k).to(device) for i, shape in enumerate(SHAPES)] for k in range(2)]
    return FusedAdamW(*made, [p.bfloat16() for p in made[0]], lr=1e-2, **SETTINGS)


def draw(step: int) -> list[Tensor]:
    gradients = [ode.normal(*shape, seed=9 * step + i, std=0.01 + step % 3) for i, shape in enumerate(SHAPES)]
    if step == 4:
        gradients[1][3] = math.inf
    return gradients


def test_steps_have_the_bits_of_the_cpu_and_a_graph_those_of_launches() -> None:
    """Given the same norm; a learning rate that changes; a step that is skipped; no waiting."""
    cpu, launched, replayed = build("cpu"), build("cuda"), build("cuda")
    static = [torch.zeros(shape, device="cuda") for shape in SHAPES]
    graph, captured = torch.cuda.CUDAGraph(), torch.empty((), device="cuda")
    for step in range(7):
        gradients = draw(step)
        ours = [g.cuda() for g in gradients]
        for optimizer in (cpu, launched, replayed):
            optimizer.lr.fill_(1e-2 / (1 + step))
        try:
            torch.cuda.set_sync_debug_mode("error")
            norm = launched.update(ours, zero_gradients=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for s, g in zip(static, gradients, strict=True):
            s.copy_(g)
        if step == 0:
            captured = replayed.update(static, zero_gradients=True)
        elif step == 1:
            with torch.cuda.graph(graph):
                captured = replayed.update(static, zero_gradients=True)
        if step > 0:
            graph.replay()
        assert_same_bits(captured, norm)
        cpu.update(gradients, norm.cpu())
        for name in NAMES:
            lists_of = (getattr(optimizer, name) for optimizer in (cpu, launched, replayed))
            for x, y, z in zip(*lists_of, strict=True):
                assert_same_bits(y.cpu(), x, f"{name} after step {step}")
                assert_same_bits(z, y, f"{name} after step {step}, replayed")
        assert all(not bool(g.any()) for g in (*ours, *static))
    assert cpu.counters.tolist() == launched.counters.tolist() == replayed.counters.tolist() == [6, 1, 0]


def test_gradients_that_move_are_refused_while_a_graph_is_captured() -> None:
    optimizer = FusedAdamW([torch.ones(64, device="cuda")])
    first, other = torch.ones(64, device="cuda"), torch.ones(64, device="cuda")
    optimizer.update([first])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.zero_()  # an empty graph would be warned of
        with pytest.raises(ValueError, match="while a CUDA graph is captured"):
            optimizer.update([other])


def test_a_graph_goes_on_with_its_own_gradients_after_a_step_with_others() -> None:
    """Whose table of addresses would be freed otherwise, and its memory be somebody else's."""
    optimizers = [FusedAdamW([torch.ones(64, device="cuda")]) for _ in range(2)]
    static = torch.ones(64, device="cuda")
    optimizers[0].update([static])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].update([static])
    optimizers[0].update([torch.full((64,), 2.0, device="cuda")])
    junk = [torch.zeros(count, dtype=torch.int64, device="cuda") for count in range(1, 64)]
    graph.replay()
    for value in (1.0, 2.0, 1.0):
        optimizers[1].update([torch.full((64,), value, device="cuda")])
    assert_same_bits(optimizers[0].parameters[0], optimizers[1].parameters[0])
    assert not any(bool(x.any()) for x in junk)
