"""Training runs in this process: the project's own step in its variants, and a plain loop of the published shape.

All of them train the same weights in turns, which saves the memory of a model for each; speed does not depend on
values. Where the two loops differ, in batches, optimizer and averages, each has its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pixelflow_engine.ranges import NOTHING, ranges_told
from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_training import data, loop
from pixelflow_training.ahead import Ahead
from pixelflow_training.collate import Batch
from pixelflow_training.step import TrainStep

from .phases import PHASES, UNTIMED, Phases
from .problem import PROBE, Gradients, Stepped, TrainingProblem
from .public_shape import ListedBatch, Loader, image_losses, listed, packed_velocities, update_ema


class LocalRun:
    """Base class of the runs in this process, see :class:`~.problem.TrainingRun`."""

    def __init__(self, problem: TrainingProblem, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self.problem, self.recipe = problem, problem.recipe
        self.data = problem.images()
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer
        self.position = 0
        self.reported: tuple[Tensor, Tensor] | None = None

    def step(self, phases: Phases) -> None:
        """See :class:`~.problem.TrainingRun`."""
        raise NotImplementedError

    def averages(self) -> Mapping[str, Tensor]:
        """Return the averaged weights by name."""
        raise NotImplementedError

    def last(self) -> Stepped:
        """See :class:`~.problem.TrainingRun`."""
        assert self.reported is not None, "no step was done yet"
        loss, norm = self.reported
        return Stepped(loss.item(), norm.item())

    def probe(self) -> tuple[Tensor, Tensor]:
        """See :class:`~.problem.TrainingRun`."""
        return self.parameters[PROBE].detach().cpu().clone(), self.averages()[PROBE].detach().cpu().clone()

    def peak_bytes(self) -> int | None:
        """See :class:`~.problem.TrainingRun`; the memory of other runs does not count."""
        device = self.problem.device
        if device.type != "cuda":
            return None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.step(UNTIMED)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + self.held()

    def held(self) -> int:
        """Return the bytes of weights, averages and moments."""
        moments = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        return _bytes(self.parameters.values()) + _bytes(self.averages().values()) + _bytes(moments)

    def close(self) -> None:
        """See :class:`~.problem.TrainingRun`."""
        self.optimizer.zero_grad(set_to_none=True)

    def taken(self, losses: Tensor) -> Gradients:
        """Take the gradients from the parameters, whose ``grad`` is reset, and return them with the losses."""
        gradients = {name: _gradient(parameter) for name, parameter in self.parameters.items()}
        self.optimizer.zero_grad(set_to_none=True)
        return Gradients(losses.detach().float().cpu(), gradients)


class EngineRun(LocalRun):
    """The step of ``pixelflow train``, see :class:`~.problem.TrainingRun`.

    Args:
        problem: the training problem.
        train_step: step of the variant.
    """

    def __init__(self, problem: TrainingProblem, train_step: TrainStep) -> None:
        super().__init__(problem, train_step.state.model, train_step.state.optimizer)
        self.train_step, self.model = train_step, train_step.model
        config = train_step.config
        self.loader = data.Loader(self.data, config, first_step=0, device=problem.device)
        # Not up to the recipe's last step: there is always a next one, which a step has to make.
        self.ahead = Ahead(lambda step: loop.training_batch(config, self.loader, step), sys.maxsize)

    def step(self, phases: Phases) -> None:
        """See :class:`~.problem.TrainingRun`. As in training, the next batch is made while the device computes."""
        batch = self._batch()
        with ranges_told(lambda name: phases(name) if name in PHASES else NOTHING) if phases.timed else NOTHING:
            begun = self.train_step.begin(batch, self.recipe.optimizer.lr)
            with phases("batch"):
                self.ahead.prepare(self.position)
            done = self.train_step.finish(begun)
        self.reported = torch.tensor(done.loss), torch.tensor(done.norm)

    def draw(self) -> Batch:
        """See :class:`~.problem.TrainingRun`."""
        return self._batch().to(torch.device("cpu"))

    def gradients(self, batch: Batch) -> Gradients:
        """See :class:`~.problem.TrainingRun`."""
        self.train_step.update.follow()  # the weights may have been trained by another run, or reset
        return self.taken(self._losses(batch.to(self.problem.device)))

    def averages(self) -> Mapping[str, Tensor]:
        """See :class:`LocalRun`."""
        return dict(self.train_step.state.ema.model.named_parameters())

    def close(self) -> None:
        """See :class:`~.problem.TrainingRun`."""
        super().close()
        if self.train_step.graphs is not None:
            self.train_step.graphs.close()

    def peak_bytes(self) -> int | None:
        """See :class:`~.problem.TrainingRun`; None with graphs, whose memory is not allocated and freed by a step."""
        return None if self.train_step.graphs is not None else super().peak_bytes()

    def held(self) -> int:
        """See :class:`LocalRun`."""
        copied = self.model is not self.train_step.state.model
        return super().held() + (_bytes(self.model.parameters()) if copied else 0)

    def _batch(self) -> Batch:
        """Return the next batch, made on the device from images that are moved there as bytes."""
        self.position += 1
        return self.ahead.take(self.position - 1)

    def _losses(self, batch: Batch) -> Tensor:
        """Compute the loss of each image and leave the gradients in the parameters."""
        return self.train_step.backward([batch])


class ReferenceRun(LocalRun):
    """The reference model in a plain loop of the published shape, see :class:`~.problem.TrainingRun`.

    Args:
        problem: the training problem.
        model: the reference model.
    """

    def __init__(self, problem: TrainingProblem, model: PixelFlowTransformer) -> None:
        settings = problem.recipe.optimizer
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        super().__init__(problem, model, optimizer)
        self.model = model
        self.ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.loader = Loader(problem, self.data)

    def step(self, phases: Phases) -> None:
        """See :class:`~.problem.TrainingRun`."""
        with phases("optimizer"):
            self.optimizer.zero_grad()
        with phases("batch"):
            batch = self._batch().to(self.problem.device)
        with phases("forward"):
            loss = torch.stack(self._losses(batch)).mean()
        with phases("backward"):
            loss.backward()
        with phases("clip"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.max_grad_norm)
        with phases("optimizer"):
            self.optimizer.step()
        with phases("ema"):
            update_ema(self.ema, self.model, self.recipe.ema_decay)
        self.reported = loss.detach(), norm

    def draw(self) -> Batch:
        """See :class:`~.problem.TrainingRun`."""
        return self._batch().as_batch(self.problem.config)

    def gradients(self, batch: Batch) -> Gradients:
        """See :class:`~.problem.TrainingRun`."""
        self.optimizer.zero_grad()
        losses = torch.stack(self._losses(listed(batch, self.problem.config).to(self.problem.device)))
        losses.mean().backward()
        return self.taken(losses)

    def averages(self) -> Mapping[str, Tensor]:
        """See :class:`LocalRun`."""
        return self.ema

    def _batch(self) -> ListedBatch:
        self.position += 1
        return self.loader.batch(self.position - 1)

    def _losses(self, batch: ListedBatch) -> list[Tensor]:
        with self.problem.autocast():
            velocities = packed_velocities(self.model, batch)
        return image_losses(velocities, batch)


def _gradient(parameter: nn.Parameter) -> Tensor:
    given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return given.to("cpu", copy=True)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
