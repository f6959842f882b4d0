"""The command line: what each command writes and prints, and that a mistake costs one line and changes nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import pixelflow_engine
from pixelflow_engine import PixelFlowEngine, StepEvent, cli, load_checkpoint, save_checkpoint
from pixelflow_engine.errors import CaptureError
from support.engines import tiny_engine

LABELS = [4, 4, 0, 0]
GENERATE = ("--class-label", 4, "--class-label", 0, "--images-per-label", 2, "--steps", 2, "--seed", 7)


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``pixelflow`` in this process, through ``main``; an exception that it lets escape fails the test."""
    # The commands that main adds, and the hook that typer installs, go when the test ends.
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    monkeypatch.setattr(cli.app, "registered_groups", list(cli.app.registered_groups))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["pixelflow", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Ran(code, captured.out, captured.err)

    return run


def saved(folder: Path, **overrides: Any) -> Path:
    """A tiny model on the disk."""
    engine = tiny_engine(**overrides)
    save_checkpoint(folder, engine.config, dict(engine.model.state_dict()))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes, three stages, 16 pixels."""
    return saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def engine(model: Path) -> PixelFlowEngine:
    return PixelFlowEngine.from_pretrained(model)


def arrays(engine: PixelFlowEngine, labels: list[int], **arguments: Any) -> NDArray[np.float32]:
    request = {"num_inference_steps": 2, "seed": 7, "output_type": "np"} | arguments
    images = engine(labels, **request).images
    assert isinstance(images, np.ndarray)
    return images


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- generate ----------------------------------------------------------------------------------------------


def test_generate_writes_the_images_of_the_engine(
    run: Run, model: Path, engine: PixelFlowEngine, tmp_path: Path
) -> None:
    output = tmp_path / "samples.npy"
    ran = run("generate", "--model", model, "--output", output, *GENERATE)
    assert ran.code == 0
    assert contents(tmp_path) == ["samples.npy"]
    assert np.load(output).tobytes() == arrays(engine, LABELS).tobytes()
    assert str(output) in ran.out
    for stage in ("4 x 4", "8 x 8", "16 x 16"):
        assert stage in ran.out


def test_generate_writes_every_kind_of_file(run: Run, model: Path, engine: PixelFlowEngine, tmp_path: Path) -> None:
    expected = np.rint(arrays(engine, LABELS) * 255).astype(np.uint8)
    for name in ("sheet.png", "samples.npz", "deep/folder/"):
        ran = run("generate", "--model", model, "--output", f"{tmp_path}/{name}", *GENERATE)
        assert ran.code == 0, ran.err
        assert f"{tmp_path}/{name.rstrip('/')}" in ran.out
    assert contents(tmp_path) == [
        "deep", "deep/folder", *(f"deep/folder/{i:06d}.png" for i in range(4)), "samples.npz", "sheet.png",
    ]  # fmt: skip
    with np.load(tmp_path / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], expected)
    for i in range(4):
        with Image.open(tmp_path / "deep" / "folder" / f"{i:06d}.png") as image:
            assert np.array_equal(np.asarray(image), expected[i])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (38, 38)
        assert np.array_equal(np.asarray(sheet)[20:36, 20:36], expected[3])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_give_the_images_of_the_same_seeds(
    batch_size: int, run: Run, model: Path, engine: PixelFlowEngine, tmp_path: Path
) -> None:
    output = tmp_path / "samples.npy"
    assert run("generate", "--model", model, "--output", output, *GENERATE, "--batch-size", batch_size).code == 0
    images = np.load(output)
    parts = [arrays(engine, LABELS[first : first + batch_size], seed=7 + first) for first in range(0, 4, batch_size)]
    assert images.tobytes() == np.concatenate(parts).tobytes()
    # Another batch size may take another matrix kernel: six float32 steps of a state of order 10 in [-1, 1] apart by
    # roundings, while an image of another seed is of order 0.1 away.
    whole = arrays(engine, LABELS)
    assert np.abs(images - whole).max() < 1e-3
    assert np.abs(whole[0] - whole[1]).mean() > 0.02, "seeds so alike that the comparison says nothing"


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--steps", "1,3,2"], {"num_inference_steps": [1, 3, 2]}),
        (["--guidance-scale", "1"], {"guidance_scale": 1.0}),
        (["--guidance-scale", "-1.5"], {"guidance_scale": -1.5}),
        (["--guidance-schedule", "constant"], {"guidance_schedule": "constant"}),
        (["--guidance-schedule", "1,2.5,0"], {"guidance_schedule": [1.0, 2.5, 0.0]}),
        (["--shift", "3"], {"shift": 3.0}),
        (["--solver", "dopri5"], {"solver": "dopri5"}),
        (["--noise", "public"], {"noise": "public"}),
        (["--height", "8", "--width", "24"], {"height": 8, "width": 24}),
        (["--seed", str(2**64 - 1)], {"seed": 2**64 - 1}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_hands_on_every_option(
    options: list[str],
    arguments: dict[str, Any],
    run: Run,
    model: Path,
    engine: PixelFlowEngine,
    tmp_path: Path,
) -> None:
    output = tmp_path / "samples.npy"
    ran = run("generate", "--model", model, "--output", output, *GENERATE, *options)
    assert ran.code == 0, ran.err
    images = np.load(output)
    assert images.tobytes() == arrays(engine, LABELS, **arguments).tobytes()
    plain = arrays(engine, LABELS)
    assert images.shape != plain.shape or not np.array_equal(images, plain), "the option makes no difference"


@pytest.mark.parametrize(
    ("labels", "each", "rows", "columns"), [([1, 3], 5, 2, 5), ([1], 7, 3, 3), ([1, 2, 3], 1, 2, 2)]
)
def test_a_sheet_of_several_labels_has_a_row_for_each(
    labels: list[int], each: int, rows: int, columns: int, run: Run, model: Path, tmp_path: Path
) -> None:
    wanted = [word for label in labels for word in ("--class-label", label)]
    output = tmp_path / "sheet.png"
    ran = run("generate", "--model", model, "--output", output, *wanted, "--images-per-label", each, "--steps", 1)
    assert ran.code == 0, ran.err
    side = PixelFlowEngine.from_pretrained(model).config.resolution
    with Image.open(output) as sheet:
        assert sheet.size == (columns * (side + 2) + 2, rows * (side + 2) + 2)


def test_generate_in_another_type(run: Run, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples.npy"
    assert run("generate", "--model", model, "--output", output, *GENERATE, "--dtype", "float64").code == 0
    double = PixelFlowEngine.from_pretrained(model, dtype=torch.float64)
    assert np.load(output).tobytes() == arrays(double, LABELS).tobytes()


def test_quiet_prints_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "one.png"
    assert run("generate", "--model", model, "--output", output, *GENERATE, "--quiet") == Ran(0, "", "")
    assert contents(tmp_path) == ["one.png"]


# --- mistakes ----------------------------------------------------------------------------------------------


def assert_one_line(ran: Ran, *said: str) -> None:
    """Code 2, nothing on stdout, and one line on stderr that says ``said``."""
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("pixelflow: ")
    assert ran.err.count("\n") == 1, f"not one line: {ran.err}"
    assert ran.err.endswith("\n")
    for part in said:
        assert part in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--class-label", "5"], None),  # the null class is a class: control, must work
        (["--class-label", "6"], ["pixelflow: class-label: got 6"]),
        (["--class-label", "-1"], ["pixelflow: class-label: got -1"]),
        (["--steps", "0"], ["pixelflow: steps: got 0"]),
        (["--steps", "1,0,1"], ["pixelflow: steps: got 0"]),
        (["--steps", "10,10"], ["steps", "got 2", "expected 3"]),
        (["--steps", "ten"], ["steps", "'ten'", "expected"]),
        (["--steps", "2.5"], ["steps", "'2.5'", "integer"]),
        (["--steps", ""], ["steps", "''", "expected"]),
        (["--guidance-scale", "nan"], ["pixelflow: guidance-scale: got nan"]),
        (["--guidance-schedule", "linear"], ["guidance-schedule", "'linear'"]),
        (["--guidance-schedule", "1,2"], ["pixelflow: guidance-schedule: got 2"]),
        (["--guidance-schedule", "1,inf,2"], ["pixelflow: guidance-schedule: got inf"]),
        (["--shift", "0"], ["shift", "0"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--seed", str(2**64)], ["seed", str(2**64)]),
        (["--height", "12"], ["height", "12", "multiple of 8"]),
        (["--width", "0"], ["width", "0", "multiple of 8"]),
        (["--noise", "public", "--batch-size", "1"], ["batch-size", "got 1"]),
        (["--model", "no-such-model"], ["no-such-model"]),
        (["--device", "abacus"], ["abacus"]),
        (["--device", "cuda:99"], ["cuda"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_costs_one_line_and_writes_nothing(
    options: list[str], said: list[str] | None, run: Run, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new folder" / "samples.npy"
    ran = run("generate", "--model", model, "--output", output, *GENERATE, *options)
    if said is None:
        assert ran.code == 0, ran.err
        assert output.exists()
    else:
        assert_one_line(ran, *said)
        assert contents(tmp_path) == []


@pytest.mark.parametrize("name", ["samples.jpg", "samples", "samples.npy.gz"])
def test_an_output_of_another_kind_is_refused_before_any_work(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PixelFlowEngine, "from_pretrained", lambda *_: pytest.fail("a model is loaded"))
    ran = run("generate", "--output", tmp_path / name, "--class-label", 1)
    assert_one_line(ran, "output", name, ".png, .npz, .npy or /")
    assert contents(tmp_path) == []


@pytest.mark.parametrize("kind", ["a.npy", "a.npz", "a.png", "a/"])
@pytest.mark.parametrize("reason", ["a file above", "read only"])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    reason: str, kind: str, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    if reason == "read only":

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "some temporary name")

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(PixelFlowEngine, "__call__", lambda *_, **__: pytest.fail("the model runs"))
    folder = tmp_path / ("file" if reason == "a file above" else "new")
    ran = run("generate", "--model", model, "--output", f"{folder / kind}", *GENERATE)
    assert_one_line(ran, str(folder))
    assert "temporary" not in ran.err
    assert contents(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["samples.npy", "samples/"])
def test_images_are_written_as_they_are_made(
    kind: str, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the third batch leaves the two in the folder, and nothing where a file would not be whole."""
    sample, calls = PixelFlowEngine.__call__, iter(range(3))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise FloatingPointError("lost")
        return sample(*arguments, **options)

    monkeypatch.setattr(PixelFlowEngine, "__call__", failing)
    ran = run(
        "generate", "--model", model, "--output", f"{tmp_path}/new/{kind}", *("--class-label", 1),
        *("--images-per-label", 6, "--batch-size", 2, "--steps", 1),
    )  # fmt: skip
    assert_one_line(ran, "lost")
    kept = ["new", "new/samples", *(f"new/samples/{i:06d}.png" for i in range(4))]
    assert contents(tmp_path) == (kept if kind == "samples/" else [])


def test_no_labels_are_refused(run: Run, model: Path, tmp_path: Path) -> None:
    assert_one_line(run("generate", "--model", model, "--output", tmp_path / "a.npy"), "class-label", "got none")
    assert contents(tmp_path) == []


def test_a_model_without_classes_is_asked_for_a_number_of_images(run: Run, tmp_path: Path) -> None:
    model = saved(tmp_path / "plain", num_classes=0)
    output = tmp_path / "samples.npy"
    request = ("generate", "--model", model, "--output", output, "--steps", 2, "--seed", 7)
    ran = run(*request, "--images", 3, "--batch-size", 2)  # without guidance by default: there is nothing to guide by
    assert (ran.code, ran.err) == (0, "")
    images = PixelFlowEngine.from_pretrained(model)(
        num_inference_steps=2, guidance_scale=1, seed=[7, 8, 9], output_type="np"
    ).images
    # The third image was in a batch of its own.
    np.testing.assert_allclose(np.load(output), images, rtol=0, atol=1e-5)
    output.unlink()
    assert_one_line(run(*request, "--images", 3, "--guidance-scale", 2.4), "guidance-scale", "2.4")
    assert_one_line(run(*request, "--class-label", 1), "class-label", "without classes")
    assert_one_line(run(*request, "--images-per-label", 16), "images-per-label", "without classes, but --images")
    assert_one_line(run(*request, "--guidance-scale", 1, "--images", 3, "--noise", "public"), "images", "expected 1")
    assert not output.exists()


def test_what_the_command_has_no_answer_for_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    text = saved(tmp_path / "text", num_classes=0, cross_attention_dim=12)
    ran = run("generate", "--model", text, "--output", tmp_path / "a.npy", "--images", 2)
    assert_one_line(ran, "model", "text encoder")
    ran = run("generate", "--model", model, "--output", tmp_path / "a.npy", "--images", 2)
    assert_one_line(ran, "images", "--class-label")
    assert contents(tmp_path) == ["text", "text/config.json", "text/model.safetensors"]


def test_a_folder_with_pictures_is_not_added_to(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "000007.png").write_text("of an earlier run")
    ran = run("generate", "--model", model, "--output", f"{tmp_path}/", *GENERATE)
    assert_one_line(ran, "output", "holds PNG files")
    assert contents(tmp_path) == ["000007.png"]


def test_an_output_that_cannot_be_written(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    ran = run("generate", "--model", model, "--output", tmp_path / "file" / "samples.npy", *GENERATE)
    assert_one_line(ran, str(tmp_path / "file"))
    assert contents(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_damaged_model_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    ran = run("generate", "--model", damaged, "--output", tmp_path / "a.npy", *GENERATE)
    assert_one_line(ran, "model.safetensors")
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--class-label", "1"],  # no output
        ["generate", "--output", "a.npy", "--class-label", "one"],
        ["generate", "--output", "a.npy", "--class-label", "1", "--images-per-label", "0"],
        ["generate", "--output", "a.npy", "--class-label", "1", "--batch-size", "0"],
        ["generate", "--output", "a.npy", "--class-label", "1", "--solver", "rk4"],
        ["generate", "--output", "a.npy", "--class-label", "1", "--noise", "loud"],
        ["generate", "--output", "a.npy", "--class-label", "1", "--dtype", "int8"],
        ["generate", "--output", "a.npy", "--class-label", "1", "--unknown"],
        ["quickstart", "--samples", "0"],
        ["quickstart", "--seed", "-1"],
        ["convert", "only-one"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_explained(
    arguments: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage: " in ran.err
    assert "Traceback" not in ran.err
    assert contents(tmp_path) == []


# --- convert, doctor, help ---------------------------------------------------------------------------------


def bits(path: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    state = load_checkpoint(path).state_dict
    return {name: (value.dtype, value.numpy().tobytes()) for name, value in state.items()}


def test_convert_there_and_back(run: Run, model: Path, tmp_path: Path) -> None:
    public, back = tmp_path / "public", tmp_path / "back"
    ran = run("convert", model, public, "--to", "public")
    assert ran.code == 0, ran.err
    count = sum(value.numel() for value in load_checkpoint(model).state_dict.values())
    assert ran.out == f"wrote {public}: {count:,} parameters\n"
    assert contents(public) == ["config.yaml", "model.pt"]
    assert run("convert", public, back).code == 0
    assert contents(back) == ["config.json", "model.safetensors"]
    assert load_checkpoint(back).config == load_checkpoint(public).config == load_checkpoint(model).config
    assert bits(back) == bits(public) == bits(model)


def test_convert_replaces_only_when_asked(run: Run, model: Path, tmp_path: Path) -> None:
    taken = saved(tmp_path / "taken", seed=2)
    before = {file.name: file.read_bytes() for file in taken.iterdir()}
    assert_one_line(run("convert", model, taken), str(taken))
    assert {file.name: file.read_bytes() for file in taken.iterdir()} == before
    assert run("convert", model, taken, "--overwrite").code == 0
    assert bits(taken) == bits(model)
    assert contents(tmp_path) == ["taken", "taken/config.json", "taken/model.safetensors"]


def test_convert_of_nothing(run: Run, tmp_path: Path) -> None:
    ran = run("convert", tmp_path / "nothing", tmp_path / "new")
    assert_one_line(ran, str(tmp_path / "nothing"))
    assert contents(tmp_path) == []


def test_doctor_says_what_is_there(run: Run) -> None:
    ran = run("doctor")
    assert ran.code == 0
    assert ran.err == ""
    assert torch.__version__ in ran.out
    for word in ("pixelflow-engine", "numpy", "cpu", "triton", "flash", "auto takes", "bundled models"):
        assert word in ran.out


def test_version(run: Run) -> None:
    assert run("--version") == Ran(0, f"pixelflow-engine {metadata.version('pixelflow-engine')}\n", "")


@pytest.mark.parametrize("command", ["generate", "quickstart", "doctor", "convert", "train", "eval"])
def test_every_command_is_listed_and_explains_itself(command: str, run: Run) -> None:
    listed = run("--help")
    assert listed.code == 0
    assert any(command in line.split()[:2] for line in listed.out.splitlines()), listed.out
    explained = run(command, "--help")
    assert (explained.code, explained.err) == (0, "")
    assert f" {command} " in explained.out


# --- quickstart --------------------------------------------------------------------------------------------


def test_quickstart_draws_every_digit(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "new" / "quickstart"
    ran = run("quickstart", "--output", output, "--samples", 2)
    assert ran.code == 0, ran.err
    assert contents(output) == ["cascade.webp", "digits.png"]
    assert str(output / "digits.png") in ran.out
    assert str(output / "cascade.webp") in ran.out
    engine = PixelFlowEngine.from_pretrained("digits")
    labels = [*range(10), *range(10)]  # a class is a column
    images = np.rint(arrays(engine, labels, num_inference_steps=10, seed=0) * 255).astype(np.uint8)
    side = 2 * engine.config.resolution + 2
    with Image.open(output / "digits.png") as sheet:
        assert sheet.size == (10 * side + 2, 2 * side + 2)
        drawn = np.asarray(sheet)
    for i, image in enumerate(images):
        top, left = 2 + i // 10 * side, 2 + i % 10 * side
        assert np.array_equal(drawn[top : top + side - 2 : 2, left : left + side - 2 : 2], image)
    steps = 10 * engine.config.scheduler.num_stages
    frames, milliseconds = [], 0
    with Image.open(output / "cascade.webp") as animation:
        assert animation.size == (10 * side + 2, 2 * side + 2)
        for i in range(animation.n_frames):  # type: ignore[attr-defined]
            animation.seek(i)
            frames.append(np.asarray(animation.convert("RGB")).astype(int))
            milliseconds += animation.info["duration"]
    # A stage's last step is a thousandth of the stage: where no pixel changes, the format joins it to the step before.
    assert steps - engine.config.scheduler.num_stages <= len(frames) <= steps
    assert milliseconds == 120 * (steps - 1) + 2000
    first, last = frames[0], frames[-1]
    # The format is lossy: a few of 255 levels on average, where noise is tens away.
    assert np.abs(last - drawn).mean() < 8
    assert np.abs(first - drawn).mean() > 24


def test_quickstart_quietly(run: Run, tmp_path: Path) -> None:
    ran = run("quickstart", "--output", tmp_path, "--samples", 1, "--quiet")
    assert (ran.code, ran.err) == (0, "")
    named = [line.rpartition(" ")[2] for line in ran.out.splitlines()]
    assert named == [str(tmp_path / "digits.png"), str(tmp_path / "cascade.webp")]


# --- the progress bar --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "batches"), [(3, 1), (3, 2), (1, 1), (1, 3)])
def test_the_bar_fills_to_its_end(stages: int, batches: int) -> None:
    state = torch.zeros(1, 3, 4, 4)
    with cli.CascadeBar(stages * batches, disable=False) as bar:
        reached = [bar.bar.n]
        for _ in range(batches):
            for stage in range(stages):
                for step, tau in enumerate((0.25, 0.9, 1.0)):
                    bar.step(StepEvent(stage=stage, step=step, tau=tau, latents=state))
                    reached.append(bar.bar.n)
    assert reached == sorted(reached), "the bar went back"
    assert reached[-1] == pytest.approx(stages * batches)


# --- a process of its own ----------------------------------------------------------------------------------


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pixelflow_engine.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def test_a_process_of_its_own_says_nothing_else(model: Path, engine: PixelFlowEngine, tmp_path: Path) -> None:
    output = tmp_path / "samples.npz"
    done = process("generate", "--model", model, "--output", output, *GENERATE, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with np.load(output) as archive:
        difference = archive["arr_0"].astype(int) - np.rint(arrays(engine, LABELS) * 255)
    assert np.abs(difference).max() <= 1, "more than a rounding apart (the process may have fewer threads)"


def test_a_mistake_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    done = process("generate", "--model", model, "--output", tmp_path / "a.npy", "--class-label", 9)
    assert_one_line(Ran(done.returncode, done.stdout, done.stderr), "class-label: got 9", "got 9", "0 to 5")
    assert contents(tmp_path) == []


@pytest.mark.parametrize("asked", ["--help", "bench --help"])
def test_help_imports_no_torch(asked: str) -> None:
    """Which takes longer than all the rest."""
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    code += "from pixelflow_engine.cli import main; main()"
    command = [sys.executable, "-c", code, *asked.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert len(done.stdout.splitlines()) > 1


WITH_A_NOTE = CaptureError("no graph")
WITH_A_NOTE.add_note("and no checkpoint")  # what went wrong on the way out, say


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WITH_A_NOTE, "no graph\nand no checkpoint"),
        (MemoryError("out of memory: 3 images at once"), "out of memory: 3 images at once"),
        (torch.cuda.OutOfMemoryError("out of memory: 3 images at once"), "out of memory: 3 images at once"),
    ],
    ids=["notes", "host memory", "device memory"],
)
def test_an_error_is_told_without_a_traceback(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.metadata, "entry_points", lambda **_: ())
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == f"pixelflow: {said}\n"


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, pixelflow_engine as p; assert 'torch' not in sys.modules; "
    code += "assert set(p.__all__) <= set(dir(p)); print(all(callable(getattr(p, n)) for n in p.__all__)); "
    code += "from pixelflow_engine import *; print(PixelFlowEngine is p.engine.PixelFlowEngine)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pixelflow_engine.nothing  # noqa: B018


def test_the_bundled_model_samples_without_torchs_compiler() -> None:
    """Its import would take as long as all else until a first digit."""
    code = (
        "import sys; from pixelflow_engine import PixelFlowEngine; engine = PixelFlowEngine.from_pretrained('digits'); "
    )
    code += "engine([3], num_inference_steps=1); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
