"""``pixelflow train`` as a group, and its pictures: every series of a log is in them, where it belongs."""

from __future__ import annotations

import builtins
import json
import random
import re
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixelflow_engine.checkpoint import bundled_models
from pixelflow_training import loop
from pixelflow_training.cli import train
from pixelflow_training.config import TrainConfig
from pixelflow_training.curves import Curve, read_curves, short_names
from pixelflow_training.plot import save_plot
from support.recipes import TINY_RECIPE

SVG = "{http://www.w3.org/2000/svg}"


def step(number: int, *losses: float | None, **more: Any) -> dict[str, Any]:
    measures = {"loss": 1.0, "grad_norm": 0.5, "lr": 1e-3, "images_per_second": 90.0}
    return {"event": "train", "step": number, "stage_loss": list(losses), **measures, **more}


def held_out(number: int, *losses: float | None) -> dict[str, Any]:
    return {"event": "held_out", "step": number, "stage_loss": list(losses), "seconds": 1.0}


def spike(number: int, stage: int, loss: float) -> dict[str, Any]:
    return {"event": "spike", "step": number, "stage": stage, "loss": loss, "median": loss / 9}


def skipped(number: int, *losses: str | None) -> dict[str, Any]:
    return {"event": "skipped", "step": number, "loss": "nan", "stage_loss": list(losses), "skipped": 1}


def written(folder: Path, *records: dict[str, Any], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return folder


def plotted(*arguments: object) -> None:
    result = CliRunner().invoke(train, ["plot", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"wrote {arguments[-1]}" in result.output


def series(svg: Path) -> dict[str, list[tuple[float, float]]]:
    """The points of each named series, in the picture's coordinates: a line's corners, or where its marks are."""
    found: dict[str, list[tuple[float, float]]] = {}
    for group in ET.parse(svg).getroot().iter(f"{SVG}g"):
        if re.fullmatch(r"run\d+-.*", name := group.get("id", "")):
            marks = [(float(use.get("x", "")), float(use.get("y", ""))) for use in group.iter(f"{SVG}use")]
            lines = [path for path in group.findall(f"{SVG}path") if path.get("clip-path")]
            corners = re.findall(r"[ML] (\S+) (\S+)", lines[0].get("d", "")) if lines else []
            found[name] = marks or [(float(x), float(y)) for x, y in corners]
    return found


def texts(svg: Path) -> list[str]:
    return ["".join(text.itertext()) for text in ET.parse(svg).getroot().iter(f"{SVG}text")]


# --- reading -----------------------------------------------------------------------------------------------


def test_a_log_becomes_curves(tmp_path: Path) -> None:
    run = written(
        tmp_path,
        step(20, 0.5, None, lr=1e-4),
        spike(33, 1, 9.0),
        skipped(35, "nan", None),
        held_out(40, 0.3, 0.25),
        step(40, 0.4, 0.2, grad_norm=2.5),
    )
    curves = read_curves(run, "it")
    assert (curves.name, curves.last, curves.skipped) == ("it", 40, (35,))
    assert [list(zip(c.steps, c.values, strict=True)) for c in curves.training] == [[(20, 0.5), (40, 0.4)], [(40, 0.2)]]
    assert [list(zip(c.steps, c.values, strict=True)) for c in curves.held_out] == [[(40, 0.3)], [(40, 0.25)]]
    assert [list(zip(c.steps, c.values, strict=True)) for c in curves.spikes] == [[], [(33, 9.0)]]
    assert {name: curve.values.tolist() for name, curve in curves.measures.items()} == {
        "lr": [1e-4, 1e-3],
        "grad_norm": [0.5, 2.5],
        "images_per_second": [90.0, 90.0],
    }


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = written(tmp_path, step(1, 0.5), end='{"event": "train", "step": 2, "stage_lo')
    assert read_curves(run, "").last == 1
    assert read_curves(run / "log.jsonl", "").last == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no step yet"),
        ('{"event": "train", "step": 1', "has no step yet"),  # its first line is being written
        ('{"event": "spike", "step": 1, "stage": 0, "loss": 3}\n', "has no step yet"),
        ("not a log\n", r"log.jsonl, line 1: expected a line of a training log"),
        ('{"event": "train", "step": 1, "stage_loss": [1.0]}\n{"step": 2}\n', "line 2: expected"),
        ('{"event": "train", "step": "1", "stage_loss": [1.0]}\n', "line 1: expected"),
        ('{"event": "held_out", "step": 1}\n', "line 1: expected"),
        ("[1]\n", "line 1: expected"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "log.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_curves(tmp_path, "")


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run: .*none.*expected a run directory"):
        read_curves(tmp_path / "none", "")
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl is not there"):
        read_curves(tmp_path, "")


def test_smoothing_is_the_mean_around_a_step() -> None:
    """By definition, point by point; the steps are uneven, as where steps were skipped."""
    rng = random.Random(7)
    steps = sorted(rng.sample(range(1000), 80))
    values = [rng.random() for _ in steps]
    for width in (0, 10, 60, 5000):
        expected = []
        for at in steps:
            reach = min(width / 2, at - steps[0])
            expected.append(statistics.fmean(v for s, v in zip(steps, values, strict=True) if abs(s - at) <= reach))
        curve = Curve.of(list(zip(steps, values, strict=True))).smoothed(width)
        assert curve.steps.tolist() == steps
        # Sums of up to 80 numbers below 1, one taken from another: 80 roundings of numbers up to 80, over one number.
        assert curve.values.tolist() == pytest.approx(expected, abs=80 * 80 * 2.0**-53)


# --- drawing -----------------------------------------------------------------------------------------------


def test_every_series_is_drawn_where_it_belongs(tmp_path: Path) -> None:
    """Two runs, of two stages and of three; marks are to scale along the steps and fall with the loss."""
    a = written(
        tmp_path / "a",
        *(step(s, 0.9 - s / 200, 0.5) for s in range(10, 110, 10)),
        skipped(25, "nan", "1.0"),
        spike(70, 1, 4.0),
        held_out(100, 0.5, 0.6),
    )
    b = written(tmp_path / "b", *(step(s, 0.4, None, 0.2) for s in (50, 200)), held_out(200, None, 0.3, 0.1))
    plotted(a, b, "--output", tmp_path / "two.svg")
    found = series(tmp_path / "two.svg")
    a_stages = {f"run0-stage{s}-{kind}" for s in (0, 1) for kind in ("raw", "smoothed", "held-out", "skipped")}
    measures = {f"run{r}-{name}" for r in (0, 1) for name in ("lr", "grad_norm", "images_per_second")}
    assert found.keys() == a_stages | {"run0-stage1-spikes"} | measures | {
        "run1-stage0-raw", "run1-stage0-smoothed", "run1-stage1-held-out", "run1-stage2-raw", "run1-stage2-smoothed",
        "run1-stage2-held-out",
    }  # fmt: skip
    falling = found["run0-stage0-raw"]
    assert len(falling) == 10
    assert [y for _, y in falling] == sorted(y for _, y in falling)  # down the page
    x0, x1 = falling[0][0], falling[-1][0]
    other = found["run1-stage0-raw"]
    scale = (x1 - x0) / 90
    # An SVG's coordinates have six decimals.
    assert [x for x, _ in other] == pytest.approx([x0 + 40 * scale, x0 + 190 * scale], abs=1e-4)
    assert [x for x, _ in found["run0-stage0-skipped"]] == pytest.approx([x0 + 15 * scale], abs=1e-4)
    (spike_at,) = found["run0-stage1-spikes"]
    assert spike_at[1] < min(y for _, y in found["run0-stage1-raw"])  # above
    said = texts(tmp_path / "two.svg")
    assert {"loss, stage 0", "loss, stage 1", "loss, stage 2", "learning rate", "gradient norm"} <= {*said}
    assert {"a (100 steps)", "b (200 steps)", "spike", "step skipped", "held out"} <= {*said}


def test_the_smoothed_line_is_smoothed(tmp_path: Path) -> None:
    run = written(tmp_path / "run", *(step(s, 0.5 + 0.1 * (s % 2)) for s in range(1, 41)))
    heights = {}
    for smooth in (0, 10):
        plotted(run, "--smooth", smooth, "--output", tmp_path / "x.svg")
        found = series(tmp_path / "x.svg")
        heights[smooth] = [[y for _, y in found[f"run0-stage0-{kind}"]] for kind in ("raw", "smoothed")]
    raw, line = heights[0]
    assert line == pytest.approx(raw, abs=1e-4)
    raw, line = heights[10]
    assert max(line[6:]) - min(line[6:]) < (max(raw) - min(raw)) / 5  # the mean of eleven turns by an eleventh


def test_nothing_is_marked_where_nothing_happened(tmp_path: Path) -> None:
    plotted(written(tmp_path / "a", step(1, 0.5), step(2, 0.4)), "--output", tmp_path / "x.svg")
    assert not {"spike", "step skipped"} & {*texts(tmp_path / "x.svg")}


@pytest.mark.parametrize(
    "records",
    [
        (step(1, 0.5),),
        (step(1, None, None),),
        (held_out(5, 0.1),),
        (skipped(1, "nan", "inf"),),
        (step(1, 0.0, grad_norm=0.0, lr=0.0), step(2, 0.0)),
        (step(1, 1e-9), step(2, 1e9)),
        (step(1, *[0.5] * 7), step(2, 0.5)),
        ({"event": "train", "step": 1, "stage_loss": [0.5]},),
    ],
    ids=["one line", "no values", "held out alone", "skipped alone", "zeros", "decades", "stages", "no measures"],
)
def test_little_and_odd_logs_are_drawn(tmp_path: Path, records: tuple[dict[str, Any], ...]) -> None:
    run = written(tmp_path / "run", *records)
    for name in ("x.svg", "x.png"):
        plotted(run, "--output", tmp_path / name)
    known = [loss for r in records if r["event"] == "train" for loss in r["stage_loss"] if loss is not None]
    drawn = series(tmp_path / "x.svg")
    assert sum(len(points) for name, points in drawn.items() if name.endswith("-raw")) == len(known)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_log_makes_the_same_picture(tmp_path: Path) -> None:
    run = written(tmp_path / "run", step(1, 0.5), step(2, 0.4))
    for kind in ("svg", "png"):
        plotted(run, "--output", tmp_path / f"a.{kind}")
        plotted(run, "--output", tmp_path / f"b.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_the_bundled_models_log_can_be_drawn(tmp_path: Path) -> None:
    folder = bundled_models()["digits"]
    plotted(folder, "--output", tmp_path / "digits.svg")
    found = series(tmp_path / "digits.svg")
    assert [len(found[f"run0-stage{s}-{kind}"]) for s in range(3) for kind in ("raw", "held-out")] == 3 * [600, 24]
    assert "digits (12000 steps)" in texts(tmp_path / "digits.svg")


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    logs = [written(tmp_path / name, step(1, 0.5)) for name in ("a/seed-0", "b/seed-0", "b/seed-1")]
    assert short_names(logs[1:]) == ["seed-0", "seed-1"]
    assert short_names([logs[1] / "log.jsonl", logs[2]]) == ["seed-0", "seed-1"]
    renamed = (logs[2] / "log.jsonl").rename(tmp_path / "kept.jsonl")
    assert short_names([renamed, logs[1]]) == ["kept", "seed-0"]
    assert short_names(logs) == [str(log) for log in logs]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--output", "x.pdf"], r"output: got x\.pdf, expected"), (["--smooth", "inf"], "smooth: got inf, expected 0")],
)
def test_what_cannot_be_drawn_is_said(tmp_path: Path, arguments: list[str], message: str) -> None:
    run = written(tmp_path / "run", step(1, 0.5))
    output = ["--output", str(tmp_path / "x.svg")]
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(train, ["plot", str(run), *output, *arguments], catch_exceptions=False)
    assert not (tmp_path / "x.svg").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return honest(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="extra `report`"):
        save_plot([read_curves(written(tmp_path, step(1, 0.5)), "")], tmp_path / "x.svg")


# --- the group ---------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Path, dict[str, Any]]]:
    """What training was asked for, which is not done."""
    calls: list[tuple[TrainConfig, Path, dict[str, Any]]] = []

    def instead(config: TrainConfig, output: Path, quiet: bool, **options: Any) -> Path:
        calls.append((config, output, {"quiet": quiet, **options}))
        return output / "model"

    monkeypatch.setattr(loop, "train", instead)
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "digits", "--output", "OUT", "steps=7", "optimizer.lr=3e-4"],
        ["--config", "digits", "steps=7", "--output", "OUT", "optimizer.lr=3e-4"],
        ["steps=7", "optimizer.lr=3e-4", "--config=digits", "--output", "OUT"],
        ["--output", "OUT", "--config", "digits", "--", "steps=7", "optimizer.lr=3e-4"],
        ["run", "--config", "digits", "--output", "OUT", "steps=7", "optimizer.lr=3e-4"],
    ],
)
def test_training_needs_no_name(asked: list[Any], tmp_path: Path, arguments: list[str]) -> None:
    folder = tmp_path / "plot"  # a run may be called what a command is
    words = [str(folder) if word == "OUT" else word for word in arguments]
    result = CliRunner().invoke(train, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ((config, output, options),) = asked
    assert (config.steps, config.optimizer.lr, output) == (7, 3e-4, folder)
    assert options == {"quiet": False, "fresh": False, "from_step": None}


def test_a_recipe_may_be_called_plot(asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plot").write_text(TINY_RECIPE.replace("resolution: 16", "resolution: 32"))
    result = CliRunner().invoke(train, ["--config", "plot", "--output", "run", "--quiet", "--from-step", "3"])
    assert result.exit_code == 0, result.output
    ((config, _, options),) = asked
    assert config.resolution == 32
    assert options == {"quiet": True, "fresh": False, "from_step": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--config'"),
        (["steps=3"], "Missing option '--config'"),
        (["--config", "digits", "--output", "x", "--nonsense"], "No such option: --nonsense"),
        (["plot"], "Missing argument 'RUN...'"),
        (["plot", "x", "--config", "digits"], "No such option: --config"),
    ],
)
def test_mistakes_are_said(asked: list[Any], arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", result.output).split())
    assert asked == []


def test_help_is_that_of_training_and_names_the_other_command() -> None:
    output = " ".join(CliRunner().invoke(train, ["--help"]).output.split())
    for word in ("--config", "--output", "--from-step", "key=value", "pixelflow train plot RUN"):
        assert word in output
    assert "--smooth" in CliRunner().invoke(train, ["plot", "--help"]).output
