"""Checkpoints of a run: a fresh folder for each, complete or not there at all, written while training goes on.

::

    RUN/checkpoints/step-00000500/   __*.distcp, .metadata   torch.distributed.checkpoint's own files
                                     manifest.json           step, recipe, versions, SHA-256 of every file
    RUN/checkpoints/latest           the name of the folder to go on from

A folder is written under a hidden name, brought to the disk, and renamed; then ``latest`` is replaced; then old ones
are deleted. So at every moment, power cuts included, ``latest`` names a complete checkpoint.

**Never go on from a run directory that is not your own.** ``.metadata`` is a pickle: loading it runs whatever code its
author put there. The digests tell damage from health, not friend from foe, who would write digests too. Models to pass
on are in ``RUN/model``, whose form is data alone.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as WriteFuture

from pixelflow_engine.errors import CheckpointError, ConfigError

from .config import TrainConfig
from .data.listing import Listing
from .files import remove_folder, replace_text, sync
from .manifest import check_data, check_recipe, read_manifest, verify, write_manifest
from .ranks import ALONE, Ranks
from .run import STEP
from .staging import Stager, share
from .state import TrainState

LATEST = "latest"


def name_of(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


class _Writer(FileSystemWriter):
    """torch's writer into a folder that does not exist yet. ``publish`` is called once all ranks have written."""

    def __init__(self, folder: Path, publish: Callable[[], None]) -> None:
        # What is written is on the CPU. Told to copy ahead, torch would wait for the GPU's training at every tensor.
        super().__init__(folder, overwrite=False, per_thread_copy_ahead=0)
        self._publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> WriteFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            reason = _reason(error)
            if reason is error:
                raise
            raise reason from None  # other ranks get what is raised, not what was behind it

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._publish()


class Checkpointer:
    """Saves and restores a run's state; one at a time has a folder, and it is used inside ``with``.

    Args:
        folder: holds the checkpoints; made if it is not there, inside one that is. Leftovers of saves that were cut
            short are removed.
        config: the recipe, which every checkpoint keeps and is held against.
        ranks: who writes and reads together, on one file system; the first one checks, publishes and deletes.
        listing: tells what is trained on, if it is files; asked once, on the first rank.

    Attributes:
        accepted: what was read was written with other images, and ``data.changed`` accepts that: the parts that differ.
            Known to the first rank.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        ranks: Ranks = ALONE,
        listing: Callable[[], Listing | None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self._listing = functools.cache(listing)
        self.accepted: list[str] = []
        self._pending: Future[Any] | None = None
        self._saving = -1
        self._stager = Stager()
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> Checkpointer:
        self.ranks.first_does(self._tidy)
        # Without a process group torch says at every save that it takes the process to be alone, which it is. Filters
        # are the process's: set and undone by the thread that saves, they might go wrong in the others.
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the save under way, unless the user is in a hurry. An error that is under way already is kept."""
        try:
            if error is None:
                self.wait()
            elif not isinstance(error, KeyboardInterrupt):
                try:
                    self.wait()
                except (OSError, RuntimeError) as failure:
                    error.add_note(str(failure))
        finally:
            self._stager.close()
            self._warnings.__exit__(None, None, None)

    def _tidy(self) -> None:
        self.folder.mkdir(exist_ok=True)
        sync(self.folder.parent)
        for leftover in self.folder.glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    # --- writing ---

    def save(self, state: TrainState) -> None:
        """Copy this rank's share of the state to the CPU and write it in the background, after the save before it.

        Raises:
            OSError: the save before it has failed.
        """
        self.wait()
        step = state.step
        self._saving = step
        pending = async_save(
            share(state.tensors(), self.ranks),
            storage_writer=_Writer(self._partial(step), lambda: self._publish(step)),
            async_stager=self._stager,
            process_group=self.ranks.saving,
            no_dist=self.ranks.alone,
        )
        assert isinstance(pending, Future)  # what it is for a stager that blocks
        self._pending = pending

    def is_written(self) -> bool:
        """Whether the save in the background is done or has failed, which :meth:`wait` then tells at once."""
        return self._pending is not None and self._pending.done()

    def wait(self) -> None:
        """Wait until the save in the background is complete.

        Raises:
            OSError: it has failed; naming the checkpoint, the reason and the checkpoint that stays.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            return
        except CheckpointException as error:
            cause, where = self._failed(error)
        except Exception as error:
            cause, where = _reason(error), ""
        folder, kept = self.folder / name_of(self._saving), self._latest()
        if self.ranks.first:
            shutil.rmtree(self._partial(self._saving), ignore_errors=True)  # room on the disk, perhaps
        message = f"{folder}: the checkpoint could not be saved: {where}{cause}; "
        message += f"the last one is {kept.name}" if kept else "there is none before it"
        raise (OSError if isinstance(cause, OSError) else RuntimeError)(message) from cause

    def _failed(self, error: CheckpointException) -> tuple[BaseException, str]:
        """The reason, and which rank has met it. torch's error is no ``Exception``, which nobody would catch."""
        rank, (failure, _) = min(error.failures.items())
        return _reason(failure), "" if self.ranks.alone else f"rank {rank}: "

    def _partial(self, step: int) -> Path:
        return self.folder / f".{name_of(step)}.partial"

    def _publish(self, step: int) -> None:
        partial = self._partial(step)
        write_manifest(partial, step, self.config, self._listing())
        partial.rename(self.folder / name_of(step))
        sync(self.folder)
        replace_text(self.folder / LATEST, f"{name_of(step)}\n")
        for old in self._dispensable():
            remove_folder(self.folder / name_of(old))

    def _dispensable(self) -> list[int]:
        """Steps that the policy gives up: all but the last ``keep`` and the multiples of ``keep_every``."""
        policy = self.config.checkpoint
        older = self.steps()[: -policy.keep]
        return [step for step in older if policy.keep_every is None or step % policy.keep_every]

    # --- reading ---

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        matches = [STEP.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def restore(self, state: TrainState, from_step: int | None = None) -> bool:
        """Fill a state from a checkpoint as :meth:`read` does, and delete the later ones.

        Args:
            state: of the same recipe; half filled if this raises while loading.
            from_step: as there.

        Returns:
            whether there was one.

        Raises:
            CheckpointError, ConfigError: as there; or the recipe ends before the checkpoint's step.
        """
        tensors = state.tensors()
        if not self.read(tensors, from_step):
            return False
        if (step := int(tensors["counters"]["step"])) > self.config.steps:
            raise ConfigError(
                f"steps: got {self.config.steps}, expected at least {step}: {self.folder / name_of(step)} is of that "
                f"step; to go on from an earlier one, pass --from-step (there is: {', '.join(map(str, self.steps()))})"
            )
        state.take_counters(tensors)
        self.ranks.first_does(lambda: self._forget_after(state.step))
        return True

    def read(self, tensors: dict[str, dict[str, Tensor]], from_step: int | None = None) -> bool:
        """Fill tensors from a checkpoint, if there is one; nothing on the disk is changed.

        Everything is verified before anything is loaded. A damaged checkpoint is an error, not a reason to take an
        older one: how much work to give up is for its owner to say.

        Args:
            tensors: those that are wanted, under the names of :meth:`TrainState.tensors`.
            from_step: which checkpoint; by default the one that ``latest`` names.

        Returns:
            whether there was one.

        Raises:
            CheckpointError: it is damaged or missing; the message names the file, and the checkpoints to choose from.
                Or it went away while it was read.
            ConfigError: it is of another recipe or other images; the message names the keys, or the parts of the data.
        """
        chosen = self.ranks.first_does(lambda: self._verified(from_step))
        if chosen is None:
            return False
        reader = FileSystemReader(chosen)
        try:
            load(tensors, storage_reader=reader, process_group=self.ranks.saving, no_dist=self.ranks.alone)
        except CheckpointException as error:
            cause, where = self._failed(error)
            if not isinstance(cause, Exception):  # Ctrl-C
                raise cause from None
            raise CheckpointError(
                f"{chosen}: was whole, and could not be loaded: {where}{cause}; a run that goes on there may have "
                "deleted it, or not all ranks see its files"
            ) from cause
        return True

    def _verified(self, from_step: int | None) -> Path | None:
        """The checkpoint to go on from, if there is one, every bit of it checked."""
        chosen = self._latest() if from_step is None else self.folder / name_of(from_step)
        if chosen is None:
            return None
        try:
            if not chosen.is_dir():
                raise CheckpointError(f"{chosen}: missing")
            manifest = read_manifest(chosen)
            if name_of(manifest.step) != chosen.name:
                raise CheckpointError(f"{chosen}: is of step {manifest.step}")
            verify(chosen, manifest)
        except CheckpointError as error:
            others = ", ".join(str(step) for step in self.steps() if name_of(step) != chosen.name) or "none"
            raise CheckpointError(
                f"{error}; to go on from another checkpoint, pass --from-step (there is: {others})"
            ) from None
        check_recipe(chosen, manifest, self.config)
        self.accepted = check_data(chosen, manifest, self._listing(), self.config.data.changed)
        return chosen

    def _latest(self) -> Path | None:
        """What ``latest`` names; without it, as when the first save was cut before its last act, the newest."""
        pointer, steps = self.folder / LATEST, self.steps()
        if not pointer.exists():
            return self.folder / name_of(steps[-1]) if steps else None
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not STEP.fullmatch(name):
            raise CheckpointError(
                f"{pointer}: got {name[:40]!r}, expected a checkpoint's name; choose one with --from-step "
                f"(there is: {', '.join(map(str, steps)) or 'none'})"
            )
        return self.folder / name

    def _forget_after(self, step: int) -> None:
        """The run goes on from here: ``latest`` says so first, then what lies ahead is deleted."""
        replace_text(self.folder / LATEST, f"{name_of(step)}\n")
        for later in self.steps():
            if later > step:
                remove_folder(self.folder / name_of(later))


def _reason(error: BaseException) -> BaseException:
    """The failure of the system behind an error: of a full disk, torch only says that a position is not as expected."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return error
