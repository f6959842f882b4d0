"""The cascade sampler: start from noise; at each later stage upsample and renoise; integrate every stage.

Source: arXiv 2504.07963, section 3.4.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import PixelFlowTransformer, at_least_fp32
from .noise import NoiseSource
from .schedule import Stage, euler_times, make_stages
from .solvers import dopri5, euler_step


def guided_velocity(
    model: PixelFlowTransformer,
    x: Tensor,
    t_model: Tensor,
    weight: float,
    class_labels: Tensor | None,
    text: tuple[Tensor, Tensor | None] | None,
    null_text: tuple[Tensor, Tensor | None] | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """``v_null + w (v_cond - v_null)`` from one batch, the null half first; for w = 1 the conditional half alone.

    Args:
        model: the transformer.
        x: ``[B, c, h, w]``.
        t_model: ``[B]``.
        weight: the guidance weight w.
        class_labels: ``[B]``, or None for a text model.
        text, null_text: states ``[B, L, E]`` and mask ``[B, L]`` of the prompt and of the empty prompt, or None.
        dtype: dtype in which the halves are combined; None for the model's output dtype.

    Raises:
        ValueError: for a text model with w other than 1, there is no empty prompt, or only one of the two prompts has a
            mask.
    """
    if weight == 1:
        states, mask = text if text is not None else (None, None)
        v = model(x, t_model, class_labels, encoder_hidden_states=states, encoder_attention_mask=mask)
        return v if dtype is None else v.to(dtype)
    labels = None
    if class_labels is not None:
        labels = torch.cat([torch.full_like(class_labels, model.num_classes), class_labels])
    states, mask = None, None
    if text is not None:
        if null_text is None or (text[1] is None) != (null_text[1] is None):
            raise ValueError("null_text: guidance needs the empty prompt, with a mask where the prompt has one")
        states = torch.cat([null_text[0], text[0]])
        if text[1] is not None and null_text[1] is not None:
            mask = torch.cat([null_text[1], text[1]])
    both = model(
        torch.cat([x, x]),
        torch.cat([t_model, t_model]),
        labels,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
    )
    null, conditional = (both if dtype is None else both.to(dtype)).chunk(2)
    return null + weight * (conditional - null)


def enter_stage(x: Tensor, stage: Stage, noise: NoiseSource) -> Tensor:
    """Nearest-neighbor upsampling by 2, then ``alpha x + beta n`` with block-correlated n."""
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    n = noise.block(stage.index, tuple(x.shape)).to(x)  # type: ignore[arg-type]
    return stage.alpha * x + stage.beta * n


@torch.no_grad()
def sample(
    model: PixelFlowTransformer,
    *,
    shape: tuple[int, int, int, int],
    num_stages: int,
    num_inference_steps: Sequence[int],
    guidance: Sequence[float],
    noise: NoiseSource,
    class_labels: Tensor | None = None,
    text: tuple[Tensor, Tensor | None] | None = None,
    null_text: tuple[Tensor, Tensor | None] | None = None,
    solver: str = "euler",
    shift: float = 1.0,
    state: str = "fp32",
    error_norm: str = "image",
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> list[Tensor]:
    """Sample a batch and return the state at the end of every stage, ``[B, c, h_s, w_s]`` each.

    Args:
        model: the transformer.
        shape: ``(B, c, H, W)`` of the result.
        num_stages: S.
        num_inference_steps: Euler steps of each stage (ignored by dopri5).
        guidance: guidance weight of each stage.
        noise: the source of all randomness.
        class_labels, text, null_text: as in :func:`guided_velocity`.
        solver: ``euler`` or ``dopri5``.
        shift: time shift of Euler steps.
        state: ``fp32``: guidance, update and state are in at least float32. ``public``: they have the velocity's dtype
            from the first Euler step on, and the model time has the state's dtype, as in the published code.
        error_norm, rtol, atol: error control of dopri5, see :func:`dopri5`.
    """
    batch, channels, height, width = shape
    shrink = 2 ** (num_stages - 1)
    for name, value, known in (
        ("solver", solver, ("euler", "dopri5")),
        ("state", state, ("fp32", "public")),
        ("error_norm", error_norm, ("image", "batch")),
    ):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {known}")
    weights = model.proj_out_2.weight
    high = at_least_fp32(weights.dtype)
    x = noise.initial((batch, channels, height // shrink, width // shrink)).to(weights.device)
    ends = []
    for stage in make_stages(num_stages):
        if stage.index > 0:
            x = enter_stage(x, stage, noise)
        weight = guidance[stage.index]
        if solver == "euler":
            tau, t_model = euler_times(stage, num_inference_steps[stage.index], shift)
            for step in range(len(t_model)):
                t = t_model[step].to(x.device, x.dtype if state == "public" else torch.float32).expand(batch)
                v_dtype = None if state == "public" else high
                v = guided_velocity(model, x, t, weight, class_labels, text, null_text, v_dtype)
                x = euler_step(x, v, tau[step], tau[step + 1])
                if state == "public":
                    x = x.to(v.dtype)
        else:
            first, last = stage.window

            def field(
                y: Tensor, tau: Tensor, weight: float = weight, first: float = first, last: float = last
            ) -> Tensor:
                t = (first + (last - first) * tau).to(torch.float32)
                return guided_velocity(model, y, t, weight, class_labels, text, null_text, y.dtype)

            x = dopri5(field, x.to(high), rtol, atol, error_norm).x
        ends.append(x)
    return ends


def to_images(x: Tensor) -> Tensor:
    """``clamp(x / 2 + 1/2, 0, 1)`` as ``[B, H, W, c]`` float32."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
