"""A checkout of the published code, in a process of its own: ``python -m pixelflow_benchmarks.opponents.public_code``.

It is never needed, and nothing of it is here: it is imported from where it lies, with what it imports in turn. It runs
apart because its packages would otherwise be loaded beside ours, and because it prints what it likes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from pixelflow_benchmarks.harness.tracing import fake, fake_cuda, fake_parameters, tracing
from pixelflow_benchmarks.suites.kernels.case import HEAD_DIM, HEADS, WIDTH
from pixelflow_benchmarks.suites.stages.problem import ATTEMPTS, StageProblem
from pixelflow_engine import PixelFlowConfig
from pixelflow_engine.solvers import Tolerance

from .random_models import SHAPES, random_weights


def trace(path: Path, sequences: int, side: int) -> list[dict[str, Any]]:
    """Operations of one of its blocks under bf16 autocast; the places' table comes from the CPU, as in its sampler."""
    published = import_published(path, "pixelflow.model")
    places = rotary_places(side, HEAD_DIM)
    with torch.device("meta"):
        block = published.TransformerBlock(WIDTH, HEADS, HEAD_DIM, attention_bias=True).eval()
    with fake_cuda():
        weights = fake_parameters(block, torch.float32)
        x = fake((sequences, side * side, WIDTH), torch.bfloat16)
        conditioning = fake((sequences, WIDTH), torch.bfloat16)
        table = torch.empty(places.shape, dtype=places.dtype)
        with tracing(weights, torch.bfloat16) as found:
            block(x, timestep=conditioning, rope_pos_embed=table)
    return [asdict(op) for op in found.ops]


def rotary_places(side: int, head_dim: int) -> torch.Tensor:
    """The table of cosines and sines that its sampler makes for square images."""
    embeddings = importlib.import_module("diffusers.models.embeddings")
    table = embeddings.get_2d_rotary_pos_embed(
        embed_dim=head_dim, crops_coords=((0, 0), (side, side)), grid_size=(side, side)
    )
    return torch.stack([torch.as_tensor(part) for part in table], dim=-1)


def import_published(path: Path, name: str) -> Any:
    """A module of the checkout.

    Raises:
        FileNotFoundError: there is no checkout.
    """
    if not (path / "pixelflow" / "model.py").is_file():
        raise FileNotFoundError(f"public: got {path}, expected a folder with pixelflow/model.py")
    sys.path.insert(0, str(path))
    return importlib.import_module(name)


def published_model(published: Any, config: PixelFlowConfig) -> Any:
    """Its model of that shape, as it draws it."""
    names = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "depth", "patch_size")
    fields = {name: getattr(config.model, name) for name in (*names, "attention_bias", "num_classes")}
    return published.PixelFlowModel(**fields)


# --- an opponent -------------------------------------------------------------------------------------------


class Enough(Exception):  # noqa: N818
    """An integration has had as many attempts as it is given.

    Args:
        x: the state that it asked for next.
    """

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x


class Counted:
    """A velocity field that is evaluated at most so often; its solver has no bound of its own.

    Raises:
        Enough: when it is asked once more.
    """

    def __init__(self, field: Callable[..., torch.Tensor], most: int) -> None:
        self.field, self.most, self.evaluations = field, most, 0

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """The velocity."""
        if self.evaluations == self.most:
            raise Enough(x)
        self.evaluations += 1
        return self.field(x, *arguments, **options)


class Server:
    """Its model with random weights, run on request: a stage, or whole images.

    Args:
        path: the checkout.
        shape: a name of :data:`pixelflow_benchmarks.opponents.random_models.SHAPES`.
        dtype: bfloat16 by automatic casts, as its sampler is run, or float32.
        device: where.
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
        """It is there."""
        return {}

    def prepare(self, stage: int, batch: int, steps: int, solver: Literal["euler", "dopri5"]) -> dict[str, Any]:
        """Make what does not belong to a step."""
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
        """All steps of the stage, its states to the file ``keep``; how many, and the peak of memory on a GPU."""
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
        """The first state and the last."""
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
        """The last state by its wrapper of torchdiffeq, or that which is looked at after enough attempts."""
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
        """Whole images by its pipeline; they go to the file ``keep``, ``[B, c, H, W]`` in [0, 1]."""
        pipelines = importlib.import_module("pixelflow.pipeline_pixelflow")
        pipeline = pipelines.PixelFlowPipeline(self.scheduler, self.model)
        torch.manual_seed(seed)
        side = self.config.resolution
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            found = pipeline(labels, side, side, steps, guidance, device=self.device)
        if keep is not None:
            torch.save(torch.from_numpy(found).permute(0, 3, 1, 2).contiguous(), keep)
        return {}


def serve(make: Callable[[], Any]) -> None:
    """Answer requests, a line of JSON each, until there are no more: ``do`` names a method of what ``make`` gives."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        server = make()
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(server, request.pop("do"))(**request)), file=answers, flush=True)


def main(arguments: list[str]) -> None:
    """``trace PATH SEQUENCES SIDE``: JSON on the last line of the output.

    ``sample PATH SHAPE DTYPE DEVICE`` and ``train PATH SHAPE DTYPE DEVICE``: requests are answered.
    """
    command, path, *rest = arguments
    if command == "sample":
        serve(lambda: Server(Path(path), *rest))
        return
    if command == "train":
        from .public_training import TrainingServer

        serve(lambda: TrainingServer(Path(path), *rest))
        return
    sequences, side = map(int, rest)
    with contextlib.redirect_stdout(sys.stderr):
        found = trace(Path(path), sequences, side)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
