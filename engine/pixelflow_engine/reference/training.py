"""The training pair of one image at one stage, and the loss.

Source: arXiv 2504.07963, equations 3 to 5 and 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Stage


def down(x: Tensor, halvings: int) -> Tensor:
    """Halve ``[c, h, w]`` repeatedly by means over 2x2 blocks, i.e. bilinear halving without antialiasing."""
    for _ in range(halvings):
        x = F.interpolate(x[None], scale_factor=0.5, mode="bilinear", align_corners=False)[0]
    return x


def up(x: Tensor) -> Tensor:
    """Nearest-neighbor doubling of ``[c, h, w]``."""
    return F.interpolate(x[None], scale_factor=2, mode="nearest")[0]


def training_pair(image: Tensor, stage: Stage, num_stages: int, step: int, eps: Tensor) -> tuple[Tensor, Tensor, float]:
    """Input, target and model time of one training sample.

    Args:
        image: ``[c, R, R]`` in [-1, 1].
        stage: the stage s; its resolution is ``R / 2^(S-1-s)``.
        num_stages: S.
        step: the integer k of ``tau_k``, 0 to K - 1.
        eps: standard normals ``[c, h, w]`` at the stage's resolution, shared by both ends.

    Returns:
        ``x_tau [c, h, w]``, the velocity target ``end - start [c, h, w]``, and the model time.
    """
    d = num_stages - 1 - stage.index
    end = stage.end * down(image, d) + (1 - stage.end) * eps
    start = stage.start * up(down(image, d + 1)) + (1 - stage.start) * eps
    tau = stage.local_times[step].item()
    return tau * end + (1 - tau) * start, end - start, stage.model_times[step].item()


def loss(velocities: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean over images of each image's mean squared error, so that small and large images have equal weight."""
    return torch.stack([(v - u).pow(2).mean() for v, u in zip(velocities, targets, strict=True)]).mean()
