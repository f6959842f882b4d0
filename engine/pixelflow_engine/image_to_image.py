"""Starting from a given image at a stage of the cascade."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .schedule import Stage


def taken_up(images: Tensor, noise: Tensor, stage: Stage, num_stages: int, tau: float) -> Tensor:
    """The state that training shows a stage: ``tau end + (1 - tau) start``, made of the images and one noise sample.

    ``end = end_s down(x, d) + (1 - end_s) eps`` and ``start = start_s up(down(x, d + 1)) + (1 - start_s) eps``, where
    ``down(x, d)`` halves the resolution d times and ``up`` doubles it.

    Args:
        images: ``[B, c, H, W]`` in [-1, 1], of the last stage's size.
        noise: standard normals ``[B, c, h, w]`` of the stage's size.
        stage: the stage that starts from the image.
        num_stages: number of stages of the cascade.
        tau: local time, from 0 to 1.

    Source: arXiv 2504.07963, section 3.2.
    """
    here = images
    for _ in range(num_stages - 1 - stage.index):
        here = F.avg_pool2d(here, 2)
    end = stage.end * here + (1 - stage.end) * noise
    start = noise  # pure noise at the first stage, whose images may be too small to halve again
    if stage.index > 0:
        before = F.interpolate(F.avg_pool2d(here, 2), scale_factor=2, mode="nearest")
        start = stage.start * before + (1 - stage.start) * noise
    return tau * end + (1 - tau) * start
