"""Training recipes: typed, read from YAML, with ``key=value`` overrides; unknown keys are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from pixelflow_engine.checkpoint.text import StrictLoader
from pixelflow_engine.config import MAX_STEPS, ModelConfig, PixelFlowConfig, SchedulerConfig, from_mapping
from pixelflow_engine.errors import ConfigError
from pixelflow_kernels.cascade.law import MAX_STAGES

PILLOW_PIXELS = 89_478_485  # above this, Pillow warns of a decompression bomb


def _check(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: got {value}, expected a finite number")
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"a number from {low} to {high}"
        raise ConfigError(f"{name}: got {value}, expected {limit}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random augmentation of training images. Affine parameters are drawn uniformly from minus to plus their limit.

    Attributes:
        rotate: limit of the rotation, in degrees.
        scale: limit of the change in size, as a fraction of the size.
        shift: limit of the translation along each axis, as a fraction of the side.
        flip: whether images are mirrored left to right with probability 1/2.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        _check("data.augment.rotate", self.rotate, 0, 180)
        _check("data.augment.scale", self.scale, 0, 0.9)
        _check("data.augment.shift", self.shift, 0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The source and preparation of images.

    Attributes:
        name: ``digits``, scikit-learn's 1,797 handwritten digits; ``folder``, a tree with one folder per class;
            ``shards``, tar files as WebDataset writes them.
        path: location of the folders or shards.
        held_out: number of images kept out of training.
        split_seed: seed that selects the held-out images.
        crop: how an image from a file becomes a square: ``random`` cuts it out at a random place at 1.125 times the
            size; ``center`` cuts it out of the middle.
        max_pixels: an image file with more pixels is skipped without being decoded; at most what Pillow allows.
        max_skipped: number of different unreadable files that may be skipped; one more stops the run.
        workers: processes per rank that read files ahead; 0 reads them between the steps.
        changed: what to do if files were added, changed or removed before a run resumes: ``refuse`` it, or ``accept``
            the files. Which images are held out depends on the number of images: after a change of that number, most of
            the new held-out images have been trained on.
        augment: see :class:`AugmentConfig`.
    """

    name: Literal["digits", "folder", "shards"] = "digits"
    path: str | None = None
    held_out: int = 360
    split_seed: int = 0
    crop: Literal["random", "center"] = "random"
    max_pixels: int = PILLOW_PIXELS
    max_skipped: int = 100
    workers: int = 0
    changed: Literal["refuse", "accept"] = "refuse"
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.name == "digits" and self.path is not None:
            raise ConfigError(f"data.path: got {self.path!r}, expected none for data.name=digits")
        _check("data.split_seed", self.split_seed, -(2**63), 2**64 - 1)  # the range of torch.Generator.manual_seed
        _check("data.max_pixels", self.max_pixels, 1, PILLOW_PIXELS)
        _check("data.max_skipped", self.max_skipped, 0, math.inf)
        _check("data.workers", self.workers, 0, 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        weight_decay, betas: of AdamW.
        warmup_steps: number of steps of linear warm-up from zero.
        schedule: after the warm-up: ``constant``, or ``cosine``, a half cosine that falls to zero over the remaining
            steps.
        max_grad_norm: gradients are clipped to this total norm.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check("optimizer.lr", self.lr, 0, math.inf)
        _check("optimizer.weight_decay", self.weight_decay, 0, math.inf)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas: got {list(self.betas)}, expected two numbers from 0 to below 1")
        _check("optimizer.warmup_steps", self.warmup_steps, 0, math.inf)
        if not 0 < self.max_grad_norm < math.inf:
            raise ConfigError(f"optimizer.max_grad_norm: got {self.max_grad_norm}, expected a finite number above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save checkpoints and which to keep.

    The initial state, the last step and the step after which a run is told to stop are saved as well.

    Attributes:
        every: steps between checkpoints.
        keep: number of most recent checkpoints to keep.
        keep_every: checkpoints whose step is a multiple of this are never deleted; None for no such checkpoints.
    """

    every: int = 500
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        _check("checkpoint.every", self.every, 1, math.inf)
        _check("checkpoint.keep", self.keep, 1, math.inf)
        if self.keep_every is not None:
            _check("checkpoint.keep_every", self.keep_every, 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Tolerance of non-finite steps, and the threshold of loss spikes.

    Attributes:
        max_skipped: number of consecutive steps that may be skipped because the loss or the gradient is not finite; one
            more stops the run.
        spike_factor: a stage's loss above this many times its running median is logged as a spike.
    """

    max_skipped: int = 10
    spike_factor: float = 3.0

    def __post_init__(self) -> None:
        _check("guard.max_skipped", self.max_skipped, 0, math.inf)
        _check("guard.spike_factor", self.spike_factor, 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """Sample sheets drawn from the averaged model, one label per column. They change no number of the run.

    Attributes:
        every: steps between sheets, with one more at the end; None for no sheets.
        labels: one label per column, the null class allowed; None for up to ten evenly spaced classes. Must be None for
            a model without classes.
        rows: images per label. Each image has its own seed, which is the same in every sheet.
        steps: number of Euler steps, one for all stages or one per stage.
        guidance_scale: largest guidance weight; not used for a model without classes.
        seed: seed of the first image; the following images take consecutive seeds.
    """

    every: int | None = None
    labels: tuple[int, ...] | None = None
    rows: int = 4
    steps: tuple[int, ...] = (10,)
    guidance_scale: float = 2.4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every is not None:
            _check("samples.every", self.every, 1, math.inf)
        _check("samples.rows", self.rows, 1, 1024)
        for steps in self.steps:
            _check("samples.steps", steps, 1, math.inf)
        _check("samples.guidance_scale", self.guidance_scale, -math.inf, math.inf)
        _check("samples.seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """How steps are computed. This affects their speed, memory and rounding, not what is learned.

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is a GPU if there is one.
        backend: implementation, as for sampling: ``torch``, ``triton``, ``flash``; ``auto`` is ``triton`` on a GPU.
        dtype: of velocities and their gradients. Weights, moments and averages are float32.
        compile: whether to compile the blocks.
        graphs: whether to replay whole steps from CUDA graphs, one for each shape that a step may have.
        recompute: what the backward pass recomputes to save memory: ``nothing``; ``pointwise``, everything but matrix
            products and attention; ``blocks``, everything inside a block.
        max_tokens: token budget of a pack. A step with more tokens is computed in parts whose gradients are
            accumulated. None for a single pack of any size.
        shard: number of ranks that share one copy of weights, moments and averages. 1: every rank has its own copy
            (data parallel). The number of ranks: there is one copy (fully sharded). In between: each group of this size
            has one copy.
    """

    device: str = "auto"
    backend: Literal["auto", "torch", "triton", "flash"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    graphs: bool = False
    recompute: Literal["nothing", "pointwise", "blocks"] = "nothing"
    max_tokens: int | None = None
    shard: int = 1

    def __post_init__(self) -> None:
        _check("compute.shard", self.shard, 1, math.inf)
        if self.compile and self.recompute == "pointwise":
            raise ConfigError("compute.recompute: got pointwise, expected another: a compiled block chooses by itself")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training recipe: everything that determines a run's numbers, and what is logged, kept and tolerated.

    Attributes:
        model, scheduler, resolution: the model, as in a checkpoint.
        data, optimizer: see :class:`DataConfig` and :class:`OptimizerConfig`.
        steps: number of optimizer steps.
        batch_size: images per step, distributed evenly over the stages.
        ema_decay: decay of the averaged weights, which are the result: the limit to which ``(1 + step) / (10 + step)``
            rises.
        label_drop: probability that a label is replaced by the null class.
        seed: seed of all random draws of training; ``data.split_seed`` and ``samples.seed`` are separate.
        init_from: a checkpoint of the same model in any form, or a run directory, to take the initial weights from;
            None for fresh weights. Read once: a resumed run does not need it.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations on held-out images, which also write the averaged model.
        loggers: further receivers of the log's lines: ``tensorboard`` writes event files into ``RUN/tensorboard``.
        checkpoint, guard, samples, compute: see the class of each.
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
    init_from: str | None = None
    log_every: int = 20
    eval_every: int = 500
    loggers: tuple[Literal["tensorboard"], ...] = ()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every"):
            _check(name, getattr(self, name), 1, math.inf)
        _check("batch_size", self.batch_size, self.scheduler.num_stages, math.inf)
        _check("seed", self.seed, 0, 2**63 - 1)
        _check("ema_decay", self.ema_decay, 0, 1)
        _check("label_drop", self.label_drop, 0, 1)
        if self.model.dropout != 0.0:
            raise ConfigError(f"model.dropout: got {self.model.dropout}, expected 0 (packed attention has no dropout)")
        if self.model.cross_attention_dim is not None:
            raise ConfigError("model.cross_attention_dim: training of text-conditional models is not supported yet")
        most, largest = self.compute.max_tokens, (self.resolution // self.model.patch_size) ** 2
        if most is not None and most < largest:
            raise ConfigError(f"compute.max_tokens: got {most}, expected at least {largest}: the largest image")
        if self.data.name != "digits" and self.model.in_channels not in (1, 3):
            raise ConfigError(f"model.in_channels: got {self.model.in_channels}, expected 1 or 3 for images from files")
        self._check_samples()
        if self.scheduler.num_stages > MAX_STAGES:
            raise ConfigError(
                f"scheduler.num_stages: got {self.scheduler.num_stages}, expected at most {MAX_STAGES} for training"
            )
        halvings = 2**self.scheduler.num_stages
        if self.network.resolution % halvings:
            raise ConfigError(
                f"resolution: got {self.resolution}, expected a multiple of {halvings}: the first of "
                f"{self.scheduler.num_stages} stages is trained from a still smaller image"
            )

    def _check_samples(self) -> None:
        labels, classes, stages = self.samples.labels, self.model.num_classes, self.scheduler.num_stages
        if labels is not None and not classes:
            raise ConfigError(f"samples.labels: got {list(labels)}, expected none for a model without classes")
        if labels is not None and not (labels and all(0 <= label <= classes for label in labels)):
            raise ConfigError(f"samples.labels: got {list(labels)}, expected numbers from 0 to {classes}, one or more")
        if len(self.samples.steps) not in (1, stages):
            raise ConfigError(f"samples.steps: got {len(self.samples.steps)} numbers, expected one, or {stages}")
        if max(self.samples.steps) > MAX_STEPS:
            raise ConfigError(f"samples.steps: got {max(self.samples.steps)}, expected at most {MAX_STEPS}")
        if self.samples.every is not None and (channels := self.model.out_channels) not in (1, 3):
            raise ConfigError(
                f"samples.every: got {self.samples.every}, expected null for images of {channels} channels"
            )

    @property
    def network(self) -> PixelFlowConfig:
        """The part of the recipe that describes the model, as a checkpoint stores it."""
        return PixelFlowConfig(model=self.model, scheduler=self.scheduler, resolution=self.resolution)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as nested dicts."""
        return asdict(self)


def recipe_path(name: str) -> Path:
    """Return the path of a recipe, given as a file or by the name of one that ships with the package.

    Raises:
        ConfigError: neither exists; the message lists the known recipes.
    """
    if Path(name).is_file():
        return Path(name)
    folder = resources.files("pixelflow_training") / "recipes"
    known = sorted(Path(str(entry)).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name in known:
        return Path(str(folder / f"{name}.yaml"))
    raise ConfigError(f"config: {name!r} is neither a file nor a recipe; recipes are {', '.join(known)}")


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe from YAML and apply overrides.

    Args:
        name: path of a YAML file, or the name of a recipe that ships with the package.
        overrides: ``key=value`` with dotted keys; values are YAML.

    Raises:
        ConfigError: the file or an override is invalid; the message names the key, the value and what was expected.
    """
    path = recipe_path(name)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)  # no keys twice, no anchors
    except (yaml.YAMLError, ValueError) as error:  # a date with a month 13 is a ValueError
        raise ConfigError(f"{path}: not YAML, or not plain YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}, expected a mapping")
    for override in overrides:
        key, equals, value = override.partition("=")
        *parents, last = key.split(".")
        if not equals or not all([*parents, last]):
            raise ConfigError(f"override: got {override!r}, expected key=value")
        target = data
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override: got {override!r}, but {parent} is not a group of keys")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"override: got {override!r}, whose value is not YAML") from None
    # With overrides a fault may be theirs, and the file's name would mislead.
    return from_mapping(TrainConfig, data, "recipe" if overrides else path.name)
