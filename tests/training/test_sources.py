"""Folders and shards: which images there are, in which order, of which class, and what is refused by its name."""

from __future__ import annotations

import errno
import io
import os
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from pixelflow_engine.errors import ConfigError
from pixelflow_training.config import PILLOW_PIXELS
from pixelflow_training.data import FolderSource, ShardSource, UnreadableImageError
from support.pictures import encoded, pixels

PICTURES = [encoded(pixels(5, 7, seed)) for seed in range(8)]


def folder_source(root: Path, num_classes: int = 3, channels: int = 3) -> FolderSource:
    return FolderSource(root, num_classes, channels, PILLOW_PIXELS)


def shard_source(path: Path, num_classes: int = 3, channels: int = 3) -> ShardSource:
    return ShardSource(path, num_classes, channels, PILLOW_PIXELS)


def contents(source: FolderSource | ShardSource) -> list[tuple[str, int, int]]:
    """Name, class and which of the pictures, in order; read by a copy that has been to another process."""
    source = pickle.loads(pickle.dumps(source))
    shown = [source.load(i).permute(1, 2, 0).numpy() for i in range(len(source.labels))]
    which = [next(s for s in range(len(PICTURES)) if np.array_equal(image, pixels(5, 7, s))) for image in shown]
    return [(source.name(i), int(source.labels[i]), which[i]) for i in range(len(which))]


def write_tree(root: Path, files: Iterable[str]) -> None:
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURES[number])


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


# --- folders -----------------------------------------------------------------------------------------------


def test_a_tree_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    files = ["b/z.png", "b/A.PNG", "c/deep/er/x.jpeg", "c/deep.JPG", "a/1.webp", "a/10.bmp", "a/2.JpEg", "b/ö.png"]
    write_tree(tmp_path, files)
    for ignored in ("a/notes.txt", "a/.hidden.png", "b/.cache/x.png", ".trash/x.png", "readme.png", "c/jpg"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_bytes(PICTURES[0])
    source = folder_source(tmp_path)
    assert source.labels.dtype == torch.int64
    # By bytes: capitals before small letters, a dot before a slash, digits one by one.
    assert contents(source) == [
        ("a/1.webp", 0, 4), ("a/10.bmp", 0, 5), ("a/2.JpEg", 0, 6),
        ("b/A.PNG", 1, 1), ("b/z.png", 1, 0), ("b/ö.png", 1, 7),
        ("c/deep.JPG", 2, 3), ("c/deep/er/x.jpeg", 2, 2),
    ]  # fmt: skip


def test_the_order_is_not_that_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, ["b/2.png", "a/1.png", "c/5.png", "a/3/4.png", "b/0.png"])
    expected = contents(folder_source(tmp_path))
    honest = os.scandir

    class Reversed(list[Any]):
        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *_: object) -> None: ...

        close = __exit__

        def __next__(self) -> Any:
            if not self:
                raise StopIteration
            return self.pop()

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(sorted(honest(path), key=lambda entry: entry.name)))
    assert contents(folder_source(tmp_path)) == expected


def test_a_class_may_be_a_link_and_a_name_no_unicode(tmp_path: Path) -> None:
    write_tree(tmp_path, ["tree/a/1.png", "elsewhere/2.png"])
    (tmp_path / "tree" / "b").symlink_to(tmp_path / "elsewhere")
    odd = os.fsdecode(b"a/\xff.png")
    (tmp_path / "tree" / odd).write_bytes(PICTURES[2])
    assert contents(folder_source(tmp_path / "tree", 2)) == [("a/1.png", 0, 0), (odd, 0, 2), ("b/2.png", 1, 1)]


def test_images_behind_links_are_there(tmp_path: Path) -> None:
    """Deeper down as well, twice where two links lead to them."""
    write_tree(tmp_path, ["tree/a/1.png", "elsewhere/2.png", "elsewhere/deep/3.png"])
    (tmp_path / "tree" / "a" / "one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "a" / "two").symlink_to(tmp_path / "elsewhere" / "deep")
    assert contents(folder_source(tmp_path / "tree", 1)) == [
        ("a/1.png", 0, 0), ("a/one/2.png", 0, 1), ("a/one/deep/3.png", 0, 2), ("a/two/3.png", 0, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("to", "at"), [("tree/a", ""), ("tree/a/deep", ""), ("tree", ""), (".", "/tree")])
def test_a_link_that_leads_back_is_refused(to: str, at: str, tmp_path: Path) -> None:
    write_tree(tmp_path, ["tree/a/deep/1.png"])
    (tmp_path / "tree" / "a" / "deep" / "again").symlink_to(tmp_path / to)
    with pytest.raises(ConfigError, match=rf"^data\.path: .*/again{at} lies in itself: a link on the way leads back$"):
        folder_source(tmp_path / "tree", 1)


def test_a_grey_model_gets_grey_images(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png"])
    assert folder_source(tmp_path, 0, channels=1).load(0).shape == (1, 5, 7)


@pytest.mark.parametrize(
    ("files", "num_classes", "said"),
    [
        ([], 3, "has 0 class folders, expected model.num_classes, 3"),
        ([], 0, "has 0 class folders, expected one or more"),
        (["1.png"], 0, "has 0 class folders, expected one or more"),
        (["a/1.png", "b/1.png"], 3, "has 2 class folders (a, b), expected model.num_classes, 3"),
        (
            ["a/1.png", "b/1.png", "c/1.png", "d/1.png", "e/1.png", "f/1.png"],
            5,
            "has 6 class folders (a, b, c, d, e, ...), expected model.num_classes, 5",
        ),
        (["a/1.png", "b/1.txt", "c/.1.png"], 3, "has 2 class folders (b, c) without images"),
    ],
)
def test_a_tree_that_does_not_suit_the_model_is_refused(
    files: list[str], num_classes: int, said: str, tmp_path: Path
) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    write_tree(root, files)
    with pytest.raises(ConfigError) as caught:
        folder_source(root, num_classes)
    assert str(caught.value) == f"data.path: {root} {said}"


def test_any_number_of_folders_suits_a_model_without_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "b/1.png"])
    assert len(folder_source(tmp_path, 0).labels) == 2


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png"])
    for path in (tmp_path / "none", tmp_path / "a" / "1.png"):
        with pytest.raises(ConfigError, match=rf"^data\.path: {path} is not a folder$"):
            folder_source(path)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a class with fewer images. Tests may run as a user who can read everything, so the refusal is made up."""
    write_tree(tmp_path, ["a/1.png", "a/locked/2.png"])
    honest = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="locked"):
        folder_source(tmp_path, 1)


def test_a_file_that_cannot_be_opened_is_an_unreadable_image(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "a/2.png"])
    source = folder_source(tmp_path, 1)
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a" / "2.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"^No such file or directory$"):
        source.load(0)
    with pytest.raises(UnreadableImageError, match=r"^not a JPEG"):
        source.load(1)


def fail_to_answer(*_: object) -> NoReturn:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class FailingFile(io.BytesIO):
    """Whose disk does not answer after some bytes."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size) if self.tell() <= 40 else fail_to_answer()


def test_images_of_other_formats_are_left_out_with_a_warning(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "a/2.gif", "b/inner/3.GIF", "b/4.png", "b/5.tiff", "b/notes.txt", "b/.6.gif"])
    with pytest.warns(UserWarning, match=rf"^data\.path: {tmp_path} has images .*not read: 2 \.gif, 1 \.tiff$"):
        source = folder_source(tmp_path, 2)
    assert [source.name(i) for i in range(len(source.labels))] == ["a/1.png", "b/4.png"]
    assert source.classes == ["a", "b"]
    (tmp_path / "b" / "4.png").unlink()
    with pytest.raises(
        ConfigError, match=r"\(b\) without images; of formats that are not read there are 2 \.gif, 1 \.tiff$"
    ):
        folder_source(tmp_path, 2)


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize(("number", "passes"), [(errno.EMFILE, True), (errno.ESTALE, True), (errno.EACCES, False)])
def test_an_error_that_passes_is_none_of_the_image(
    kind: str, number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another image would stand in for it, and not the next time."""
    write_tree(tmp_path, ["a/1.png"])
    write_tar(tmp_path / "1.tar", [("1.png", PICTURES[0]), ("1.cls", b"0")])
    source = folder_source(tmp_path, 1) if kind == "folder" else shard_source(tmp_path, 1)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OSError if passes else UnreadableImageError) as caught:
            source.load(0)
    assert os.strerror(number) in str(caught.value)
    assert not passes or ("1.png" if kind == "folder" else "1.tar") in str(caught.value)


def test_nor_is_one_that_comes_while_an_image_is_read_or_asked_for_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path, ["a/1.png"])
    source, passing = folder_source(tmp_path, 1), os.strerror(errno.EIO)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: FailingFile(PICTURES[0]))
        with pytest.raises(OSError, match=rf"{passing}.*1\.png"):
            source.load(0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail_to_answer)
        with pytest.raises(OSError, match=passing):
            source.listing()


def test_a_named_pipe_is_no_image_and_is_not_waited_for(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png"])
    os.mkfifo(tmp_path / "a" / "2.png")
    source = folder_source(tmp_path, 1)
    assert source.name(1) == "a/2.png"
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        source.load(1)


# --- shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_grouped_by_their_key(form: int, tmp_path: Path) -> None:
    long = "far/" * 20 + "0007"
    write_tar(
        tmp_path / "b.tar",
        [
            ("./0001.jpg", PICTURES[3]), ("./0001.cls", b"2\n"),
            (f"{long}.cls", b"0"), (f"{long}.seg.PNG", PICTURES[4]),
        ],
        form,
    )  # fmt: skip
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/0001.png", PICTURES[0]), ("y/0001.png", PICTURES[1]), ("readme", b"hello"), ("x/0001.cls", b"1"),
            ("y/0001.json", b'{"label": 2, "caption": "a dog"}'), ("y/0001.txt", b"a dog"),
            ("y/0002.webp", PICTURES[2]), ("y/0002.json", b'{"label": 0}'), ("y/0002.cls", b"1"),
        ],
        form,
    )  # fmt: skip
    (tmp_path / "c.txt").write_text("not a shard")
    expected = [
        ("a.tar: x/0001.png", 1, 0), ("a.tar: y/0001.png", 2, 1), ("a.tar: y/0002.webp", 1, 2),
        ("b.tar: ./0001.jpg", 2, 3), (f"b.tar: {long}.seg.PNG", 0, 4),
    ]  # fmt: skip
    assert contents(shard_source(tmp_path)) == expected
    assert contents(shard_source(tmp_path / "a.tar")) == expected[:3]


def test_a_folder_and_its_shards_have_the_same_images(tmp_path: Path) -> None:
    names = [f"{label}/{i}.jpg" for label in "abc" for i in range(2)]
    write_tree(tmp_path, names)
    members = [
        member
        for number, name in enumerate(names)
        for member in ((name, PICTURES[number]), (f"{name[:-4]}.cls", str(number // 2).encode()))
    ]
    whole, shards = folder_source(tmp_path), shard_source(write_tar(tmp_path / "x" / "all.tar", members))
    assert torch.equal(whole.labels, shards.labels)
    for i in range(6):
        assert torch.equal(whole.load(i), shards.load(i))


def test_a_model_without_classes_needs_no_labels(tmp_path: Path) -> None:
    source = shard_source(write_tar(tmp_path / "a.tar", [("1.png", PICTURES[0]), ("2.png", PICTURES[1])]), 0)
    assert source.labels.tolist() == [0, 0]


IMAGE = ("1.png", PICTURES[0])


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "{folder} has no images"),
        ([("1.cls", b"0")], "{tar}: 1 has 0 images, expected one"),
        ([IMAGE, ("1.jpg", PICTURES[0]), ("1.cls", b"0")], "{tar}: 1 has 2 images, expected one"),
        ([IMAGE, ("1.cls", b"0"), IMAGE], "{tar}: 1.png is there twice"),
        ([IMAGE], "{tar}: 1.png has neither a .cls nor a .json, expected a class from 0 to 2"),
        ([IMAGE, ("1.cls", b"3")], "{tar}: 1.png: got 3 in 1.cls, expected a class from 0 to 2"),
        ([IMAGE, ("1.cls", b"-1")], "{tar}: 1.png: got -1 in 1.cls, expected a class from 0 to 2"),
        ([IMAGE, ("1.json", b'{"label": 1.0}')], "{tar}: 1.png: got 1.0 in 1.json, expected a class from 0 to 2"),
        ([IMAGE, ("1.json", b'{"label": true}')], "{tar}: 1.png: got True in 1.json, expected a class from 0 to 2"),
        ([IMAGE, ("1.cls", b"dog")], "{tar}: 1.png: 1.cls has no class (ValueError: "),
        ([IMAGE, ("1.json", b"{}")], "{tar}: 1.png: 1.json has no class (KeyError: 'label')"),
        ([IMAGE, ("1.json", b"[]")], "{tar}: 1.png: 1.json has no class (TypeError: "),
        ([IMAGE, ("1.json", b"{")], "{tar}: 1.png: 1.json has no class (JSONDecodeError: "),
        ([IMAGE, ("1.json", b"[" * 100_000)], "{tar}: 1.png: 1.json has no class (RecursionError: "),
        ([IMAGE, ("1.cls", b"0" * 1_048_577)], "{tar}: 1.png: 1.cls has 1048577 bytes, expected a class from 0 to 2"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(members: list[tuple[str, bytes]], said: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ConfigError) as caught:
        shard_source(tmp_path)
    assert str(caught.value).startswith(f"data.path: {said.format(folder=tmp_path, tar=tar)}")


def test_a_path_without_shards_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.tar"):
        with pytest.raises(ConfigError, match=rf"^data\.path: {path} is neither a tar nor a folder that has \*\.tar$"):
            shard_source(path)


def test_a_tar_that_is_compressed_or_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    members = [member for i in range(6) for member in ((f"{i}.png", PICTURES[i]), (f"{i}.cls", b"0"))]
    tar = write_tar(tmp_path / "a.tar", members)
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        last, third = archive.getmember("5.cls"), archive.getmember("1.png")
    damaged = bytearray(whole)
    damaged[third.offset + 3] ^= 1
    with tarfile.open(compressed := tmp_path / "compressed", "w:gz") as archive:
        archive.add(tar)
    for content in (compressed.read_bytes(), b"", b"text" * 200, whole[: last.offset_data], bytes(damaged)):
        tar.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^data\.path: {tar}: (not a tar|damaged at byte {third.offset},)"):
            shard_source(tmp_path)
    # Without the zeros at the end, which say nothing, it is whole.
    tar.write_bytes(whole[: last.offset_data + 512])
    assert len(shard_source(tmp_path).labels) == 6


def test_a_shard_that_has_gone_is_an_unreadable_image(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [IMAGE, ("1.cls", b"0")])
    source = shard_source(tmp_path)
    tar.unlink()
    with pytest.raises(UnreadableImageError, match=r"^No such file or directory$"):
        source.load(0)


@pytest.mark.parametrize("fault", ["joined", "a header of zeros"])
def test_a_tar_that_seems_to_end_early_is_refused(fault: str, tmp_path: Path) -> None:
    members = [
        (f"{i}{suffix}", content) for i in range(4) for suffix, content in ((".png", PICTURES[0]), (".cls", b"0"))
    ]
    write_tar(tmp_path / "1.tar", members)
    whole = (tmp_path / "1.tar").read_bytes()
    assert len(shard_source(tmp_path, 1).labels) == 4
    if fault == "joined":
        changed = whole + whole
    else:
        with tarfile.open(tmp_path / "1.tar") as archive:
            place = archive.getmember("2.png").offset
        changed = whole[:place] + bytes(tarfile.BLOCKSIZE) + whole[place + tarfile.BLOCKSIZE :]
    (tmp_path / "1.tar").write_bytes(changed)
    with pytest.raises(ConfigError, match=r"1\.tar: damaged at byte \d+, or several tars in one file"):
        shard_source(tmp_path, 1)
    (tmp_path / "1.tar").write_bytes(whole + bytes(3 << 20))  # more zeros than usual are an end as well
    assert len(shard_source(tmp_path, 1).labels) == 4
