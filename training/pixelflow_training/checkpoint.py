"""Checkpoints of a run: each in its own folder, either complete or absent, written in the background during training.

::

    RUN/checkpoints/step-00000500/   __*.distcp, .metadata   files of torch.distributed.checkpoint
                                     manifest.json           step, recipe, versions, SHA-256 of every file
    RUN/checkpoints/latest           name of the folder to resume from

A folder is written under a hidden name, synchronized to the disk and renamed; then ``latest`` is replaced; then old
checkpoints are deleted. At every moment, power failures included, ``latest`` therefore names a complete checkpoint.

**Never resume from a run directory that is not your own.** ``.metadata`` is a pickle: loading it runs whatever code its
author put there. The digests detect damage, not malice: an attacker would forge them as well. Models to pass on are in
``RUN/model``, whose form is data alone.
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
from .files import PARTIAL, remove_folder, remove_leftovers, replace_text, sync
from .manifest import check_data, check_recipe, read_manifest, verify, write_manifest
from .ranks import ALONE, Ranks
from .run import STEP
from .staging import Stager, share
from .state import TrainState

LATEST = "latest"


def name_of(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


class _Writer(FileSystemWriter):
    """torch's writer, into a folder that does not exist yet; calls ``publish`` once all ranks have written."""

    def __init__(self, folder: Path, publish: Callable[[], None]) -> None:
        # The tensors are on the CPU already. With copy-ahead, torch would synchronize with the GPU, which is busy with
        # training, at every tensor.
        super().__init__(folder, overwrite=False, per_thread_copy_ahead=0)
        self._publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> WriteFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            reason = _reason(error)
            if reason is error:
                raise
            raise reason from None  # other ranks receive the exception itself, not its cause

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._publish()


class Checkpointer:
    """Saves and restores the state of a run; a context manager. One instance at a time may use a folder.

    Args:
        folder: holds the checkpoints; created if missing (its parent must exist). Entering the context deletes
            leftovers of interrupted saves.
        config: the recipe, which is stored in every checkpoint and compared with the one stored there on restore.
        ranks: the ranks that write and read together, on a shared file system; rank 0 verifies, publishes and deletes.
        listing: returns the listing of the training data, or None to compare none; called at most once, on
            rank 0.

    Attributes:
        accepted: if the restored checkpoint was written with other images and ``data.changed`` accepts that, the parts
            of the data that differ. Set on rank 0 only.
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
        # Without a process group, torch warns at every save that it assumes a single process, which is correct. Warning
        # filters are global to the process: if the saving thread set and reset them, it could race with other threads.
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for a pending save, except on KeyboardInterrupt. An exception that is already propagating is kept."""
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
        remove_leftovers(self.folder, f"{STEP.pattern}|{LATEST}")

    # --- writing ---

    def save(self, state: TrainState) -> None:
        """Wait for the previous save, copy this rank's share of the state to the CPU and write it in the background.

        Raises:
            OSError, RuntimeError: the previous save has failed; see :meth:`wait`.
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
        assert isinstance(pending, Future)  # the return type for a stager that blocks
        self._pending = pending

    def is_written(self) -> bool:
        """Whether the pending save has completed or failed, so that :meth:`wait` returns or raises at once."""
        return self._pending is not None and self._pending.done()

    def wait(self) -> None:
        """Wait until the pending save is complete; no-op if there is none.

        Raises:
            OSError: it failed with an error of the system. The message names the checkpoint, the reason and the
                previous checkpoint, which is kept.
            RuntimeError: it failed for another reason; likewise.
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
            shutil.rmtree(self._partial(self._saving), ignore_errors=True)  # may free space on a full disk
        message = f"{folder}: the checkpoint could not be saved: {where}{cause}; "
        message += f"the last one is {kept.name}" if kept else "there is none before it"
        raise (OSError if isinstance(cause, OSError) else RuntimeError)(message) from cause

    def _failed(self, error: CheckpointException) -> tuple[BaseException, str]:
        """Return the reason of a failure and which rank it occurred on.

        torch's exception derives from ``BaseException``, so callers would not catch it.
        """
        rank, (failure, _) = min(error.failures.items())
        return _reason(failure), "" if self.ranks.alone else f"rank {rank}: "

    def _partial(self, step: int) -> Path:
        return self.folder / f".{name_of(step)}.{PARTIAL}"

    def _publish(self, step: int) -> None:
        partial = self._partial(step)
        write_manifest(partial, step, self.config, self._listing())
        partial.rename(self.folder / name_of(step))
        sync(self.folder)
        replace_text(self.folder / LATEST, f"{name_of(step)}\n")
        for old in self._dispensable():
            self._remove(self.folder / name_of(old))

    def _remove(self, old: Path) -> None:
        """Delete a checkpoint. A later one is there, so a failure is a warning; the next save or resume tries again."""
        try:
            remove_folder(old)
        except OSError as error:
            warnings.warn(f"{old}: the old checkpoint could not be removed: {error}", RuntimeWarning, stacklevel=2)

    def _dispensable(self) -> list[int]:
        """Steps whose checkpoints are to be deleted: all but the last ``keep`` and the multiples of ``keep_every``."""
        policy = self.config.checkpoint
        older = self.steps()[: -policy.keep]
        return [step for step in older if policy.keep_every is None or step % policy.keep_every]

    # --- reading ---

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, in ascending order."""
        matches = [STEP.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def restore(self, state: TrainState, from_step: int | None = None) -> bool:
        """Restore a state from a checkpoint with :meth:`read`, and delete all later checkpoints.

        Args:
            state: a state of the same recipe; partially filled if loading fails.
            from_step: see :meth:`read`.

        Returns:
            whether there was a checkpoint.

        Raises:
            CheckpointError, ConfigError: see :meth:`read`.
            ConfigError: the recipe has fewer steps than the checkpoint has done.
        """
        tensors = state.tensors()
        if not self.read(tensors, from_step):
            return False
        if (step := int(tensors["counters"]["step"])) > self.config.steps:
            raise ConfigError(
                f"steps: got {self.config.steps}, expected at least {step}: {self.folder / name_of(step)} is of that "
                f"step; to resume from an earlier one, pass --from-step (there is: {', '.join(map(str, self.steps()))})"
            )
        state.take_counters(tensors)
        self.ranks.first_does(lambda: self._forget_after(state.step))
        return True

    def read(self, tensors: dict[str, dict[str, Tensor]], from_step: int | None = None) -> bool:
        """Load tensors from a checkpoint, if there is one; nothing on the disk is changed.

        Everything is verified before anything is loaded. A damaged checkpoint is an error, not a reason to take an
        older one: how much work to give up is the user's decision.

        Args:
            tensors: the tensors to fill, under the names of :meth:`TrainState.tensors`.
            from_step: step of the checkpoint; by default the one that ``latest`` names.

        Returns:
            whether there was a checkpoint.

        Raises:
            CheckpointError: the checkpoint is damaged or missing; the message names the file and the available
                checkpoints. Or it disappeared while it was read.
            ConfigError: the checkpoint is of another recipe or of other images; the message names the keys, or the
                parts of the data.
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
                f"{chosen}: was whole, and could not be loaded: {where}{cause}; a run that continues there may have "
                "deleted it, or not all ranks see its files"
            ) from cause
        return True

    def _verified(self, from_step: int | None) -> Path | None:
        """Return the checkpoint to resume from, fully verified, or None if there is none."""
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
                f"{error}; to resume from another checkpoint, pass --from-step (there is: {others})"
            ) from None
        check_recipe(chosen, manifest, self.config)
        self.accepted = check_data(chosen, manifest, self._listing(), self.config.data.changed)
        return chosen

    def _latest(self) -> Path | None:
        """Return the folder that ``latest`` names.

        Without that file, as after a first save that was cut short just before writing it, return the newest
        checkpoint.
        """
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
        """Make a step the latest checkpoint: first point ``latest`` at it, then delete all later checkpoints."""
        replace_text(self.folder / LATEST, f"{name_of(step)}\n")
        for later in self.steps():
            if later > step:
                remove_folder(self.folder / name_of(later))


def _reason(error: BaseException) -> BaseException:
    """Return the OSError in an exception's chain, if there is one, else the exception itself.

    When the disk is full, for example, torch itself only reports that a file position is not the expected one.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return error
