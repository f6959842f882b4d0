"""Configurations from plain data: typed, bounded, with what is wrong named."""

from typing import Any

import pytest

from pixelflow_engine import ConfigError, ModelConfig, PixelFlowConfig, SchedulerConfig

GOOD: dict[str, Any] = {
    "model": {"num_attention_heads": 2, "attention_head_dim": 8, "depth": 3, "num_classes": 4},
    "scheduler": {"num_stages": 2},
    "resolution": 32,
}


def changed(path: str, value: object) -> dict[str, Any]:
    """GOOD with one value replaced or added."""
    data: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in GOOD.items()}
    *groups, key = path.split(".")
    target = data
    for group in groups:
        target = target[group]
    target[key] = value
    return data


def test_plain_data_and_back() -> None:
    config = PixelFlowConfig.from_dict(GOOD)
    assert config.model == ModelConfig(num_attention_heads=2, attention_head_dim=8, depth=3, num_classes=4)
    assert config.scheduler == SchedulerConfig(num_train_timesteps=1000, num_stages=2)
    assert config.model.width == 16
    assert config.size_divisor == 8
    assert PixelFlowConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.depth", -1, r"model.depth: got -1, expected an integer from 1 to 256"),
        ("model.depth", 10**9, r"model.depth: got 1000000000, expected"),
        pytest.param("model.depth", 10**5000, r"model.depth: got a int too long to print, expected", id="huge"),
        ("model.depth", True, r"depth: got True, expected an integer"),
        ("model.depth", "3", r"depth: got '3', expected an integer"),
        ("model.attention_head_dim", 6, r"head_dim: got 6, expected a multiple of 4"),
        ("model.out_channels", 4, r"out_channels: got 4, expected the value of in_channels"),
        ("model.dropout", 1.0, r"dropout: got 1.0, expected a number from 0 to below 1"),
        ("model.dropout", float("nan"), r"dropout: got nan, expected a finite number"),
        ("model.dropout", 10**400, r"dropout: got 10+, expected a finite number"),
        ("model.attention_bias", 1, r"attention_bias: got 1, expected a bool"),
        ("model.cross_attention_dim", 0, r"cross_attention_dim: got 0, expected an integer from 1"),
        ("model.heads", 2, r"config.model: unknown keys heads; known keys are num_attention_heads"),
        ("scheduler.num_stages", 0, r"num_stages: got 0, expected an integer from 1 to 12"),
        ("scheduler", 3, r"config.scheduler: got int, expected a mapping"),
        ("resolution", 36, r"resolution: got 36, expected a positive multiple of 8: patch size 4, 2 stages"),
        ("resolution", 0, r"resolution: got 0, expected"),
        ("extra", 1, r"config: unknown keys extra"),
    ],
)
def test_bad_values_are_named(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PixelFlowConfig.from_dict(changed(path, value))


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"config.model: missing keys attention_head_dim, depth"):
        PixelFlowConfig.from_dict({"model": {"num_attention_heads": 2}})
    with pytest.raises(ConfigError, match="config: got list, expected a mapping"):
        PixelFlowConfig.from_dict([])
