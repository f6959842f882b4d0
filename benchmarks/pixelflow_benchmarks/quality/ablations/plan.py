"""What is trained and how it is sampled.

Cascades that begin at different resolutions and end at the same, several seeds of each: the same model, the same number
of steps, and the same number of tokens a step, so that a cascade whose small stages are cheap sees more images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pixelflow_benchmarks.quality.digits import Setting
from pixelflow_training.config import TrainConfig, load_config

STAGES = (1, 2, 3)
"""Of the cascades: 16 px, 8 to 16 px and 4 to 16 px."""
FULL = 3
"""Stages of the cascade on which guidance and solvers are tried."""
TOKENS = 560
"""Of a training step: 35, 56 and 80 images. Every stage of three has whole numbers of them in three steps."""
STEPS = 2100

UNGUIDED = Setting(steps=20, guidance_scale=1.0)
MILD = Setting(steps=20, guidance_schedule="constant", guidance_scale=1.5)
KICK_OFF = (UNGUIDED, MILD)
"""Weights that are the same at all stages: a stage-wise weight means something else in each cascade."""

SCALES = (1.5, 2.0, 2.4, 3.0)
NO_GUIDANCE = Setting(steps=10, guidance_scale=1.0)
STAGEWISE = tuple(Setting(steps=10, guidance_scale=scale) for scale in SCALES)
CONSTANT = tuple(Setting(steps=10, guidance_schedule="constant", guidance_scale=scale) for scale in SCALES)

EULER = tuple(Setting(steps=steps) for steps in (2, 5, 10, 20, 30))
DOPRI5 = tuple(Setting(solver="dopri5", rtol=rtol) for rtol in (1e-3, 1e-1))
TRUTH = Setting(solver="dopri5", rtol=1e-5)
"""So near to the solution that other solvers' distance to it is their own error."""

PLAN: Mapping[int, tuple[Setting, ...]] = {
    1: KICK_OFF,
    2: KICK_OFF,
    FULL: tuple(dict.fromkeys((*EULER, *KICK_OFF, NO_GUIDANCE, *STAGEWISE, *CONSTANT, *DOPRI5))),
}
"""By the number of stages."""


def has_truth(setting: Setting) -> bool:
    """Whether a setting differs from :data:`TRUTH` in nothing but the solver."""
    return replace(setting, solver=TRUTH.solver, steps=TRUTH.steps, rtol=TRUTH.rtol) == TRUTH


def stage_tokens(config: TrainConfig) -> list[int]:
    """Tokens of an image at each stage."""
    stages = config.scheduler.num_stages
    return [(config.resolution // 2 ** (stages - 1 - s) // config.model.patch_size) ** 2 for s in range(stages)]


def training_config(recipe: str, stages: int, seed: int, steps: int) -> TrainConfig:
    """The training of one cascade.

    Args:
        recipe: path or name of the recipe that gives all else.
        stages: of the cascade.
        seed: of everything that is drawn.
        steps: optimizer steps.
    """
    same = [f"scheduler.num_stages={stages}", f"seed={seed}", f"steps={steps}", "log_every=20", "eval_every=700"]
    tokens = stage_tokens(load_config(recipe, same))
    return load_config(recipe, [*same, f"batch_size={max(stages, round(TOKENS * stages / sum(tokens)))}"])


def tokens_seen(config: TrainConfig) -> int:
    """Of a whole training: images take stages in turn."""
    tokens = stage_tokens(config)
    whole, rest = divmod(config.steps * config.batch_size, len(tokens))
    return whole * sum(tokens) + sum(tokens[:rest])
