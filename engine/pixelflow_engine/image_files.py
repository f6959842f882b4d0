"""Writing images to files, batch by batch, in the format that the path implies."""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .files import atomic_file, folder_for, write_atomically
from .output import quantized, to_uint8
from .pictures import Pixels, contact_sheet

Write = Callable[[NDArray[np.float32]], None]


def check_output(output: str) -> str:
    """Refuse, before any work is done, a path that :func:`image_writer` would refuse for its name; returns the path."""
    folder = _is_folder(output)
    if folder and any(Path(output).glob("*.png")):
        raise ValueError(f"output: got {output!r}, which holds PNG files, expected a folder without any")
    if not folder and Path(output).suffix.lower() not in (".png", ".npz", ".npy"):
        raise ValueError(f"output: got {output!r}, expected a path ending in .png, .npz, .npy or /")
    return output


def image_files(output: str, count: int) -> list[Path]:
    """The files that :func:`image_writer` writes for ``count`` images."""
    path = Path(output)
    return [path / f"{i:06d}.png" for i in range(count)] if _is_folder(output) else [path]


@contextmanager
def image_writer(output: str, count: int, columns: int | None = None) -> Iterator[Write]:
    """A context manager that writes ``count`` images; its function takes the next ones, ``[n, H, W, c]`` in [0, 1].

    Missing folders are made. Whether the path can be written is tried on entering. Single files appear when the block
    ends, whole; the files of a folder as they come, so that what was made before a failure is kept.

    Args:
        output: ``*.png``: the image, or a contact sheet of several. ``*.npz``: ``arr_0``, uint8 NHWC, as common FID
            evaluators read. ``*.npy``: float32 NHWC in [0, 1]. A path ending in ``/`` or an existing folder:
            ``000000.png`` and so on; the folder must not contain PNG files, which would be mistaken for results.
        count: number of images in all.
        columns: images per row of a contact sheet; None makes it about as wide as high.

    Raises:
        ValueError: the path has another ending, the folder contains PNG files, or another number of images was written.
        OSError: the path cannot be written.
    """
    check_output(output)
    written = 0
    with _writer(output, count, columns) as write:

        def counted(images: NDArray[np.float32]) -> None:
            nonlocal written
            written += len(images)
            if written > count:
                raise ValueError(f"images: got {written} to write, expected {count}")
            write(images)

        yield counted
        if written != count:
            raise ValueError(f"images: got {written} to write, expected {count}")


def _writer(output: str, count: int, columns: int | None) -> AbstractContextManager[Write]:
    path = Path(output)
    if _is_folder(output):
        return _folder(path, count)
    match path.suffix.lower():
        case ".png":
            return _sheet(path, columns or math.ceil(math.sqrt(count)))
        case ".npz":
            return _archive(path, count)
        case _:
            return _array(path, count)


def write_images(images: NDArray[np.float32], output: str) -> list[Path]:
    """Write images ``[N, H, W, c]`` in [0, 1] as :func:`image_writer` does; returns the files written."""
    files = image_files(output, len(images))
    with image_writer(output, len(images)) as write:
        write(images)
    return files


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically; missing folders are made."""
    write_atomically(path, lambda file: image.save(file, "PNG"))


def _is_folder(output: str) -> bool:
    return output.endswith("/") or (output != "" and Path(output).is_dir())


@contextmanager
def _folder(path: Path, count: int) -> Iterator[Write]:
    files = iter(image_files(f"{path}/", count))
    with folder_for(path):
        with tempfile.TemporaryFile(dir=path):
            pass  # it can be written

        def write(images: NDArray[np.float32]) -> None:
            for image in to_uint8(images):
                save_png(Image.fromarray(image), next(files))

        yield write


@contextmanager
def _sheet(path: Path, columns: int) -> Iterator[Write]:
    parts: list[Pixels] = []
    with atomic_file(path) as file:
        yield lambda images: parts.append(to_uint8(images))
        drawn = np.concatenate(parts)
        image = Image.fromarray(drawn[0]) if len(drawn) == 1 else contact_sheet(drawn, columns)
        image.save(file, "PNG")


@contextmanager
def _array(path: Path, count: int) -> Iterator[Write]:
    with atomic_file(path) as file, _npy(file, count) as write:
        yield write


@contextmanager
def _archive(path: Path, count: int) -> Iterator[Write]:
    with (
        atomic_file(path) as file,
        zipfile.ZipFile(file, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
        _npy(cast("BinaryIO", member), count) as write,
    ):
        yield lambda images: write(quantized(images))


@contextmanager
def _npy(file: BinaryIO, count: int) -> Iterator[Callable[[NDArray[np.generic]], None]]:
    """Write an array of ``count`` rows, of which any number comes at a time, in NumPy's format."""
    begun = False

    def write(rows: NDArray[np.generic]) -> None:
        nonlocal begun
        if not begun:
            shape = (count, *rows.shape[1:])
            header = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        begun = True
        file.write(np.ascontiguousarray(rows).data)

    yield write
