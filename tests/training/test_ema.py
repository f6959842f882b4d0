"""The averaged model: its recurrence in closed form, and that it neither disturbs nor shares the model it follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixelflow_training.ema import EMA
from support.reference_models import seeded


class Follower:
    """A model whose parameters are set to given numbers before each update."""

    def __init__(self, decay: float, start: float) -> None:
        self.model = nn.Linear(3, 2, dtype=torch.float64)
        self.put(start)
        self.ema = EMA(self.model, decay)

    def put(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

    def follow(self, value: float) -> None:
        self.put(value)
        self.ema.update(self.model)

    def value(self) -> float:
        """Of every parameter of the average."""
        (value,) = {v for parameter in self.ema.model.parameters() for v in parameter.flatten().tolist()}
        return float(value)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.9, 0.9999, 1.0])
def test_the_average_follows_its_recurrence(decay: float) -> None:
    values = torch.randn(40, generator=seeded(1), dtype=torch.float64).tolist()
    follower = Follower(decay, values[0])
    expected = values[0]
    for step, value in enumerate(values[1:]):
        follower.follow(value)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * value
        # Each update rounds thrice; errors do not grow, as the weights are between 0 and 1.
        assert follower.value() == pytest.approx(expected, abs=40 * 3 * 2.0**-52)


def test_the_first_updates_forget_the_start() -> None:
    follower = Follower(0.9999, 1.0)
    for step in range(5):
        follower.follow(0.0)
        left = 1.0
        for s in range(step + 1):
            left *= (1 + s) / (10 + s)
        assert follower.value() == pytest.approx(left, rel=1e-14)


def test_no_decay_is_the_model_itself() -> None:
    follower = Follower(0.0, 1.0)
    follower.follow(0.1)
    assert follower.value() == 0.1


def test_a_model_that_stands_still_stays() -> None:
    follower = Follower(0.9, 0.1)
    for _ in range(30):
        follower.follow(0.1)
    assert follower.value() == 0.1


def test_every_parameter_is_averaged_on_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    ema = EMA(model, 0.5)
    start = [p.detach().clone() for p in model.parameters()]
    draws = seeded(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws))
    ema.update(model)
    for before, now, averaged in zip(start, model.parameters(), ema.model.parameters(), strict=True):
        torch.testing.assert_close(averaged, before + 0.9 * (now.detach() - before), rtol=0, atol=1e-6)


def test_the_followed_model_is_not_touched() -> None:
    model = nn.Linear(3, 2)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = EMA(model, 0.9)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    ema.update(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.data_ptr() != dict(ema.model.state_dict())[name].data_ptr()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in ema.model.parameters())
