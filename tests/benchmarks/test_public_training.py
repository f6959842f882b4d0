"""The published code's step of training, by what of a checkout is asked for in few lines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.public_training import TrainingServer
from pixelflow_benchmarks.suites.training.checks import Expected, batch_faults, gradient_faults, move_faults
from pixelflow_benchmarks.suites.training.measure import breakdown
from pixelflow_benchmarks.suites.training.opponents import PUBLIC
from pixelflow_benchmarks.suites.training.phases import PHASES, UNTIMED
from pixelflow_benchmarks.suites.training.problem import IMAGES, SEED, Gradients
from pixelflow_benchmarks.suites.training.public import PublicRun
from pixelflow_training.collate import Batch
from pixelflow_training.draws import sample_ids
from support.training_bench import CPU, TINY, WEIGHTS, fixed_gradients, opponents

CHECKOUT = {
    "diffusers/models/embeddings.py": """
from pixelflow_benchmarks.suites.training.public_shape import rotary_table

def get_2d_rotary_pos_embed(embed_dim, crops_coords, grid_size):
    return rotary_table(grid_size[0], embed_dim)
""",
    "pixelflow/model.py": """
import torch
from pixelflow_benchmarks.suites.training.public_shape import ListedBatch, packed_velocities
from pixelflow_engine.reference import PixelFlowTransformer

flash_attn_varlen_func = print

class PixelFlowModel(PixelFlowTransformer):
    def __init__(self, attention_bias, **fields):
        super().__init__(**fields)
        self.class_embedder.dropout_prob = 0.1

    def forward(
        self, hidden_states, class_labels, timestep, latent_size, pos_embed, cu_seqlens_q, seqlen_list_q
    ):
        labels = class_labels.clone()
        if self.class_embedder.dropout_prob > 0:
            labels[0] = self.num_classes
        return packed_velocities(self, ListedBatch(
            tokens=hidden_states, targets=hidden_states, rotary=pos_embed, cu_seqlens=cu_seqlens_q, t_model=timestep,
            sizes=latent_size, labels=labels.tolist(), lengths=seqlen_list_q, stages=[],
        ))
""",
    "pixelflow/scheduling_pixelflow.py": """
class PixelFlowScheduler:
    def __init__(self, steps, num_stages):
        self.generator = __import__("torch").Generator().manual_seed(5)
""",
    "pixelflow/data_in1k.py": """
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from pixelflow_benchmarks.opponents.random_models import SHAPES
from pixelflow_training.collate import make_batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import plan_step

def collate_fn(examples, config, noise_scheduler_copy):
    assert (config.model.params.patch_size, config.scheduler.num_stages) == (2, 2)
    images, labels = torch.stack([x for x, _ in examples]), torch.tensor([label for _, label in examples])
    network, seed = SHAPES["tiny"], int(torch.randint(2**31, (), generator=noise_scheduler_copy.generator))
    recipe = TrainConfig(model=network.model, scheduler=network.scheduler, resolution=network.resolution,
                         batch_size=len(images), label_drop=0.0, seed=seed)
    plan = plan_step(recipe, 0, len(images))
    batch = make_batch(images[plan.position], labels[plan.position], plan, network)
    sides = batch.latent_size.tolist()
    places = [get_2d_rotary_pos_embed(config.model.params.attention_head_dim, None, (n, n)) for n in sides]
    return {
        "pixel_values": batch.tokens, "target_values": batch.targets, "input_ids": batch.labels.tolist(),
        "pos_embed": torch.cat([torch.stack(table, -1) for table in places]), "timesteps": batch.t_model,
        "cumsum_q_len": batch.layout.cu_seqlens, "batch_latent_size": batch.latent_size,
        "seqlen_list_q": [n * n for n in sides], "cumsum_kv_len": None,
    }
""",
    "train.py": """
import torch

@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    for average, weight in zip(ema_model.parameters(), model.parameters()):
        average.mul_(decay).add_(weight, alpha=1 - decay)
""",
}
"""What of a checkout is asked for, in few lines."""


@pytest.fixture(scope="module")
def gradients() -> tuple[Batch, Gradients, Expected]:
    return fixed_gradients()


@contextmanager
def checkout(folder: Path) -> Iterator[Path]:
    """Such a checkout, whose modules are gone afterwards."""
    for name, text in CHECKOUT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before, path = set(sys.modules), list(sys.path)
    yield folder
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("pixelflow", "diffusers", "train"):
            del sys.modules[name]


class InThisProcess(PublicProcess):
    """Answers as the other process does, without one."""

    def __init__(self, server: TrainingServer, folder: Path) -> None:
        self.server, self.folder = server, SimpleNamespace(name=str(folder))  # type: ignore[assignment]
        self.asked: list[str] = []

    @property
    def ended(self) -> bool:
        return False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        request = json.loads(json.dumps(request))
        self.asked.append(request["do"])
        found: dict[str, Any] = json.loads(json.dumps(getattr(self.server, request.pop("do"))(**request)))
        return found


def test_the_published_step_is_checked_and_timed(tmp_path: Path, gradients: tuple[Batch, Gradients, Expected]) -> None:
    batch, _, expected = gradients
    with checkout(tmp_path), torch.random.fork_rng():
        process = InThisProcess(TrainingServer(tmp_path, "tiny", "float32", "cpu"), tmp_path)
        who = PublicRun(process, TINY)
        assert gradient_faults(who.gradients(batch), expected) == [], "no label may be dropped here"
        assert process.server.model.class_embedder.dropout_prob == 0.1
        for step in range(2):  # the images that the other loops see
            drawn, ids = who.draw(), sample_ids(SEED, TINY.positions(step), IMAGES)
            assert batch_faults(drawn, TINY, TINY.images()) == []
            assert drawn.labels is not None
            assert sorted(drawn.labels.tolist()) == sorted(TINY.images().labels[ids].tolist())
        before = who.probe()
        who.step(UNTIMED)
        assert move_faults(before, who.probe(), 1e-4) == []
        assert who.last().norm > 0
        assert math.isfinite(who.last().loss)
        shares = breakdown(who, CPU, steps=2)
        assert sum(shares.values()) == pytest.approx(1)
        assert all(shares[part] > 0 for part in PHASES)
        assert who.peak_bytes() is None
        again = PublicRun(process, TINY)
        assert torch.equal(again.probe()[0], WEIGHTS["proj_out_2.weight"]), "a problem begins with the first weights"
        again.close()
        assert process.asked[-1] == "release"


def test_without_attention_for_packs_it_cannot_train(tmp_path: Path) -> None:
    with checkout(tmp_path):
        (tmp_path / "pixelflow/model.py").write_text("flash_attn_varlen_func = None\n")
        with pytest.raises(RuntimeError, match="needs FlashAttention's call for packs, which is not there: on cpu"):
            TrainingServer(tmp_path, "tiny", "float32", "cpu")


def test_a_checkout_that_does_not_start_is_absent(tmp_path: Path) -> None:
    who = opponents(public=tmp_path)
    assert who.run(PUBLIC, TINY) is None
    assert "expected a folder with pixelflow/model.py" in who.absent[PUBLIC]
    who.close()
