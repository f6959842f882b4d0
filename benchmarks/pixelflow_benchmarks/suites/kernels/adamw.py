"""adamw: gradient norm, clipping, AdamW and moving average for the parameters of several blocks, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain

import torch
from torch import Tensor

from pixelflow_kernels.adamw import FusedAdamW, reference

from .case import STAGE_SIDES, WIDTH, Case, Outputs, Problem, size_of

LR, BETAS, EPS, DECAY, EMA = 1e-4, (0.9, 0.999), 1e-8, 0.01, 0.9999
MAX_NORM = 1e9
"""Above the gradients' norm: clipping does all its work, but the last bit of the norm affects no other value."""
TAKEN = 100
"""Steps taken before this one."""

State = dict[str, list[Tensor]]


def cases(problem: Problem) -> Iterator[Case]:
    """Yield one case for all stages, at the last one: half as many blocks of the published width as images."""
    if problem.stage == len(STAGE_SIDES) - 1:
        yield _update(problem)


def block_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of a block's weights and biases, and of the weights of its four norms."""
    wide = ((3, 1), (1, 1), (4, 1), (1, 4), (6, 1))
    products = [(rows * WIDTH, columns * WIDTH) for rows, columns in wide]
    shapes: list[tuple[int, ...]] = [(WIDTH,)] * 4
    return shapes + [shape for rows, columns in products for shape in ((rows, columns), (rows,))]


def start(problem: Problem) -> State:
    """Return parameters, gradients, moments and averages, random float32 values that are the same on every call."""
    shapes = block_shapes() * max(problem.batch // 2, 1)
    names = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "averages")
    state = {
        name: [problem.normal(*shape, seed=5 * i + k, dtype=torch.float32) for i, shape in enumerate(shapes)]
        for k, name in enumerate(names)
    }
    state["exp_avg_sqs"] = [x.square_() for x in state["exp_avg_sqs"]]
    return state


def _update(problem: Problem) -> Case:
    state = start(problem)
    gradients, device = state["gradients"], problem.device
    settings = (*BETAS, EPS, DECAY, MAX_NORM, EMA)

    def plain(dtype: torch.dtype = torch.float32) -> Outputs:
        norm = reference.gradient_norm(gradients)
        found = reference.numbers(norm.item(), LR, TAKEN, *settings)
        numbers = torch.tensor(found, dtype=torch.float64, device=device).float().to(dtype)
        lists = (state[name] for name in ("gradients", "parameters", "exp_avgs", "exp_avg_sqs", "averages"))
        new = []
        for g, p, m, v, average in zip(*lists, strict=True):
            new.append(reference.update(g.to(dtype), p.to(dtype), m.to(dtype), v.to(dtype), average.to(dtype), numbers))
        return tuple(x for tensors in zip(*new, strict=True) for x in tensors if x is not None)

    return Case(
        name=f"adamw.update/{problem.label}",
        variants={
            "ours": _made_when_called(partial(_Ours, state)),
            "eager": _made_when_called(partial(_Torch, state, fused=False)),
            "torch fused": _made_when_called(partial(_Torch, state, fused=True)),
        },
        plain=plain,
        truth=lambda: plain(torch.float64),
        exact=True,
        growth=4.0,  # torch also rounds beta2, and the parameter after weight decay
        # Gradients count twice: they cannot be clipped before all of them have been read.
        bytes_moved=2 * size_of(*gradients) + 2 * sum(size_of(*state[n]) for n in state if n != "gradients"),
    )


def _made_when_called(make: Callable[[], Callable[[], Outputs]]) -> Callable[[], Outputs]:
    """Return a variant that is made on its first call: one that cannot be made is like one that cannot run."""
    made = cache(make)
    return lambda: made()()


class _Ours:
    """The project's kernels. Each call is one step; the outputs of the first one are checked."""

    def __init__(self, state: State) -> None:
        self.gradients = state["gradients"]
        own = [[x.clone() for x in state[name]] for name in ("parameters", "averages")]
        self.optimizer = FusedAdamW(
            *own, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, max_norm=MAX_NORM, ema_decay=EMA
        )
        for name in ("exp_avgs", "exp_avg_sqs"):
            for mine, x in zip(getattr(self.optimizer, name), state[name], strict=True):
                mine.copy_(x)
        self.optimizer.counters[0] = TAKEN

    def __call__(self) -> Outputs:
        o = self.optimizer
        o.update(self.gradients)
        return (*o.parameters, *o.exp_avgs, *o.exp_avg_sqs, *o.averages)


class _Torch:
    """PyTorch's clipping, AdamW (fused or foreach) and interpolation on lists of tensors; each call is one step."""

    def __init__(self, state: State, fused: bool) -> None:
        self.parameters = [torch.nn.Parameter(x.clone()) for x in state["parameters"]]
        self.averages = [x.clone() for x in state["averages"]]
        on_gpu = self.parameters[0].is_cuda
        kind = {"fused": True} if fused else {"foreach": True}
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, capturable=on_gpu, **kind
        )
        self.weight = 1 - min(EMA, (1 + TAKEN) / (10 + TAKEN))
        for i, parameter in enumerate(self.parameters):
            parameter.grad = state["gradients"][i].clone()
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(TAKEN), device=parameter.device),
                "exp_avg": state["exp_avgs"][i].clone(),
                "exp_avg_sq": state["exp_avg_sqs"][i].clone(),
            }

    def __call__(self) -> Outputs:
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        parameters = [p.detach() for p in self.parameters]
        torch._foreach_lerp_(self.averages, parameters, self.weight)
        moments = (self.optimizer.state[p] for p in self.parameters)
        firsts, seconds = zip(*((m["exp_avg"], m["exp_avg_sq"]) for m in moments), strict=True)
        return tuple(chain(parameters, firsts, seconds, self.averages))
