"""An independent cascade around the reference model, image by image, for every solver with fixed steps.

Nothing is packed or padded, the guidance halves are two calls, and the updates are written out. The noise is the
engine's, which other tests compare with the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pixelflow_engine import Checkpoint, ModelConfig, PixelFlowConfig, PixelFlowEngine, SchedulerConfig
from pixelflow_engine.noise import CounterNoise
from pixelflow_engine.reference import PixelFlowTransformer, euler_times, make_stages
from pixelflow_engine.reference.sampler import enter_stage

from .engines import uncompiled

U32, U64 = 2.0**-24, 2.0**-53
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One image to generate: size in pixels, a guidance weight per stage, and a class or prompts ``[L, E]``."""

    height: int
    width: int
    seed: int
    weights: Sequence[float]
    label: int | None = None
    prompt: Tensor | None = None
    null: Tensor | None = None


class Noise:
    """The engine's counter noise of one image, with the interface that the reference's sampler uses."""

    def __init__(self, seed: int) -> None:
        self.source = CounterNoise((seed,), CPU)

    def initial(self, shape: tuple[int, int, int, int]) -> Tensor:
        return self.source.initial(shape)

    def block(self, stage: int, shape: tuple[int, int, int, int]) -> Tensor:
        return self.source.block(stage, shape)


def cascade(
    model: PixelFlowTransformer, picture: Picture, steps: Sequence[int], solver: str = "euler", shift: float = 1.0
) -> list[Tensor]:
    """Return the state ``[c, h, w]`` at the end of every stage, in the model's type."""
    dtype, noise, num_stages = model.proj_out_2.weight.dtype, Noise(picture.seed), len(steps)
    shrink, channels = 2 ** (num_stages - 1), model.patch_embed.proj.in_channels
    x = noise.initial((1, channels, picture.height // shrink, picture.width // shrink)).to(dtype)
    ends = []
    for stage, count, weight in zip(make_stages(num_stages), steps, picture.weights, strict=True):
        if stage.index > 0:
            x = enter_stage(x, stage, noise)
        tau, t_model = euler_times(stage, count, shift)
        # A slope at the stage's end is evaluated at the last time of its window.
        times = [*t_model.tolist(), stage.window[1]]
        x = fixed_steps(lambda y, i, w=weight, t=times: guided(model, picture, y, t[i], w), x, tau.tolist(), solver)
        ends.append(x[0])
    return ends


def fixed_steps(slope: Callable[[Tensor, int], Tensor], x: Tensor, tau: Sequence[float], solver: str) -> Tensor:
    """Integrate over the grid ``tau`` with float32 step lengths; ``slope(x, i)`` is the velocity at ``tau[i]``."""
    lengths = [float(np.float32(b) - np.float32(a)) for a, b in pairwise(tau)]
    before: Tensor | None = None
    for i, h in enumerate(lengths):
        v = slope(x, i)
        if solver == "euler":
            x = x + h * v
        elif solver == "heun" or before is None:
            x = x + h / 2 * (v + slope(x + h * v, i + 1))
        else:
            ratio = h / lengths[i - 1]  # the line through both slopes, integrated over the step
            x = x + h * (v + ratio / 2 * (v - before))
        before = v
    return x


@torch.no_grad()
def guided(model: PixelFlowTransformer, picture: Picture, x: Tensor, t: float, weight: float) -> Tensor:
    """Return the guided velocity of one image ``[1, c, h, w]``: two calls of the model, or one at weight 1."""
    time = torch.tensor([t], dtype=torch.float32)

    def half(label: int | None, prompt: Tensor | None) -> Tensor:
        labels = None if label is None else torch.tensor([label])
        states = None if prompt is None else prompt[None].to(x.dtype)
        return model(x, time, labels, encoder_hidden_states=states)

    conditional = half(picture.label, picture.prompt)
    if weight == 1:
        return conditional
    null = half(None if picture.label is None else model.num_classes, picture.null)
    return null + weight * (conditional - null)


# --- engines over the reference's weights ------------------------------------------------------------------


def checkpoint_of(model: PixelFlowTransformer, num_stages: int, resolution: int) -> Checkpoint:
    """Return the reference model's weights as a checkpoint."""
    block, proj = model.transformer_blocks[0], model.patch_embed.proj
    text = getattr(block, "attn2", None)
    config = ModelConfig(
        num_attention_heads=block.attn1.heads,
        attention_head_dim=proj.out_channels // block.attn1.heads,
        depth=len(model.transformer_blocks),
        in_channels=proj.in_channels,
        out_channels=proj.in_channels,
        patch_size=proj.kernel_size[0],
        num_classes=model.num_classes,
        attention_bias=block.attn1.q_proj.bias is not None,
        cross_attention_dim=None if text is None else text.k_proj.in_features,
    )
    scheduler = SchedulerConfig(num_stages=num_stages)
    whole = PixelFlowConfig(model=config, scheduler=scheduler, resolution=resolution)
    return Checkpoint(whole, model.state_dict(), "random")


def exact_engine(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, batch_sizes: Sequence[int] | None = None
) -> PixelFlowEngine:
    """Return the host-driven engine, which is bit-equal to the reference."""
    engine = PixelFlowEngine.from_checkpoint(checkpoint, dtype=dtype, backend="torch", batch_sizes=batch_sizes)
    assert engine.exact
    return engine


def packed_engine(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, batch_sizes: Sequence[int] | None = None
) -> PixelFlowEngine:
    """Return an engine with packed tokens and programs in plain PyTorch: the compiled engine without torch.compile."""
    with uncompiled():
        engine = PixelFlowEngine.from_checkpoint(
            checkpoint, dtype=dtype, backend="torch", compile=True, batch_sizes=batch_sizes
        )
    assert not engine.exact
    return engine


def keep_programs(engine: PixelFlowEngine) -> None:
    """Make the engine reuse its programs, as with graphs, but launch where a graph would be replayed."""

    class Launched:
        def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
            launch()
            return launch

        def leave(self) -> None:
            pass

        def follow(self, left: object) -> None:
            pass

        def close(self) -> None:
            pass

    engine._programs.capture = Launched()
