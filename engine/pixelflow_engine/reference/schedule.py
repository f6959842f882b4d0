"""The cascade's schedule: where each stage starts and ends on the noise axis and on the model's time axis.

Source: arXiv 2504.07963, section 3.2 (equations 1 to 6). Rounding follows the published implementation, whose
boundaries ``k / K`` (K = 1000 training times) are float32 and whose windows start and end at integer model times.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = -1.0 / 3.0


@dataclass(frozen=True)
class Stage:
    """One resolution of the cascade.

    Attributes:
        index: 0 is the smallest and noisiest.
        start, end: times ``start_s``, ``end_s`` that the stage covers, between noise (0) and image (1).
        local_times: the training grid ``tau_k = k / K``, ``[K]`` float64.
        model_times: model time (0..999) of each ``tau_k``, ``[K]`` float64; the first and the last are the stage's
            window.
        alpha, beta: coefficients on entering the stage from the one below, ``x = alpha * upsample(x) + beta * n``.
    """

    index: int
    start: float
    end: float
    local_times: Tensor
    model_times: Tensor
    alpha: float
    beta: float

    @property
    def window(self) -> tuple[float, float]:
        """Model times at the first and the last local time."""
        return self.model_times[0].item(), self.model_times[-1].item()


def rectify(boundary: float) -> float:
    """``r(b) = 1 / (sqrt(1 - 1/gamma) (1 - b) + b)``, which restores the noise level that upsampling changes."""
    return 1 / (math.sqrt(1 - 1 / GAMMA) * (1 - boundary) + boundary)


def make_stages(num_stages: int, num_train_timesteps: int = 1000) -> list[Stage]:
    """The stages of a cascade, smallest first.

    The model times of a stage divide the interval between two integer times evenly; only the last stage includes the
    right edge.
    """
    K = num_train_timesteps
    boundaries = [(torch.tensor(float(int(K * (s / num_stages)))) / K).item() for s in range(num_stages)] + [1.0]
    starts = [b * rectify(b) for b in boundaries[:-1]]
    lengths = [boundaries[s + 1] - starts[s] for s in range(num_stages)]
    edges = [int(K * (sum(lengths[:s]) / sum(lengths))) for s in range(num_stages)] + [K - 1]
    stages = []
    for s, b in enumerate(boundaries[:-1]):
        k = torch.arange(K, dtype=torch.float64)
        intervals = K if s < num_stages - 1 else K - 1
        model_times = edges[s] + (edges[s + 1] - edges[s]) * k / intervals
        alpha = rectify(b)
        beta = alpha * (1 - b) / math.sqrt(-GAMMA)
        stages.append(Stage(s, starts[s], boundaries[s + 1], k / K, model_times, alpha, beta))
    return stages


def euler_times(stage: Stage, num_steps: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Local times ``[n + 1]``, the last of them 1, and model times ``[n]`` of ``n`` Euler steps, float64.

    ``tau`` is evenly spaced from 0 to 1 - 1/K, then shifted by ``tau / (shift + (1 - shift) tau)``; model time is the
    linear map that sends 0 to the start of the window and 1 - 1/K to its end.
    """
    final = stage.local_times[-1].item()
    tau = torch.arange(num_steps, dtype=torch.float64) * (final / max(num_steps - 1, 1))
    if num_steps > 1:
        tau[-1] = final
    tau = tau / (shift + (1 - shift) * tau)
    first, last = stage.window
    t_model = (last - first) / final * tau + first
    return torch.cat([tau, torch.ones(1, dtype=torch.float64)]), t_model


def guidance_weights(scale: float, num_stages: int, schedule: str = "stagewise") -> list[float]:
    """Guidance weight of each stage.

    ``constant`` is ``scale`` at every stage. ``stagewise`` is ``1 + (scale - 1) * (0, 1/6, 2/3, 1)`` for the four
    published stages; other numbers of stages interpolate these fractions piecewise linearly, and a single stage has the
    full weight.
    """
    if schedule == "constant":
        return [scale] * num_stages
    if schedule != "stagewise":
        raise ValueError(f"schedule: got {schedule!r}, expected 'stagewise' or 'constant'")
    published = (0.0, 1 / 6, 2 / 3, 1.0)
    weights = []
    for s in range(num_stages):
        position = 3 * s / (num_stages - 1) if num_stages > 1 else 3.0
        left = min(int(position), 2)
        fraction = published[left] + (position - left) * (published[left + 1] - published[left])
        weights.append((scale - 1) * fraction + 1)
    return weights
