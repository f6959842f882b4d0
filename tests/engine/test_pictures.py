"""Pictures: where every pixel of a sheet comes from, what an animation holds, what a file gets, all or nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pixelflow_engine import StepEvent
from pixelflow_engine.files import write_atomically
from pixelflow_engine.image_files import image_writer, write_images
from pixelflow_engine.output import to_uint8
from pixelflow_engine.pictures import CascadeRecorder, contact_sheet, pixels
from support.engines import tiny_engine


def random_generator(seed: int) -> np.random.Generator:
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def random_images(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.float32]:
    """``[N, H, W, c]`` in [0, 1], both ends included."""
    images = random_generator(seed).random((count, height, width, channels), dtype=np.float32)
    images.reshape(-1)[:2] = 0.0, 1.0
    return images


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- contact sheets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [(3,), ()], ids=["colour", "grey"])
@pytest.mark.parametrize(
    ("count", "columns", "zoom", "gap"),
    [(1, 1, 1, 2), (5, 3, 1, 2), (6, 3, 2, 1), (2, 4, 3, 0), (7, 1, 1, 5)],
    ids=str,
)
def test_contact_sheet_has_every_pixel_in_its_place(
    count: int, columns: int, zoom: int, gap: int, tail: tuple[int, ...]
) -> None:
    height, width = 3, 5
    images = random_generator(1).integers(0, 255, (count, height, width, *tail), dtype=np.uint8)  # 255 is the gap
    sheet = np.asarray(contact_sheet(images, columns, zoom, gap))
    rows = -(-count // columns)
    assert sheet.shape == (rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, *tail)
    drawn = np.zeros(sheet.shape[:2], dtype=bool)
    for i in range(count):
        for y in range(height * zoom):
            for x in range(width * zoom):
                row = gap + i // columns * (height * zoom + gap) + y
                column = gap + i % columns * (width * zoom + gap) + x
                drawn[row, column] = True
                assert (sheet[row, column] == images[i, y // zoom, x // zoom]).all(), (i, y, x)
    assert (sheet[~drawn] == 255).all(), "something lies between the images"


def test_contact_sheet_has_a_narrow_white_gap_by_default() -> None:
    sheet = np.asarray(contact_sheet(np.zeros((2, 4, 4, 3), dtype=np.uint8), columns=2))
    assert sheet.shape == (8, 14, 3)
    assert (sheet[:, [0, 1, 6, 7, 12, 13]] == 255).all()


def test_pixels_of_a_state() -> None:
    state = torch.tensor([-7.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0]).reshape(1, 1, 1, 7)
    # (x / 2 + 1/2) * 255 rounded: 0.1275 -> 0, 127.5 -> 128 (to even), 191.25 -> 191.
    assert pixels(state).tolist() == [[[0, 0, 0, 128, 191, 255, 255]]]
    assert pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


# --- the animation -----------------------------------------------------------------------------------------


def test_recorder_draws_every_step_and_ends_with_the_images() -> None:
    engine = tiny_engine()
    steps, columns, zoom = (2, 1, 3), 2, 2
    recorder = CascadeRecorder(8, 24, columns, zoom)
    states: list[torch.Tensor] = []

    def on_step(event: StepEvent) -> None:
        recorder(event)
        states.append(event.latents.clone())

    images = engine(
        [0, 1, 2], num_inference_steps=steps, height=8, width=24, output_type="np", callback_on_step_end=on_step
    ).images
    assert isinstance(images, np.ndarray)
    assert len(recorder.frames) == sum(steps)
    final = contact_sheet(to_uint8(images), columns, zoom)
    assert {frame.size for frame in recorder.frames} == {final.size}
    assert np.array_equal(np.asarray(recorder.frames[-1]), np.asarray(final))
    # A smaller stage is enlarged without interpolation: 2 x 6 pixels fill the same cells in blocks of 4.
    first = np.kron(pixels(states[0]), np.ones((1, 4, 4, 1), dtype=np.uint8))
    assert np.array_equal(np.asarray(recorder.frames[0]), np.asarray(contact_sheet(first, columns, zoom)))


def smooth_state(side: int, direction: int, sign: int) -> torch.Tensor:
    """Two images with a ramp down the rows or along the columns, in [-1, 1]: little that a lossy format may drop."""
    ramp = sign * torch.linspace(-1, 1, side)
    image = ramp[:, None].expand(side, side) if direction == 0 else ramp.expand(side, side)
    return torch.stack([image, -image])[:, None].expand(-1, 3, -1, -1)


def test_animation_is_animated_and_holds_its_last_frame(tmp_path: Path) -> None:
    recorder = CascadeRecorder(32, 32, columns=2)
    states = [smooth_state(8, 0, 1), smooth_state(16, 1, 1), smooth_state(32, 0, -1), smooth_state(32, 1, -1)]
    for step, state in enumerate(states):
        recorder(StepEvent(stage=0, step=step, tau=1.0, latents=state))
    path = tmp_path / "cascade.webp"
    recorder.save(path, milliseconds=70, hold=900)
    assert names(tmp_path) == ["cascade.webp"]
    with Image.open(path) as animation:
        assert animation.format == "WEBP"
        assert animation.is_animated  # type: ignore[attr-defined]
        assert animation.n_frames == len(states)  # type: ignore[attr-defined]
        assert animation.size == recorder.frames[-1].size
        assert animation.info["loop"] == 0
        frames, durations = [], []
        for i in range(len(states)):
            animation.seek(i)
            frames.append(np.asarray(animation.convert("RGB")).astype(int))
            durations.append(animation.info["duration"])
    assert durations == [70, 70, 70, 900]
    final = np.asarray(contact_sheet(pixels(states[-1]), 2)).astype(int)
    for i, frame in enumerate(frames):
        drawn = np.asarray(recorder.frames[i]).astype(int)
        # Quality 80 on ramps costs about 1 of 255 levels; a wrong frame (rows for columns) is about 70 away.
        assert np.abs(frame - drawn).mean() < 4, f"frame {i}"
    assert np.abs(frames[-1] - final).mean() < 4
    assert np.abs(frames[-2] - final).mean() > 40, "frames so alike that the comparison says nothing"


def test_an_animation_of_no_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^frames: got none, expected at least one recorded step$"):
        CascadeRecorder(32, 32, columns=2).save(tmp_path / "cascade.webp")
    assert names(tmp_path) == []


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_one_image(channels: int, tmp_path: Path) -> None:
    images = random_images(1, 4, 6, channels)
    output = tmp_path / "new" / "folders" / "one.png"
    assert write_images(images, str(output)) == [output]
    with Image.open(output) as image:
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        drawn = np.asarray(image).reshape(4, 6, channels)
    assert np.array_equal(drawn, np.rint(images[0] * 255))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "rows", "columns"), [(2, 1, 2), (4, 2, 2), (5, 2, 3), (7, 3, 3)])
def test_png_of_several_images_is_a_sheet(count: int, rows: int, columns: int, channels: int, tmp_path: Path) -> None:
    images = random_images(count, 4, 6, channels)
    output = tmp_path / "sheet.png"
    assert write_images(images, str(output)) == [output]
    with Image.open(output) as sheet:
        assert sheet.size == (columns * 8 + 2, rows * 6 + 2)
        drawn = np.asarray(sheet).reshape(sheet.height, sheet.width, channels)
    last = count - 1
    top, left = 2 + last // columns * 6, 2 + last % columns * 8
    assert np.array_equal(drawn[top : top + 4, left : left + 6], np.rint(images[-1] * 255))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_npz_is_what_fid_evaluators_read(count: int, channels: int, tmp_path: Path) -> None:
    images = random_images(count, 4, 6, channels)
    output = tmp_path / "samples.npz"
    assert write_images(images, str(output)) == [output]
    with np.load(output) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert array.dtype == np.uint8
    assert array.shape == (count, 4, 6, channels)
    assert np.array_equal(array, np.rint(images * 255))


def test_npz_of_an_image_that_failed_is_black_where_it_is_not_a_number(tmp_path: Path) -> None:
    """As in every other form; the cast of NaN alone would depend on the processor, and warns."""
    images = random_images(2, 4, 6)
    images[1, 2:] = np.nan
    write_images(images, str(tmp_path / "samples.npz"))
    with np.load(tmp_path / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], to_uint8(images))
        assert not archive["arr_0"][1, 2:].any()


def test_npy_keeps_every_bit(tmp_path: Path) -> None:
    images = random_images(3, 4, 6)
    output = tmp_path / "samples.npy"
    assert write_images(images, str(output)) == [output]
    array = np.load(output)
    assert array.dtype == np.float32
    assert array.tobytes() == images.tobytes()
    assert array.shape == images.shape


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_gets_a_file_per_image(exists: bool, channels: int, tmp_path: Path) -> None:
    images = random_images(3, 4, 6, channels)
    folder = tmp_path / "new" / "many.png"  # a folder is a folder whatever its name
    if exists:
        folder.mkdir(parents=True)
        (folder / "kept.txt").write_text("kept")
    files = write_images(images, str(folder) if exists else f"{folder}/")
    assert files == [folder / f"{i:06d}.png" for i in range(3)]
    assert names(folder) == sorted([file.name for file in files] + (["kept.txt"] if exists else []))
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as drawn:
            assert np.array_equal(np.asarray(drawn).reshape(4, 6, channels), np.rint(image * 255))


@pytest.mark.parametrize("output", ["images.jpg", "images", "images.npz.txt", "png", ".png/x", "images.PNGS", ""])
def test_another_ending_is_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^output: got .* expected .*\.png, \.npz, \.npy or /") as caught:
        write_images(random_images(1, 4, 4), output)
    assert repr(output) in str(caught.value)
    assert names(tmp_path) == []


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_images(random_images(1, 4, 4), str(tmp_path / "a.npy"))
        assert os.umask(0o027) == 0o027, "the process's mask has changed"
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.npy").stat().st_mode) == 0o640


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("output", ["a.png", "a.npz", "a.npy", "a/"])
def test_batches_make_the_same_files_as_the_whole(output: str, channels: int, tmp_path: Path) -> None:
    images = random_images(5, 4, 6, channels)
    (whole, *others) = write_images(images, f"{tmp_path}/whole/{output}")
    with image_writer(f"{tmp_path}/parts/{output}", 5) as write:
        for part in (images[:2], images[2:4], images[4:]):
            write(part)
    for file in (whole, *others):
        part = tmp_path / "parts" / file.relative_to(tmp_path / "whole")
        if file.suffix == ".npz":  # holds the time
            with np.load(file) as one, np.load(part) as other:
                assert other["arr_0"].tobytes() == one["arr_0"].tobytes()
        else:
            assert part.read_bytes() == file.read_bytes()
    assert names(tmp_path / "parts") == names(tmp_path / "whole")


@pytest.mark.parametrize("output", ["a.png", "a.npz", "a.npy", "a/"])
@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_images_is_no_file(output: str, count: int, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=rf"^images: got 3 to write, expected {count}$"),
        image_writer(f"{tmp_path}/new/{output}", count) as write,
    ):
        write(random_images(3, 4, 6))
    assert names(tmp_path) == ([] if count == 2 or output != "a/" else ["new"]), "a folder keeps what was made"


@pytest.mark.parametrize("output", ["a.png", "a.npz", "a.npy", "a/"])
def test_no_images_are_no_file(output: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^images: got 0 to write, expected 2$"),
        image_writer(f"{tmp_path}/{output}", 2),
    ):
        pass
    assert names(tmp_path) == []


# --- all or nothing ----------------------------------------------------------------------------------------


class Interruption(BaseException):
    """Like a KeyboardInterrupt."""


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("before", [None, b"old"], ids=["new file", "old file"])
@pytest.mark.parametrize("failure", ["writer", "interruption", "fsync"])
def test_a_failure_midway_changes_nothing(
    failure: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.bin"
    if before is not None:
        path.write_bytes(before)
    seen: list[bytes | None] = []

    def write(file: BinaryIO) -> None:
        file.write(b"half of the n")
        file.flush()
        seen.append(path.read_bytes() if path.exists() else None)
        if failure != "fsync":
            raise Interruption if failure == "interruption" else ValueError("cannot draw this")

    if failure == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises((ValueError, OSError, Interruption)):
        write_atomically(path, write)
    assert seen == [before], "a reader sees a file that is not whole"
    assert (path.read_bytes() if path.exists() else None) == before
    assert names(tmp_path) == ([] if before is None else [path.name]), "something is left behind"


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", lambda file: file.write(b"through"))
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["file", "link", "pipe"]


def test_a_failure_leaves_nothing_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "taken", lambda file: file.write(b"x"))
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize("ending", [".png", ".npz", ".npy"])
def test_images_are_written_all_or_nothing(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / f"samples{ending}"
    write_images(random_images(2, 4, 4, seed=1), str(output))
    before = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space left"):
            write_images(random_images(2, 4, 4, seed=2), str(output))
    assert output.read_bytes() == before
    assert names(tmp_path) == [output.name]
    write_images(random_images(2, 4, 4, seed=2), str(output))
    assert output.read_bytes() != before, "the second write would not have changed anything"
