"""The published code's sampler, served from its own process, see :mod:`.public_code`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from pixelflow_benchmarks.suites.stages.problem import ATTEMPTS, StageProblem
from pixelflow_engine.solvers import Tolerance

from .published import import_published, published_model, rotary_places
from .random_models import SHAPES, random_weights


class Enough(Exception):  # noqa: N818
    """Raised to stop an integration after its allowed number of attempts.

    Args:
        x: the state that the solver asked to evaluate next.
    """

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x


class Counted:
    """A velocity field with a limit on evaluations, for a solver that has no limit of its own.

    Raises:
        Enough: at the first evaluation beyond the limit.
    """

    def __init__(self, field: Callable[..., torch.Tensor], most: int) -> None:
        self.field, self.most, self.evaluations = field, most, 0

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the velocity."""
        if self.evaluations == self.most:
            raise Enough(x)
        self.evaluations += 1
        return self.field(x, *arguments, **options)


class SamplingServer:
    """The published model with random weights, run on request: a stage, or whole images.

    Args:
        path: the checkout.
        shape: a name of :data:`pixelflow_benchmarks.opponents.random_models.SHAPES`.
        dtype: bfloat16 by autocast, as the published sampler is run, or float32.
        device: where the model runs.
    """

    def __init__(self, path: Path, shape: str, dtype: str, device: str) -> None:
        published = import_published(path, "pixelflow.model")
        scheduling = importlib.import_module("pixelflow.scheduling_pixelflow")
        self.config, self.dtype, self.device = SHAPES[shape], getattr(torch, dtype), torch.device(device)
        self.model = published_model(published, self.config).to(self.device).eval()
        self.model.load_state_dict(random_weights(self.config, self.device, self.dtype), strict=True)
        scheduler = self.config.scheduler
        self.scheduler = scheduling.PixelFlowScheduler(scheduler.num_train_timesteps, num_stages=scheduler.num_stages)

    def hello(self) -> dict[str, Any]:
        """Answer that the process is ready."""
        return {}

    def prepare(self, stage: int, batch: int, steps: int, solver: Literal["euler", "dopri5"]) -> dict[str, Any]:
        """Set up everything that is not part of a step, and reset the peak of memory."""
        self.problem = StageProblem(
            config=self.config,
            stage=stage,
            batch=batch,
            steps=steps,
            solver=solver,
            dtype=self.dtype,
            device=self.device,
        )
        side = self.problem.shape[3] // self.config.model.patch_size
        labels = self.problem.labels()
        self.labels = torch.cat([torch.full_like(labels, self.config.model.num_classes), labels])
        self.size = torch.tensor([side], dtype=torch.int32, device=self.device)
        self.places = rotary_places(side, self.config.model.attention_head_dim)
        self.x = self.problem.start()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return {}

    @torch.no_grad()
    def run(self, keep: str | None = None) -> dict[str, Any]:
        """Run all steps of the stage and save its states to the file ``keep``.

        Returns:
            The number of steps (attempts, for Dopri5), of evaluations, and the peak memory in bytes on a GPU.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            states, evaluations = self._euler() if self.problem.solver == "euler" else self._dopri5()
        peak = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        if keep is not None:
            torch.save({name: x.float().cpu() for name, x in states.items()}, keep)
        steps = evaluations if self.problem.solver == "euler" else (evaluations - 2) // 6
        return {"steps": steps, "evaluations": evaluations, "peak_bytes": peak}

    def _euler(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return the state after the first step and after the last, and the number of steps."""
        steps, x, first = self.problem.steps, self.x, self.x
        self.scheduler.set_timesteps(steps, self.problem.stage, device=self.device, shift=1.0)
        for step, moment in enumerate(self.scheduler.Timesteps):
            both = torch.cat([x, x])
            times = moment.expand(len(both)).to(both.dtype)
            out = self.model(
                both, timestep=times, class_labels=self.labels, latent_size=self.size, pos_embed=self.places
            )
            null, conditional = out.chunk(2)
            x = self.scheduler.step(model_output=null + self.problem.weight * (conditional - null), sample=x)
            first = x if step == 0 else first
        return {"first": first, "end": x}, steps

    def _dopri5(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return the final state from the published wrapper of torchdiffeq, or the one evaluated after all attempts."""
        solving = importlib.import_module("pixelflow.solver_ode_wrapper")
        tolerance = Tolerance()
        solver = solving.ODE(
            t0=0,
            t1=1,
            sampler_type="dopri5",
            num_steps=self.problem.steps,
            atol=tolerance.atol,
            rtol=tolerance.rtol,
        )
        field = Counted(self.model.c2i_forward_cfg_torchdiffq, most=2 + 6 * ATTEMPTS)
        window = self.scheduler.Timesteps_per_stage[self.problem.stage]
        try:
            end = solver.sample(
                torch.cat([self.x, self.x]),
                field,
                window[0].item(),
                window[-1].item(),
                class_labels=self.labels,
                cfg_scale=self.problem.weight,
                latent_size=self.size,
                pos_embed=self.places,
            )[-1]
        except Enough as stopped:
            end = stopped.x
        return {"end": end[: len(self.x)]}, field.evaluations

    @torch.no_grad()
    def images(self, labels: list[int], steps: int, guidance: float, seed: int, keep: str | None) -> dict[str, Any]:
        """Generate whole images by the published pipeline, saved to the file ``keep`` as ``[B, c, H, W]`` in [0, 1]."""
        pipelines = importlib.import_module("pixelflow.pipeline_pixelflow")
        pipeline = pipelines.PixelFlowPipeline(self.scheduler, self.model)
        torch.manual_seed(seed)
        side = self.config.resolution
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            found = pipeline(labels, side, side, steps, guidance, device=self.device)
        if keep is not None:
            torch.save(torch.from_numpy(found).permute(0, 3, 1, 2).contiguous(), keep)
        return {}
