"""Launch configurations chosen from records, and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.suites.tuning.choose import Choice, choose, merged, tuning_table
from pixelflow_benchmarks.suites.tuning.spaces import SPACES, TIED, Config, grid
from pixelflow_benchmarks.suites.tuning.tunables import KERNELS, tunables
from pixelflow_kernels import configs

CPU = torch.device("cpu")
PRESENT = {"BLOCK": 64, "num_warps": 4}


def config(block: int, **more: int) -> Config:
    return {"BLOCK": block, "num_warps": 4, **more}


# --- choosing ----------------------------------------------------------------------------------------------


def record(
    setting: Config,
    microseconds: float,
    problem: str = "p",
    shape_class: str = "c",
    kernel: str = "op.kernel",
    **more: Any,
) -> dict[str, Any]:
    found = {"kind": "candidate", "kernel": kernel, "problem": problem, "shape_class": shape_class, "config": setting}
    found |= {"present": False, "result": "timed", "same_bits": True, "captured": True, "rounds": 9}
    found |= {"median": microseconds, "low": 0.99 * microseconds, "high": 1.01 * microseconds}
    return found | more


def present(microseconds: float, **more: Any) -> dict[str, Any]:
    return record(more.pop("setting", PRESENT), microseconds, present=True, **more)


def the_choice(*records: dict[str, Any]) -> Choice:
    (found,) = choose([{"kind": "environment"}, *records, {"kind": "end"}])
    return found


def test_the_fastest_is_chosen() -> None:
    others = [record(config(32), 90, same_bits=False), record(config(128), 80), record(config(8), 95)]
    found = the_choice(present(100), *others)
    assert found.ratio == pytest.approx(0.8)
    assert found == Choice("op.kernel", "c", PRESENT, config(128), found.ratio, ("p",), 4, 4, True)
    assert found.changed


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"median": 97}, True),
        ({"median": 98.1, "low": 98, "high": 98.2}, False),  # not 2 %
        ({"median": 90, "low": 80, "high": 98.9}, True),
        ({"median": 90, "low": 80, "high": 99.1}, False),  # the spreads overlap
        ({"median": 50, "result": "wrong"}, False),
        ({"median": 50, "result": "spills"}, False),
        ({"median": 50, "captured": False}, False),  # the host's time is in it
    ],
)
def test_only_what_is_clearly_faster_is_chosen(change: dict[str, Any], taken: bool) -> None:
    found = the_choice(present(100), record(config(32), 96) | {"high": 96} | change)
    assert found.changed == taken
    assert found.ratio == (pytest.approx(change["median"] / 100) if taken else 1.0)


def test_a_shape_class_is_decided_by_the_geometric_mean_of_its_problems() -> None:
    def times(setting: Config, a: float, b: float, c: float) -> list[dict[str, Any]]:
        return [record(setting, t, problem=p) for p, t in zip("abc", (a, b, c), strict=True)]

    base = [r | {"present": True} for r in times(PRESENT, 100, 10, 1)]
    best_sum = times(config(32), 80, 11, 1.1)  # 0.99: not enough
    best_mean = times(config(128), 95, 9, 0.9)
    found = the_choice(*base, *best_sum, *best_mean)
    assert found.chosen == config(128)
    assert found.ratio == pytest.approx((0.95 * 0.9 * 0.9) ** (1 / 3))
    assert found.problems == ("a", "b", "c")


def test_what_was_not_timed_on_every_problem_is_not_chosen() -> None:
    found = the_choice(
        present(100, problem="a"), present(100, problem="b"), record(config(32), 10, problem="a"),
        record(config(128), 90, problem="a"), record(config(128), 90, problem="b"),
        record(config(8), 5, problem="b") | {"result": "failed"}, record(config(8), 5, problem="a"),
    )  # fmt: skip
    assert (found.chosen, found.timed, found.tried) == (config(128), 2, 4)


def test_a_present_configuration_that_does_not_run_is_replaced() -> None:
    failed = {"kind": "candidate", "kernel": "op.kernel", "problem": "p", "shape_class": "c", "config": PRESENT}
    failed |= {"present": True, "result": "failed", "reason": "OutOfResources"}
    found = the_choice(failed, record(config(32), 90), record(config(128), 80))
    assert (found.chosen, found.ratio) == (config(128), None)
    nothing = the_choice(failed, record(config(32), 90) | {"result": "wrong"})
    assert not nothing.changed


def test_a_time_of_nothing_is_no_error() -> None:
    """Times are differences: a very short kernel's may be negative."""
    assert the_choice(present(100), record(config(32), -1.0)).changed


ATTENTION = "varlen_attention.forward"
TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}
NARROW = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}
SMALL = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4}


def attention(length: str, setting: Config, microseconds: float, **more: Any) -> dict[str, Any]:
    return record(setting, microseconds, length, f"half-lanes80-{length}", ATTENTION, **more)


def chosen(*records: dict[str, Any]) -> dict[str, Config]:
    return {c.shape_class.rpartition("-")[2]: c.chosen for c in choose(records)}


def test_what_decides_an_images_bits_changes_for_short_and_long_members_together() -> None:
    """With other keys a turn in short packs, an image alone would not have the bits that it has beside a longer one."""
    long_, short = attention("long", TILES, 100, present=True), attention("short", TILES, 100, present=True)
    faster = attention("long", NARROW, 80)
    assert chosen(long_, faster) == {"long": TILES}, "nothing is known about short members"
    assert chosen(long_, faster, short) == {"long": TILES, "short": TILES}
    assert chosen(long_, faster, short, attention("short", NARROW, 110)) == {"long": NARROW, "short": NARROW}
    assert chosen(long_, faster, short, attention("short", NARROW, 130)) == {"long": TILES, "short": TILES}
    barely = (attention("long", NARROW, 99), attention("short", NARROW, 98))
    assert chosen(long_, short, *barely) == {"long": TILES, "short": TILES}
    fixed = NARROW | {"FIXED_MAX_TILES": 8}
    assert chosen(long_, faster, short, attention("short", fixed, 50)) == {"long": TILES, "short": TILES}


def test_what_decides_no_bits_changes_alone() -> None:
    long_, short = attention("long", TILES, 100, present=True), attention("short", TILES, 100, present=True)
    assert chosen(long_, short, attention("short", SMALL, 80)) == {"long": TILES, "short": SMALL}
    # Better than both changes together.
    records = (
        long_,
        short,
        attention("short", SMALL, 50),
        attention("long", NARROW, 90),
        attention("short", NARROW, 60),
    )
    assert chosen(*records) == {"long": TILES, "short": SMALL}


def test_classes_whose_tied_values_stay_are_chosen_one_by_one() -> None:
    """Short members' gain is within the noise, and what long members gain is no reason to take it."""
    records = [attention(length, TILES, 100, present=True) for length in ("long", "short")]
    assert chosen(*records, attention("long", SMALL, 60), attention("short", SMALL, 99)) == {
        "long": SMALL,
        "short": TILES,
    }


def test_tied_values_stay_where_a_present_configuration_does_not_run() -> None:
    long_, short = attention("long", TILES, 100, present=True), attention("short", TILES, 100, present=True)
    others = (attention("long", NARROW, 80), attention("short", NARROW, 50), attention("short", SMALL, 60))
    assert chosen(long_, short | {"result": "failed"}, *others) == {"long": TILES, "short": SMALL}


# --- what there is to tune ---------------------------------------------------------------------------------


def test_every_space_can_be_written_as_a_table(tmp_path: Path) -> None:
    for kernel, space in SPACES.items():
        assert len({repr(sorted(c.items())) for c in space}) == len(space), f"{kernel}: a candidate twice"
        for candidate in space:
            configs.write_table({kernel: {"class": candidate}}, tmp_path / "table.json")
    assert {*TIED} <= {*SPACES}
    default = configs.read_table(configs.FOLDER / "default.json")
    assert {*SPACES} <= {*default}


def test_sums_along_rows_of_scores_do_not_cross_warps() -> None:
    """So the order of a sum depends on the keys of a turn alone, which are tied, not on how many warps share it."""
    for candidate in SPACES[ATTENTION]:
        assert candidate["BLOCK_M"] >= 16 * candidate["num_warps"]


def test_a_grid_has_every_combination() -> None:
    assert grid(({"a": 1}, {}), ({"b": 2}, {"b": 3})) == ({"a": 1, "b": 2}, {"a": 1, "b": 3}, {"b": 2}, {"b": 3})


def test_kernels_come_by_importance() -> None:
    def named(*names: str) -> list[str]:
        return [t.kernel for t in tunables(names, (0,), 1, torch.float32, CPU)]

    assert named() == [*KERNELS]
    operations = [*dict.fromkeys(kernel.split(".")[0] for kernel in KERNELS)]
    assert operations == ["varlen_attention", "rope2d", "modulate", "ode_step", "cascade", "adamw"]
    assert KERNELS[0] == ATTENTION
    assert named("cascade.pairs", "rope2d") == ["rope2d.forward", "rope2d.backward", "rope2d.rotate", "cascade.pairs"]
    with pytest.raises(ValueError, match="op: got 'rope3d', expected one of varlen_attention, rope2d"):
        named("rope3d")
    with pytest.raises(ValueError, match="stage: got 4, expected 0 to 3"):
        tunables((), (4,), 1, torch.float32, CPU)


# --- writing, and the command ------------------------------------------------------------------------------


def choice(kernel: str, shape_class: str, new: Config) -> Choice:
    return Choice(kernel, shape_class, PRESENT, new, 0.9, ("p",), 2, 3, False)


def test_only_what_changed_is_merged() -> None:
    table = {"op.a": {"x": config(1), "y": config(2)}, "op.b": {"x": config(4)}}
    found = merged(
        table, [choice("op.a", "x", config(8)), choice("op.b", "x", PRESENT), choice("op.c", "z", config(16))]
    )
    assert found == {"op.a": {"x": config(8), "y": config(2)}, "op.b": {"x": config(4)}, "op.c": {"z": config(16)}}
    assert table["op.a"]["x"] == config(1)


def test_the_table_says_what_changes() -> None:
    kept = Choice("op.b", "x", PRESENT, PRESENT, 1.0, ("p", "q"), 1, 3, True)
    first, second = tuning_table([choice("op.a", "x", config(8)), kept], "GPU").rows
    assert first == ("op.a", "x", "BLOCK 64 num_warps 4", "BLOCK 8 num_warps 4", "0.900", "p", "2 of 3", "other")
    assert second[3:] == ("keep", "1.000", "p, q", "1 of 3", "same")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables of our own in place of the shipped ones."""
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.setattr(configs, "FOLDER", folder)
    yield folder
    configs._shipped.cache_clear()


def measured(path: Path, *records: dict[str, Any], arch: int = 90) -> Path:
    head = {"kind": "environment", "gpu": "a GPU", "arch": arch}
    path.write_text("".join(json.dumps(r) + "\n" for r in (head, *records)))
    return path


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(bench, ["tune", *map(str, arguments)])


def test_a_cpu_is_refused() -> None:
    result = run("--device", "cpu")
    assert str(result.exception) == (
        "device: got 'cpu', expected a GPU: configurations are measured on the one that they are for"
    )
    assert isinstance(result.exception, ValueError)


def test_records_are_chosen_from_and_written_on_any_machine(folder: Path, tmp_path: Path) -> None:
    path = folder / "sm_90.json"
    configs.write_table({"op.kernel": {"other": config(16)}}, path)
    before = path.read_text()
    file = measured(tmp_path / "r.jsonl", present(100), record(config(32), 80), {"kind": "left out", "kernel": "op.z"})
    result = run("--from", file)
    assert result.exit_code == 0, result.output
    assert "0.800" in result.output
    assert "no time for: op.z" in result.output
    assert path.read_text() == before, "nothing is written without --write"
    assert run("--from", file, "--write").exit_code == 0
    assert configs.read_table(path) == {"op.kernel": {"c": config(32), "other": config(16)}}


def test_what_is_kept_writes_nothing(folder: Path, tmp_path: Path) -> None:
    file = measured(tmp_path / "r.jsonl", present(100), record(config(32), 99), arch=89)
    result = run("--from", file, "--write")
    assert result.exit_code == 0, result.output
    assert not [*folder.iterdir()]


def test_records_of_another_command_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"kind": "environment"}\n')
    result = run("--from", tmp_path / "r.jsonl")
    assert isinstance(result.exception, ValueError)
    assert "expected JSON lines that `bench tune --output` wrote" in str(result.exception)


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, found: Callable[[], Iterator[dict[str, Any]]]) -> None:
    from pixelflow_benchmarks.commands import tune

    monkeypatch.setattr(tune, "_gpu", lambda device: CPU)
    monkeypatch.setattr(tune, "_tune", lambda *_: found())


def test_an_interrupted_run_keeps_what_it_has(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Iterator[dict[str, Any]]:
        yield {"kind": "environment", "gpu": "a GPU", "arch": 90}
        yield present(100)
        yield record(config(32), 80)
        raise KeyboardInterrupt

    pretend_a_gpu(monkeypatch, found)
    output = tmp_path / "records.jsonl"
    result = run("--output", output, "--write", "--quiet")
    assert result.exit_code == 0, result.output
    assert "interrupted" in result.output
    assert [json.loads(line)["kind"] for line in output.read_text().splitlines()] == ["environment"] + 2 * ["candidate"]
    assert configs.read_table(folder / "sm_90.json") == {"op.kernel": {"c": config(32)}}
    assert isinstance(run("--output", output).exception, FileExistsError)


def test_interrupted_before_anything_is_measured_it_just_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt
        yield {}

    pretend_a_gpu(monkeypatch, found)
    result = run("--quiet", "--output", tmp_path / "records.jsonl")
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), "no error about --from, which was not given"
    assert not (tmp_path / "records.jsonl").exists()


def test_an_unknown_operation_leaves_no_file(tmp_path: Path) -> None:
    result = run("--op", "rope3d", "--output", tmp_path / "records.jsonl")
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith("op: got 'rope3d', expected one of 'varlen_attention', 'rope2d', ")
    assert not (tmp_path / "records.jsonl").exists()
