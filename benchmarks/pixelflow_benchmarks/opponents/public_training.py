"""The published code's training step, served from its own process, see :mod:`.public_code`.

Batches, model and averages are the checkout's own code; the parts between them, which stand in its script, are repeated
here in the same order. Training runs in one process, so nothing is reduced between devices. The published loader's
worker processes are left out: a batch is made within the step, as for all other variants.
"""

from __future__ import annotations

import copy
import importlib
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.suites.training.phases import UNTIMED, PhaseClock, Phases
from pixelflow_benchmarks.suites.training.problem import PROBE, SEED, TrainingProblem
from pixelflow_kernels.varlen_attention import flash
from pixelflow_training.draws import sample_ids

from .published import import_published, published_model, rotary_places
from .random_models import SHAPES, random_weights


class TrainingServer:
    """The published model with random weights, trained step by step on request.

    Args:
        path: the checkout.
        shape: a name of :data:`pixelflow_benchmarks.opponents.random_models.SHAPES`.
        dtype: bfloat16 by autocast, as in published training, or float32.
        device: where the model runs.

    Raises:
        RuntimeError: no available attention can run its packs.
    """

    def __init__(self, path: Path, shape: str, dtype: str, device: str) -> None:
        self.published = import_published(path, "pixelflow.model")
        self.loader = importlib.import_module("pixelflow.data_in1k")
        self.script = importlib.import_module("train")
        scheduling = importlib.import_module("pixelflow.scheduling_pixelflow")
        self.config, self.dtype, self.device = SHAPES[shape], getattr(torch, dtype), torch.device(device)
        scheduler, model = self.config.scheduler, self.config.model
        self.scheduler = scheduling.PixelFlowScheduler(scheduler.num_train_timesteps, num_stages=scheduler.num_stages)
        self.options = SimpleNamespace(
            model=SimpleNamespace(
                params=SimpleNamespace(patch_size=model.patch_size, attention_head_dim=model.attention_head_dim)
            ),
            scheduler=scheduler,
        )
        self._give_attention()
        self.model = published_model(self.published, self.config).to(self.device).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()

    def _give_attention(self) -> None:
        """Provide variable-length attention if flash-attn is missing: PyTorch's own kernel of the same kind."""
        if self.published.flash_attn_varlen_func is not None:
            return
        if self.device.type != "cuda" or (reason := flash.why_not(self.dtype)) is not None:
            where = f"on {self.device}" if self.device.type != "cuda" else reason
            raise RuntimeError(
                f"public: its training needs FlashAttention's call for packs, which is not there: {where}"
            )

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            cu_seqlens_q: Tensor,
            cu_seqlens_k: Tensor,
            max_seqlen_q: int,
            max_seqlen_k: int,
        ) -> Tensor:
            scale = 1 / math.sqrt(q.shape[-1])
            return flash.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)

        self.published.flash_attn_varlen_func = attend

    def hello(self) -> dict[str, Any]:
        """Answer that the process is ready."""
        return {}

    def prepare(self, batch: int) -> dict[str, Any]:
        """Start again from the initial weights."""
        self.problem = TrainingProblem(config=self.config, batch=batch, dtype=self.dtype, device=self.device)
        self.data, self.position = self.problem.images(), 0
        random.seed(SEED)
        torch.manual_seed(SEED)
        settings = self.problem.recipe.optimizer
        weights = random_weights(self.config, self.device)
        self.model.load_state_dict(weights, strict=True)
        self.ema.load_state_dict(weights, strict=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        return {}

    def draw(self, keep: str) -> dict[str, Any]:
        """Save a batch of the published loader to the file ``keep``."""
        found = self._batch()
        sizes = found["batch_latent_size"]
        largest = self.config.resolution // self.config.model.patch_size
        stage = [self.config.scheduler.num_stages - 1 - int(math.log2(largest // side)) for side in sizes.tolist()]
        fields = {
            "tokens": found["pixel_values"],
            "targets": found["target_values"],
            "t_model": found["timesteps"],
            "labels": torch.tensor(found["input_ids"]),
            "sizes": sizes,
            "stage": torch.tensor(stage),
        }
        torch.save(fields, keep)
        return {}

    def gradients(self, batch: str, keep: str) -> dict[str, Any]:
        """Save losses and gradients of the batch in the file ``batch``, dropping no label, to the file ``keep``."""
        given = torch.load(batch, weights_only=True)
        sides = given["sizes"].tolist()
        lengths = [side * side for side in sides]
        places = [rotary_places(side, self.config.model.attention_head_dim) for side in sides]
        made = {
            "pixel_values": given["tokens"],
            "input_ids": [] if given["labels"] is None else given["labels"].tolist(),
            "pos_embed": torch.cat(places).float(),
            "cumsum_q_len": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            "batch_latent_size": given["sizes"].to(torch.int32),
            "seqlen_list_q": lengths,
            "timesteps": given["t_model"],
            "target_values": given["targets"],
        }
        embedder = getattr(self.model, "class_embedder", None)
        before = getattr(embedder, "dropout_prob", 0.0)
        if embedder is not None:
            embedder.dropout_prob = 0.0
        self.optimizer.zero_grad()
        losses = self._losses(made)
        losses.mean().backward()
        if embedder is not None:
            embedder.dropout_prob = before
        by_name = {name: p.grad.cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        torch.save({"losses": losses.detach().float().cpu(), "by_name": by_name}, keep)
        self.optimizer.zero_grad()
        return {}

    def step(self, timed: bool) -> dict[str, Any]:
        """Run a whole step and report it, with the time of its parts if ``timed``."""
        if not timed:
            return self._report(*self._step(UNTIMED))
        clock = PhaseClock(self.device)
        with clock.step():
            reported = self._step(clock)
        return self._report(*reported) | {"seconds": clock.seconds, "whole": clock.whole}

    def probe(self, keep: str) -> dict[str, Any]:
        """Save a parameter and its average to the file ``keep``."""
        found = (dict(model.named_parameters())[PROBE].detach().cpu() for model in (self.model, self.ema))
        torch.save(dict(zip(("weight", "average"), found, strict=True)), keep)
        return {}

    def peak(self) -> dict[str, Any]:
        """Return the peak memory of a step in bytes; None on a CPU."""
        if self.device.type != "cuda":
            return {"bytes": None}
        torch.cuda.reset_peak_memory_stats(self.device)
        self._step(UNTIMED)
        torch.cuda.synchronize(self.device)
        return {"bytes": torch.cuda.max_memory_allocated(self.device)}

    def release(self) -> dict[str, Any]:
        """Free gradients and cached memory for the other variants."""
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def _step(self, phases: Phases) -> tuple[Tensor, Tensor]:
        with phases("optimizer"):
            self.optimizer.zero_grad()
        with phases("batch"):
            batch = self._on_device(self._batch())
        with phases("forward"):
            loss = self._losses(batch).mean()
        with phases("backward"):
            loss.backward()
        with phases("clip"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.problem.recipe.optimizer.max_grad_norm)
        with phases("optimizer"):
            self.optimizer.step()
        with phases("ema"):
            self.script.update_ema(self.ema, self.model)
        return loss.detach(), norm

    def _batch(self) -> dict[str, Any]:
        ids = sample_ids(SEED, self.problem.positions(self.position), len(self.data)).tolist()
        self.position += 1
        images = [self.data.images[i].float().div(255).sub(0.5).div(0.5) for i in ids]
        examples = list(zip(images, self.data.labels[ids].tolist(), strict=True))
        found: dict[str, Any] = self.loader.collate_fn(examples, self.options, self.scheduler)
        return found

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in batch.items()}

    def _losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of each image."""
        batch = self._on_device(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.problem.casts):
            out = self.model(
                hidden_states=batch["pixel_values"],
                class_labels=torch.tensor(batch["input_ids"], device=self.device),
                timestep=batch["timesteps"],
                latent_size=batch["batch_latent_size"],
                pos_embed=batch["pos_embed"],
                cu_seqlens_q=batch["cumsum_q_len"],
                seqlen_list_q=batch["seqlen_list_q"],
            )
        squares = (out.float() - batch["target_values"].float()) ** 2
        return torch.stack([part.mean() for part in torch.split(squares, batch["seqlen_list_q"])])

    def _report(self, loss: Tensor, norm: Tensor) -> dict[str, Any]:
        return {"loss": loss.item(), "norm": norm.item()}
