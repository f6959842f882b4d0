"""A disk that fails on purpose: at the n-th operation under a folder it kills, cuts the power, or has no space left.

Operations are writes to a file, fsync, renames, and creating and deleting files and folders, wherever in Python they
come from. After a power cut every later operation fails as well, because a dead process writes nothing.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch


class PowerCut(BaseException):
    """A power cut: the process would not live to see this exception."""


class Disk:
    """Counts operations below ``root`` and fails at the ``cut``-th one (from 0); a context manager.

    Args:
        root: folder whose operations are counted; other paths are unaffected.
        cut: number of the operation; None for never.
        how: ``cut`` raises PowerCut from that operation on; ``kill`` sends SIGKILL; ``full`` makes all writes from
            there on fail for lack of space, and counts only writes.
        counted: selects the operations to count, by name; by default all.
    """

    def __init__(
        self,
        root: Path,
        cut: int | None = None,
        how: Literal["cut", "kill", "full"] = "cut",
        counted: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.root, self.cut, self.how, self.counted = str(root), cut, how, counted
        self.count = 0
        self.names: list[str] = []  # names of the counted operations
        self._durable: dict[int, int] = {}  # inode -> size that has reached the disk
        self._born: dict[int, int] = {}  # inode -> inode of the folder whose entry for it has not reached the disk
        # Renames not yet on the disk: from, to, previous content, and whether the old name was not on the disk either.
        self._renames: list[tuple[str, str, bytes | None, bool]] = []
        self._stack = ExitStack()
        self._one = threading.RLock()  # training logs while a checkpoint is written

    def __enter__(self) -> Disk:
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in ("rename", "replace", "fsync")}
        for name in ("mkdir", "rmdir", "unlink"):
            self._stack.enter_context(patch.object(os, name, self._simple(name, getattr(os, name))))
        self._stack.enter_context(patch.object(os, "rename", self._rename("rename")))
        self._stack.enter_context(patch.object(os, "replace", self._rename("replace")))
        self._stack.enter_context(patch.object(os, "fsync", self._fsync))
        self._stack.enter_context(patch.object(io, "open", self._open(io.open)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def dead(self) -> bool:
        return self.how != "full" and self.cut is not None and self.count > self.cut

    def step(self, name: str) -> None:
        """Count an operation before it is carried out."""
        if self.how == "full":
            if name != "write":
                return
        elif self.dead:
            raise PowerCut(f"after operation {self.cut}")
        if not self.counted(name):
            return
        self.count += 1
        self.names.append(name)
        if self.cut is not None and self.count > self.cut:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise PowerCut(f"at operation {self.cut}, {name}")

    def mine(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root)

    def _simple(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if not self.mine(path) and options.get("dir_fd") is None:  # shutil.rmtree goes by descriptors
                return real(path, *rest, **options)
            with self._one:
                self.step(name)
                result = real(path, *rest, **options)
                if name == "mkdir":
                    self._is_born(Path(path))
                return result

        return call

    def _is_born(self, path: Path) -> None:
        self._born[path.stat().st_ino] = path.parent.stat().st_ino

    def _rename(self, name: str) -> Callable[..., Any]:
        def call(source: Any, target: Any, **options: Any) -> None:
            if not self.mine(source):
                self._real[name](source, target, **options)
                return
            with self._one:
                self.step(name)
                there = Path(target).read_bytes() if Path(target).is_file() else None
                self._real[name](source, target, **options)
                newborn = self._born.pop(Path(target).stat().st_ino, None) is not None
                self._renames.append((os.fspath(source), os.fspath(target), there, newborn))

        return call

    def _fsync(self, descriptor: int) -> None:
        if not self.mine(Path(f"/proc/self/fd/{descriptor}").readlink()):
            self._real["fsync"](descriptor)
            return
        with self._one:
            self.step("fsync")
            status = os.fstat(descriptor)  # the real call is left out, because this disk is simulated by bookkeeping
            self._durable[status.st_ino] = status.st_size
            self._born = {child: folder for child, folder in self._born.items() if folder != status.st_ino}
            self._renames = [
                rename for rename in self._renames if Path(rename[1]).parent.stat().st_ino != status.st_ino
            ]

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not self.mine(path) or not set(mode) & set("wax"):
                return real(path, mode, *rest, **options)
            with self._one:
                self.step("open")
                new = not Path(path).exists()
                stream = real(path, mode, *rest, **options)
                if new:
                    self._is_born(Path(path))
                if "w" in mode:
                    self._durable[os.fstat(stream.fileno()).st_ino] = 0
                return _Stream(stream, self)

        return call

    def lose(self) -> None:
        """Do what a power cut does: discard everything that has not reached the disk.

        Of several renames, only the last one is kept, because a file system need not keep their order.
        """
        lost = self._renames[:-1] or self._renames
        for source, target, there, newborn in reversed(lost):
            if Path(target).exists():
                Path(target).rename(source)
                if newborn:
                    _remove(Path(source))
            if there is not None:
                Path(target).write_bytes(there)
        for path in sorted(Path(self.root).rglob("*"), reverse=True):
            inode = path.stat().st_ino
            if inode in self._born:
                _remove(path)
            elif inode in self._durable and path.is_file():
                os.truncate(path, self._durable[inode])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class _Stream:
    """A file whose writes are counted. The write at which the power is cut is half done."""

    def __init__(self, stream: Any, disk: Disk) -> None:
        self._stream, self._disk = stream, disk

    def write(self, data: Any) -> Any:
        try:
            with self._disk._one:
                self._disk.step("write")
        except PowerCut:
            if not self._stream.closed:
                self._stream.write(data[: len(data) // 2])
                self._stream.flush()
            raise
        return self._stream.write(data)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
