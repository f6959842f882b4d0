"""A training recipe: typed, read from YAML, with ``key=value`` overrides and unknown keys refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from pixelflow_engine.config import ModelConfig, PixelFlowConfig, SchedulerConfig, from_mapping
from pixelflow_engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random affine changes of a training image, each drawn uniformly from minus to plus its limit.

    Attributes:
        rotate: degrees.
        scale: of the size, as a fraction.
        shift: of the position, as a fraction of the side.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return any((self.rotate, self.scale, self.shift))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where images come from.

    Attributes:
        name: ``digits``, scikit-learn's 1,797 handwritten digits.
        held_out: number of images kept out of training.
        split_seed: which ones.
        augment: see there.
    """

    name: Literal["digits"] = "digits"
    held_out: int = 360
    split_seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        weight_decay, betas: of AdamW.
        warmup_steps: steps of linear rise from zero.
        schedule: what follows: ``constant``, or ``cosine`` down to zero at the last step.
        max_grad_norm: gradients are clipped to this total norm.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that determines a run's numbers.

    Attributes:
        model, scheduler, resolution: the model, as in a checkpoint.
        data, optimizer: see there.
        steps: optimizer steps.
        batch_size: images per step, spread evenly over the stages.
        ema_decay: of the averaged weights, which are the result.
        label_drop: probability that a label is replaced by the null class.
        seed: of everything that is drawn.
        log_every: steps between lines of the log.
        eval_every: steps between losses on held-out images.
    """

    model: ModelConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    resolution: int = 256
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000
    batch_size: int = 96
    ema_decay: float = 0.9999
    label_drop: float = 0.1
    seed: int = 0
    log_every: int = 20
    eval_every: int = 500

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("log_every", 1), ("eval_every", 1), ("batch_size", self.scheduler.num_stages)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        for name in ("ema_decay", "label_drop"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a number from 0 to 1")
        if self.model.dropout != 0.0:
            raise ConfigError(f"model.dropout: got {self.model.dropout}, expected 0 (packed attention has no dropout)")
        if self.model.cross_attention_dim is not None:
            raise ConfigError("model.cross_attention_dim: training of text-conditional models is not supported yet")
        halvings = 2**self.scheduler.num_stages
        if self.network.resolution % halvings:
            raise ConfigError(
                f"resolution: got {self.resolution}, expected a multiple of {halvings}: the first of "
                f"{self.scheduler.num_stages} stages is trained from a still smaller image"
            )

    @property
    def network(self) -> PixelFlowConfig:
        """The part that a checkpoint keeps."""
        return PixelFlowConfig(model=self.model, scheduler=self.scheduler, resolution=self.resolution)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def recipe_path(name: str) -> Path:
    """The file of a path or of a recipe's name.

    Raises:
        ConfigError: neither exists; the known recipes are listed.
    """
    if Path(name).is_file():
        return Path(name)
    folder = resources.files("pixelflow_training") / "recipes"
    known = sorted(Path(str(entry)).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name in known:
        return Path(str(folder / f"{name}.yaml"))
    raise ConfigError(f"config: {name!r} is neither a file nor a recipe; recipes are {', '.join(known)}")


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe.

    Args:
        name: path of a YAML file, or the name of a recipe that ships with the package.
        overrides: ``key=value`` with dotted keys; values are YAML.

    Raises:
        ConfigError: naming the key, the value and what was expected.
    """
    path = recipe_path(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}, expected a mapping")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override: got {override!r}, expected key=value")
        *parents, last = key.split(".")
        target = data
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override: got {override!r}, but {parent} is not a group of keys")
        target[last] = yaml.safe_load(value)
    return from_mapping(TrainConfig, data, path.name)
