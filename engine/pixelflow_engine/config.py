"""Typed configuration of a model, as stored in ``config.json``, and the parameter shapes that follow from it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import ConfigError

SINUSOID_CHANNELS = 256

T = TypeVar("T")


def _check(condition: bool, where: str, value: object, expected: str) -> None:
    if not condition:
        try:
            shown = repr(value)
        except ValueError:  # Python refuses to format integers of thousands of digits
            shown = f"a {type(value).__name__} too long to print"
        raise ConfigError(f"{where}: got {shown}, expected {expected}")


def _check_range(where: str, value: object, low: int, high: int) -> None:
    _check(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        where,
        value,
        f"an integer from {low} to {high}",
    )


MAX_STEPS = 1_000_000
MAX_SIDE = 65536
"""Beyond these, lists of times and offsets of pixels do not fit anywhere: a slip, which should say so at the door."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the transformer, with the published field names.

    Attributes:
        num_attention_heads: H.
        attention_head_dim: D, a multiple of 4 (two axes, pairs of channels); the width is ``C = H * D``.
        depth: number of blocks.
        in_channels, out_channels: image channels; equal, because the velocity has the image's shape.
        patch_size: p, side of a token in pixels.
        num_classes: number of classes without the null class; 0 for a model without a class table.
        attention_bias: whether the attention projections have a bias.
        cross_attention_dim: width of the text states; None without cross-attention.
        dropout: attention dropout in training; ignored when sampling, and training supports only 0.
    """

    num_attention_heads: int
    attention_head_dim: int
    depth: int
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int = 4
    num_classes: int = 0
    attention_bias: bool = True
    cross_attention_dim: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_range("model.num_attention_heads", self.num_attention_heads, 1, 256)
        _check_range("model.attention_head_dim", self.attention_head_dim, 4, 512)
        _check(self.attention_head_dim % 4 == 0, "model.attention_head_dim", self.attention_head_dim, "a multiple of 4")
        _check_range("model.depth", self.depth, 1, 256)
        _check_range("model.in_channels", self.in_channels, 1, 64)
        _check(
            self.out_channels == self.in_channels, "model.out_channels", self.out_channels, "the value of in_channels"
        )
        _check_range("model.patch_size", self.patch_size, 1, 64)
        _check_range("model.num_classes", self.num_classes, 0, 1_000_000)
        _check(isinstance(self.attention_bias, bool), "model.attention_bias", self.attention_bias, "true or false")
        if self.cross_attention_dim is not None:
            _check_range("model.cross_attention_dim", self.cross_attention_dim, 1, 65536)
        _check(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "a number from 0 to below 1")

    @property
    def width(self) -> int:
        """``C = H * D``."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Shape of the cascade.

    Attributes:
        num_train_timesteps: K, number of training times per stage.
        num_stages: S, number of resolutions.
    """

    num_train_timesteps: int = 1000
    num_stages: int = 4

    def __post_init__(self) -> None:
        _check_range("scheduler.num_train_timesteps", self.num_train_timesteps, 2, 1_000_000)
        _check_range("scheduler.num_stages", self.num_stages, 1, 12)


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelFlowConfig:
    """Everything about a model except its weights.

    Attributes:
        model: shape of the transformer.
        scheduler: shape of the cascade.
        resolution: side in pixels of the square training images; the default size of samples.
    """

    model: ModelConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    resolution: int = 256

    def __post_init__(self) -> None:
        _check_range("resolution", self.resolution, 1, 65536)
        check_size("resolution", self.resolution, self)

    @property
    def size_divisor(self) -> int:
        """Heights and widths must be multiples of this, so that the smallest stage consists of whole patches."""
        return int(self.model.patch_size * 2 ** (self.scheduler.num_stages - 1))

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> PixelFlowConfig:
        """Validate and convert plain data.

        Raises:
            ConfigError: a key is unknown or missing, or a value is invalid; the message names the key, the value and
                what was expected.
        """
        return from_mapping(cls, data, "config")


def check_size(name: str, value: object, config: PixelFlowConfig) -> int:
    """Validate a height or width in pixels: it must be a multiple of :attr:`PixelFlowConfig.size_divisor`."""
    divisor = config.size_divisor
    _check(
        isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % divisor == 0,
        name,
        value,
        f"a positive multiple of {divisor}: patch size {config.model.patch_size}, {config.scheduler.num_stages} stages",
    )
    return typing.cast(int, value)


def from_mapping(cls: type[T], data: object, where: str) -> T:
    """Build a config dataclass from plain data; values are type-checked, unknown and missing keys are errors.

    Args:
        cls: a dataclass whose fields are bool, int, float, str, literals, tuples of these, optionals of these, or such
            dataclasses.
        data: nested mappings as read from a YAML or JSON file.
        where: the name of ``data`` in error messages.

    Raises:
        ConfigError: the data is invalid; the message names the key, the value and what was expected.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: got {type(data).__name__}, expected a mapping")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in data if key not in fields)
    if unknown:
        raise ConfigError(f"{where}: unknown keys {', '.join(unknown)}; known keys are {', '.join(fields)}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in data
    ]
    if required:
        raise ConfigError(f"{where}: missing keys {', '.join(required)}")
    hints = typing.get_type_hints(cls)
    return cls(**{str(key): _convert(value, hints[key], f"{where}.{key}") for key, value in data.items()})


def _convert(value: object, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is typing.Literal:
        _check(value in arguments, where, value, "one of " + ", ".join(map(str, arguments)))
        return value
    if origin is tuple:
        alone = isinstance(value, (str, int, float))
        _check(isinstance(value, (list, tuple)), where, value, f"a list, such as [{value}]" if alone else "a list")
        return tuple(_convert(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(typing.cast(list[object], value)))
    if hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
            try:
                value = float(value)
            except ValueError:
                _check(False, where, value, "a number")
        _check(isinstance(value, (int, float)) and not isinstance(value, bool), where, value, "a number")
        try:
            number = float(typing.cast(float, value))
        except OverflowError:
            number = math.inf
        _check(math.isfinite(number), where, value, "a finite number")
        return number
    if hint is int:
        _check(isinstance(value, int) and not isinstance(value, bool), where, value, "an integer")
        return value
    _check(isinstance(value, hint), where, value, f"a {hint.__name__}")
    return value


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's parameters, in the published order."""
    C, p = model.width, model.patch_size
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out_features: int, in_features: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if bias:
            shapes[f"{name}.bias"] = (out_features,)

    def attention(name: str, context_width: int) -> None:
        linear(f"{name}.q_proj", C, C, model.attention_bias)
        linear(f"{name}.k_proj", C, context_width, model.attention_bias)
        linear(f"{name}.v_proj", C, context_width, model.attention_bias)
        linear(f"{name}.o_proj", C, C, model.attention_bias)
        shapes[f"{name}.q_norm.weight"] = (C,)
        shapes[f"{name}.k_norm.weight"] = (C,)

    shapes["patch_embed.proj.weight"] = (C, model.in_channels, p, p)
    shapes["patch_embed.proj.bias"] = (C,)
    for embedder in ("timestep_embedder", "latent_size_embedder"):
        linear(f"{embedder}.linear_1", C, SINUSOID_CHANNELS)
        linear(f"{embedder}.linear_2", C, C)
    if model.num_classes > 0:
        shapes["class_embedder.embedding_table.weight"] = (model.num_classes + 1, C)
    for i in range(model.depth):
        block = f"transformer_blocks.{i}"
        linear(f"{block}.norm1.linear", 6 * C, C)
        attention(f"{block}.attn1", C)
        if model.cross_attention_dim is not None:
            shapes[f"{block}.norm2.weight"] = (C,)
            attention(f"{block}.attn2", model.cross_attention_dim)
        shapes[f"{block}.norm3.weight"] = (C,)
        linear(f"{block}.mlp.fc1", 4 * C, C)
        linear(f"{block}.mlp.fc2", C, 4 * C)
    linear("proj_out_1", 2 * C, C)
    linear("proj_out_2", p * p * model.out_channels, C)
    return shapes
