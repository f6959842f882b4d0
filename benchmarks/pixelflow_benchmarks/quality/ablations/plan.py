"""The plan of the ablations: which models are trained, and how they are sampled.

Cascades that begin at different resolutions and end at the same one are trained with several seeds each. Model, number
of steps and tokens per step are equal, so a cascade whose small stages are cheap sees more images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pixelflow_benchmarks.quality.digits import Setting
from pixelflow_training.config import TrainConfig, load_config

STAGES = (1, 2, 3)
"""Numbers of stages of the cascades: 16 px, 8 to 16 px, and 4 to 16 px."""
FULL = 3
"""Number of stages of the cascade on which guidance and solvers are compared."""
TOKENS = 560
"""Tokens of a training step: 35, 56 and 80 images. Three steps with three stages have as many images of each stage."""
STEPS = 2100

UNGUIDED = Setting(steps=20, guidance_scale=1.0)
MILD = Setting(steps=20, guidance_schedule="constant", guidance_scale=1.5)
KICK_OFF = (UNGUIDED, MILD)
"""Guidance weights that are equal at all stages: a stage-wise weight would mean something else in each cascade."""

SCALES = (1.5, 2.0, 2.4, 3.0)
NO_GUIDANCE = Setting(steps=10, guidance_scale=1.0)
STAGEWISE = tuple(Setting(steps=10, guidance_scale=scale) for scale in SCALES)
CONSTANT = tuple(Setting(steps=10, guidance_schedule="constant", guidance_scale=scale) for scale in SCALES)

EULER = tuple(Setting(steps=steps) for steps in (2, 5, 10, 20, 30))
DOPRI5 = tuple(Setting(solver="dopri5", rtol=rtol) for rtol in (1e-3, 1e-1))
TRUTH = Setting(solver="dopri5", rtol=1e-5)
"""So close to the solution that another solver's distance from it is that solver's own error."""

PLAN: Mapping[int, tuple[Setting, ...]] = {
    1: KICK_OFF,
    2: KICK_OFF,
    FULL: tuple(dict.fromkeys((*EULER, *KICK_OFF, NO_GUIDANCE, *STAGEWISE, *CONSTANT, *DOPRI5))),
}
"""Settings by the number of stages."""


def has_truth(setting: Setting) -> bool:
    """Return whether a setting differs from :data:`TRUTH` only in the solver, its steps and its tolerance."""
    return replace(setting, solver=TRUTH.solver, steps=TRUTH.steps, rtol=TRUTH.rtol) == TRUTH


def stage_tokens(config: TrainConfig) -> list[int]:
    """Return the tokens of an image at each stage."""
    stages = config.scheduler.num_stages
    return [(config.resolution // 2 ** (stages - 1 - s) // config.model.patch_size) ** 2 for s in range(stages)]


def training_config(recipe: str, stages: int, seed: int, steps: int) -> TrainConfig:
    """Return the recipe for training one cascade.

    Args:
        recipe: path or name of the recipe that provides everything else.
        stages: number of stages of the cascade.
        seed: seed of all random draws.
        steps: optimizer steps.
    """
    same = [f"scheduler.num_stages={stages}", f"seed={seed}", f"steps={steps}", "log_every=20", "eval_every=700"]
    tokens = stage_tokens(load_config(recipe, same))
    return load_config(recipe, [*same, f"batch_size={max(stages, round(TOKENS * stages / sum(tokens)))}"])


def tokens_seen(config: TrainConfig) -> int:
    """Return the tokens seen in a whole training, in which images take the stages in turn."""
    tokens = stage_tokens(config)
    whole, rest = divmod(config.steps * config.batch_size, len(tokens))
    return whole * sum(tokens) + sum(tokens[:rest])
