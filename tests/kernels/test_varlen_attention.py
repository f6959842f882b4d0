"""varlen_attention on a CPU: the meaning against float64, both operations' registration, backends, what is refused."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from pixelflow_engine import layers
from pixelflow_kernels import PackedLayout, checks
from pixelflow_kernels.varlen_attention import BackendUnavailableError, backends, flash, op, varlen_attention
from support import attention, packs
from support.attention import Pack, pack
from support.kernels import assert_same_bits

OPERATIONS = {"triton": op._varlen_attention, "torch": op._varlen_attention_torch}


def call(of: Pack, **options: Any) -> Tensor:
    return varlen_attention(*of, **options)


# --- meaning -----------------------------------------------------------------------------------------------


@packs.draws(60)
@given(
    q_lengths=packs.lengths(max_tokens=200, min_length=0),
    k_lengths=packs.lengths(max_tokens=200, min_length=0),
    heads=packs.heads(),
    head_dim=packs.head_dims(),
    dtype=packs.types(),
    std=packs.stds(),
    seed=packs.seeds(),
)
def test_any_pack(
    q_lengths: list[int], k_lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, std: float, seed: int
) -> None:
    """The reference and PyTorch's attention, self (where the lengths' numbers differ) and cross: level D."""
    cross = k_lengths if len(k_lengths) == len(q_lengths) else None
    of = pack(q_lengths, cross, heads, head_dim, dtype, std, seed)
    out, lse = op._varlen_attention(*of, 1)
    attention.assert_output(out, of)
    attention.assert_lse(lse, of)
    attention.assert_output(call(of), of)
    grad = attention.gradient_of(of, seed)
    found = op._varlen_attention_backward(grad, None, *of[:3], out, lse, *of[3:], 1)
    attention.assert_gradients(found, of, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bits_are_those_of_the_engines_attention(dtype: torch.dtype) -> None:
    """PyTorch's attention of neighbouring images of one size as a batch."""
    layout = PackedLayout.from_grids([(3, 4), (3, 4), (5, 1), (3, 4)])
    of = pack([12, 12, 5, 12], dtype=dtype)
    expected = layers.self_attention(of.q, of.k, of.v, layout)
    lengths = (layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
    assert_same_bits(varlen_attention(of.q, of.k, of.v, *lengths), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradcheck(name: str) -> None:
    of = pack([3, 0, 5], [2, 3, 4], 2, 8, torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in of[:3]]

    def run(*tensors: Tensor) -> Any:
        found = OPERATIONS[name](*tensors, *of[3:], 1)
        return found if isinstance(found, Tensor) else (found[0], found[1].nan_to_num(neginf=0))

    torch.autograd.gradcheck(run, leaves)


def test_lse_alone_has_a_gradient() -> None:
    of = pack([3, 4], [2, 5], 2, 8, torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in of[:3]]
    found = torch.autograd.grad(op._varlen_attention(*leaves, *of[3:], 1)[1].sum(), leaves)
    expected = torch.autograd.grad(attention.truth(of._replace(q=leaves[0], k=leaves[1]))[1].sum(), leaves[:2])
    for a, b in zip(found, (*expected, torch.zeros_like(of.v)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_scale_is_as_given() -> None:
    of = pack([5, 9])
    assert_same_bits(call(of._replace(scale=None)), call(of))  # type: ignore[arg-type]
    other = of._replace(scale=0.3)
    attention.assert_output(call(other), other)
    out, lse = op._varlen_attention(*other, 1)
    attention.assert_output(out, other)
    attention.assert_lse(lse, other)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("lengths", [[4, 4], [3, 5]], ids=["one group", "two groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_callers_autocast_changes_nothing(name: str, lengths: list[int], dtype: torch.dtype) -> None:
    of = pack(lengths, None, 2, 8, dtype)
    leaves = [x.detach().clone().requires_grad_() for x in of[:3]]

    def run() -> list[Tensor]:
        found = OPERATIONS[name](*leaves, *of[3:], 1)
        out = found if isinstance(found, Tensor) else found[0]
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    usual = run()
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(run(), usual, strict=True):
            assert a.dtype == b.dtype == dtype
            assert_same_bits(a, b)


# --- registration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    of = pack([3, 0, 5], [2, 3, 0], 2, 8, dtype)
    leaves = [x.detach().requires_grad_() for x in of[:3]]
    torch.library.opcheck(OPERATIONS[name], (*leaves, *of[3:], 1))
    grad = torch.randn(8, 2, 8).to(dtype)
    out, lse = op._varlen_attention(*of, 1)
    if name == "torch":
        torch.library.opcheck(op._varlen_attention_torch_backward, (grad, *of[:5], of.scale))
        return
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(op._varlen_attention_backward, (grad, grad_lse, *of[:3], out, lse, *of[3:], 1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_under_compile(backend: str) -> None:
    of = pack([3, 0, 5], [2, 3, 4], 2, 8)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attention(q, k, v, *of[3:])
        again, lse = op._varlen_attention(out, k, v, *of[3:], 1)
        return again.square().sum() + lse.nan_to_num(neginf=0).sum()

    leaves = [x.detach().clone().requires_grad_() for x in of[:3]]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_a_call_on_cuda_is_one_operation_that_reads_nothing_back() -> None:
    """Traced with tensors that are not there: a look at a value would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.device("cuda"), Record():
        qkv = torch.empty(128, 3, 2, 72, dtype=torch.bfloat16)
        cu_seqlens = torch.empty(3, dtype=torch.int32)
        q, k, v = qkv.unbind(1)
        out = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 64, 64, multiple_of=64)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
    assert [name for name in called if name.startswith("pixelflow")] == ["pixelflow::varlen_attention"]


# --- backends ----------------------------------------------------------------------------------------------

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_which_backend_is_taken() -> None:
    assert backends.choose("auto", torch.zeros(1)) == "torch"
    assert backends.choose("torch", torch.zeros(1)) == "torch"
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto, triton, flash, torch"):
        call(pack([3]), backend="cuda")
    for name in ("triton", "flash"):
        with pytest.raises(BackendUnavailableError, match=f"'{name}' cannot run: it needs a CUDA device"):
            call(pack([3]), backend=name)


def test_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.why_not("triton", CUDA, torch.bfloat16) is None
    assert backends.why_not("triton", CUDA, torch.float64) == "its kernels take no float64"
    assert "not torch.float32" in (backends.why_not("flash", CUDA, torch.float32) or "")
    for dtype in checks.DTYPES:
        assert backends.why_not("torch", CPU, dtype) is None
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.why_not("triton", CUDA, torch.bfloat16) == "the package triton is not installed"


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A place for stand-ins: neither function is there until a test puts one."""
    for module, _ in flash.PLACES:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    flash._function.cache_clear()
    yield
    flash._function.cache_clear()


@pytest.mark.usefixtures("no_flash")
def test_flash_attention_is_found_by_its_function_and_called_by_position() -> None:
    of = pack([3, 4], dtype=torch.bfloat16)
    seen: list[tuple[Any, ...]] = []

    def with_softmax_scale(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None,
    ) -> Any:  # fmt: skip
        seen.append(("package", cu_q, max_q, dropout_p, softmax_scale))
        return q

    def with_scale(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
                   scale: float | None = None) -> Any:  # fmt: skip
        seen.append(("torch", cu_seq_q, max_q, scale))
        return query

    def without_scale(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int) -> Any:
        seen.append(("old torch", cu_seq_q, max_q))
        return query

    assert "no importable flash_attn.flash_attn_varlen_func nor torch" in (flash.why_not(torch.bfloat16) or "")
    for module, name, function, expected in (
        ("torch.nn.attention.varlen", "varlen_attn", without_scale, ("old torch", of.cu_seqlens_q, 4)),
        ("torch.nn.attention.varlen", "varlen_attn", with_scale, ("torch", of.cu_seqlens_q, 4, of.scale)),
        ("flash_attn", "flash_attn_varlen_func", with_softmax_scale, ("package", of.cu_seqlens_q, 4, 0.0, of.scale)),
    ):
        setattr(sys.modules[module], name, function)
        flash._function.cache_clear()
        assert flash.why_not(torch.bfloat16) is None
        assert flash.attention(*of) is of.q
        assert seen[-1] == expected
        if function is without_scale:
            with pytest.raises(RuntimeError, match=r"softmax_scale: got 1\.0, but torch"):
                flash.attention(*of._replace(scale=1.0))


@pytest.mark.usefixtures("no_flash")
@pytest.mark.parametrize("there", [False, True])
def test_flash_attention_is_chosen_and_called_in_one_graph(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(query: Any, key: Any, value: Any, *lengths: Any, scale: float) -> Any:
        return query * scale + value

    if there:
        monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", stand_in, raising=False)
    of = pack([3, 4], dtype=torch.bfloat16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[str | None, Tensor]:
        reason = backends.why_not("flash", CUDA, torch.bfloat16)
        return reason, flash.attention(q, k, v, *of[3:]) if reason is None else q

    reason, out = run(*of[:3])
    assert (reason is None) == there
    torch.compiler.reset()  # what was compiled keeps its choice
    got_reason, got = torch.compile(run, fullgraph=True, backend="eager")(*of[:3])
    assert got_reason == reason
    assert_same_bits(got, out)


def test_the_choice_of_a_backend_imports_no_compiler() -> None:
    """In a process of its own."""
    code = "import sys, pixelflow_kernels.varlen_attention; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pytorchs_own_function_is_as_it_is_called() -> None:
    """The real one, wherever this PyTorch has it: seven positions, and the name of the scale."""
    import inspect

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    parameters = list(inspect.signature(varlen.varlen_attn).parameters.values())
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[:7])
    assert all(p.default is not p.empty for p in parameters[7:])


# --- refusals ----------------------------------------------------------------------------------------------

X = torch.zeros(7, 3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(7, 24)}, "q: got shape"),
        ({"k": X[None]}, "k: got shape"),
        ({"q": X.int(), "k": X.int(), "v": X.int()}, "q: got torch.int32, expected one of"),
        ({"k": X.double()}, "k: got torch.float64, expected the type of q"),
        ({"v": X.to("meta")}, "v: got device meta"),
        ({"k": torch.zeros(7, 2, 8)}, "k: got heads and head dim"),
        ({"v": torch.zeros(7, 3, 16)}, "v: got heads and head dim"),
        ({"q": torch.zeros(7, 3, 16)[..., ::2]}, "q: got strides"),
        ({"k": torch.zeros(7, 8, 3).transpose(1, 2)}, "k: got strides"),
        ({"v": torch.zeros(7, 3, 16)[..., :8]}, "v: got strides"),
        ({"v": X[:6]}, "v: got 6 tokens, expected as many as k has"),
        ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, "q: got no heads"),
        ({"q": X[..., :4].clone(), "k": X[..., :4].clone(), "v": X[..., :4].clone()}, "head dim: got 4, expected"),
        (dict.fromkeys("qkv", torch.zeros(7, 1, 264)), "head dim: got 264, expected a multiple of 8, from 8 to 256"),
        ({"cu_seqlens_q": torch.tensor([[0, 7]], dtype=torch.int32)}, "cu_seqlens_q: got shape"),
        ({"cu_seqlens_k": torch.empty(0, dtype=torch.int32)}, "cu_seqlens_k: got shape"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7])}, "cu_seqlens_q: got torch.int64"),
        ({"cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)}, "cu_seqlens_k: got 2 entries"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32, device="meta")}, "cu_seqlens_k: got device meta"),
        ({"cu_seqlens_k": torch.zeros(6, dtype=torch.int32)[::2]}, "cu_seqlens_k: got stride 2"),
        ({"max_seqlen_q": -1}, "max_seqlen_q: got -1"),
        ({"max_seqlen_k": 3}, "max_seqlen_k: got 3, but 2 members have 7 tokens together"),
        ({"softmax_scale": 0.0}, "softmax_scale: got 0.0"),
        ({"softmax_scale": -0.5}, "softmax_scale: got -0.5"),
        ({"softmax_scale": float("nan")}, "softmax_scale: got nan"),
        ({"softmax_scale": float("inf")}, "softmax_scale: got inf"),
        ({"multiple_of": 0}, "multiple_of: got 0"),
        # Values, which a CPU can look at:
        ({"cu_seqlens_q": torch.tensor([1, 3, 7], dtype=torch.int32)}, r"cu_seqlens_q: got \[1, 3, 7\]"),
        ({"cu_seqlens_q": torch.tensor([0, 8, 7], dtype=torch.int32)}, r"cu_seqlens_q: got \[0, 8, 7\]"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 6], dtype=torch.int32)}, r"cu_seqlens_k: .* from 0 to 7"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 7], dtype=torch.int32)}, "max_seqlen_q: got 4, a member has 6"),
        ({"multiple_of": 3}, r"multiple_of: got 3, but cu_seqlens_q has the lengths \[3, 4\]"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    arguments = {"q": X, "k": X, "v": X, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    arguments |= {"max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**(arguments | change))


def test_the_operation_looks_at_values_too() -> None:
    of = pack([3, 4])
    with pytest.raises(ValueError, match=r"cu_seqlens_k: .* from 0 to 7"):
        op._varlen_attention(*of._replace(cu_seqlens_k=attention.cumulative([3, 3])), 1)
    with pytest.raises(ValueError, match="max_seqlen_k: got 3, a member has 4"):
        op._varlen_attention(*of._replace(max_seqlen_k=3), 1)


def test_a_kept_promise_changes_nothing() -> None:
    of = pack([32, 0, 64])
    assert_same_bits(call(of, multiple_of=32), call(of))
