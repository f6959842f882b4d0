"""Count the launches and the memory traffic of a computation without a GPU, on fake CUDA tensors that have no values.

A view launches nothing; any other PyTorch operation counts as one kernel. For the project's own operations the launch
code runs on the fake tensors, and the kernels that it would start are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["product", "attention", "pointwise"]

PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "_addmm_activation", "convolution", "addmv", "mv"}
FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "empty", "new_empty", "empty_like", "empty_strided"}
"""Operations that launch nothing although they are not views."""
OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
"""Operations that do not read the tensor they write."""


@dataclass(frozen=True, slots=True)
class TracedOp:
    """One operation that launches kernels.

    Attributes:
        name: without overload.
        kind: ``product`` (of matrices), ``attention``, or ``pointwise`` for everything else.
        launches: number of kernels.
        bytes_moved: bytes of its operands and results, each read or written once.
    """

    name: str
    kind: Kind
    launches: int
    bytes_moved: int


class Trace(TorchDispatchMode):
    """Dispatch mode that records operations in ``ops`` while it is active.

    Args:
        weights: tensors whose casts do not count, because autocast makes them once per sampling call and keeps them.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[TracedOp] = []
        self._weights = {id(weight) for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record it."""
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "pixelflow":
            self._note_ours(func._schema.name, args, kwargs or {}, out)
        elif namespace == "aten" and not func.is_view and name not in FREE and not self._casts_weight(name, args):
            self._note_aten(name, args, kwargs or {}, out)
        return out

    def _casts_weight(self, name: str, args: Any) -> bool:
        return name == "_to_copy" and id(args[0]) in self._weights

    def _note_aten(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        if not _tensors(out):  # a query of types or sizes
            return
        read = [*_tensors(args), *_tensors(kwargs)][name in OVERWRITING :]
        kind: Kind = "product" if name in PRODUCTS else "pointwise"
        self.ops.append(TracedOp(name, kind, 1, _size([*read, *_tensors(out)])))

    def _note_ours(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        short = name.partition("::")[2]
        kind: Kind = "attention" if "attention" in short else "pointwise"
        moved = _size([*_tensors(args), *_tensors(kwargs), *_tensors(out)])
        self.ops.append(TracedOp(short, kind, _launches_of(name, args, kwargs), moved))

    def note_attention(self, operands: list[Tensor]) -> None:
        """Record one launch of a library's attention."""
        self.ops.append(TracedOp("scaled_dot_product_attention", "attention", 1, _size(operands)))


class _WithoutCuda(TorchFunctionMode):
    """Index and copy by operations that have fake versions; the built-in ones need CUDA, which may be absent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace indexing of CUDA tensors and copies into them; pass on everything else."""
        if func is Tensor.copy_ and args[0].device.type == "cuda":
            return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        if func is not Tensor.__getitem__ or args[0].device.type != "cuda":
            return func(*args, **(kwargs or {}))
        x, key = args
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in (k for k in keys if not isinstance(k, Tensor)):
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            named = sum(k is not None and k is not Ellipsis for k in keys)
            keys[at : at + 1] = [slice(None)] * (x.ndim - named)
        dim = 0
        for k in keys:
            if k is None:
                x = x.unsqueeze(dim)
            elif isinstance(k, slice):
                first, last, step = k.indices(x.shape[dim])
                x = torch.ops.aten.slice.Tensor(x, dim, first, last, step) if k != slice(None) else x
            elif isinstance(k, int):
                x = x.select(dim, k)
                continue
            else:
                x = torch.ops.aten.index.Tensor(x, [None] * dim + [k])
            dim += 1
        return x


class OneAttention(TorchFunctionMode):
    """Treat PyTorch's attention as the single kernel that it is on a GPU; a build without CUDA would decompose it.

    Args:
        trace: where attention is recorded; None to record nothing.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace attention; pass on everything else."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        batch, heads, tokens, head_dim = q.shape
        out = q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)  # the layout of FlashAttention's output
        if self.trace is not None:
            self.trace.note_attention([q, k, v, out])
        return out


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Make tensors fake, also on CUDA devices that do not exist, and disable gradients."""
    with FakeTensorMode(), torch.no_grad(), _WithoutCuda():
        yield


@contextmanager
def tracing(weights: Iterable[Tensor] = (), autocast: torch.dtype | None = None) -> Iterator[Trace]:
    """Trace the operations in the context; to be used inside :func:`fake_cuda`.

    Args:
        weights: see :class:`Trace`.
        autocast: see :func:`autocasting`.

    Yields:
        The trace.
    """
    trace = Trace(weights)
    with OneAttention(trace), trace, autocasting(autocast):
        yield trace


@contextmanager
def autocasting(dtype: torch.dtype | None) -> Iterator[None]:
    """Enable CUDA autocast to a type; None leaves it as it is. ``torch.autocast`` refuses to do so without CUDA."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def fake(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the fake CUDA device; to be used inside :func:`fake_cuda`."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def fake_parameters(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Replace a meta module's parameters by ones on the fake CUDA device and return them; inside :func:`fake_cuda`."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(fake(parameter.shape, dtype), requires_grad=False))
    return list(module.parameters())


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _size(tensors: Iterable[Tensor]) -> int:
    """Return the number of bytes; expanded dimensions count once."""
    return sum(
        t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride != 0)
        for t in tensors
    )


def _launches_of(name: str, args: Any, kwargs: Any) -> int:
    """Return how many kernels one of the project's operations launches on a GPU, according to its launch code."""
    from torch._library.custom_ops import OPDEFS
    from triton.runtime.jit import JITFunction

    from pixelflow_kernels import configs
    from pixelflow_kernels.varlen_attention import forward

    launched: list[object] = []

    def note(kernel: object, *args: object, **kwargs: object) -> None:
        launched.append(kernel)

    launch = OPDEFS[name]._backend_fns["cuda"]
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(torch.cuda, "device_of", nullcontext),
        mock.patch.object(configs, "_capability", return_value=90),
        mock.patch.object(forward, "_one", return_value=None),  # a cached tensor: no fake one may enter the cache
        Trace() as inside,
    ):
        launch(*args, **kwargs)
    return len(launched) + sum(op.launches for op in inside.ops)
