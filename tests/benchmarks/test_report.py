"""The report of result files: whole, of itself, and true to what the files say."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.analysis.report import report
from pixelflow_benchmarks.analysis.suite_tables import general_table, table_of
from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness.results import Run
from support.results import HEAD, measurement, run_of, spread_of, write_runs

NAME = "2026-01-01-abc.jsonl"
GPU = {"gpu": "A GPU", "device": "a-gpu", "sm_mhz": 1980, "celsius": 30, "held_down_by": ["GpuIdle"]}
HOT = {"kind": "end", "sm_mhz": 1700, "celsius": 60, "held_down_by": ["SwPowerCap"]}
CEILINGS = {"kind": "ceilings", "bytes_per_second": 1e12, "flops_per_second": 1e14, "dtype": "bfloat16"}
WRONG = {"kind": "measurement", "case": "a", "variant": "broken", "right": False, "fault": "zeros"}
ABSENT = {"kind": "absent", "variant": "flash", "reason": "not installed"}
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


@dataclass
class Table:
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A page taken apart; a tag that is not closed, or closed twice, fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[Table] = []
        self.headings: list[str] = []
        self.badges: list[str] = []
        self.text = ""
        self._spans: list[tuple[int, str]] = []
        self._cell: str | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append(Table())
        if tag == "tbody":
            self._spans = []
        if tag == "tr":
            self.tables[-1].rows.append([cell for _, cell in self._spans])
            self.tables[-1].marks.append(found.get("class") or "")
            self._spans = [(left - 1, cell) for left, cell in self._spans if left > 1]
        if tag in ("td", "th", "h2", "h3", "h4"):
            self._cell = ""
            self._rows = int(found.get("rowspan") or 1)
        if tag == "span" and "badge" in (found.get("class") or ""):
            self.badges.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"nothing open at </{tag}>"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
        if tag in ("td", "th"):
            assert self._cell is not None
            self.tables[-1].rows[-1].append(self._cell)
            if self._rows > 1:
                self._spans.append((self._rows - 1, self._cell))
        elif tag in ("h2", "h3", "h4"):
            self.headings.append(self._cell or "")

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self._cell is not None:
            self._cell += data
        if "caption" in self.open:
            self.tables[-1].caption += data
        if self.badges and not self.badges[-1]:
            self.badges[-1] = data

    def row(self, *start: str) -> tuple[list[str], str]:
        """The first row that begins with these cells, and its class."""
        for table in self.tables:
            for cells, mark in zip(table.rows, table.marks, strict=True):
                if tuple(cells[: len(start)]) == start:
                    return cells, mark
        raise AssertionError(f"no row {start}")


def image(variant: str, median: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    times = {o: spread_of(1 / median) for o in ("reference", "reference, noise block by block")}
    figures = {"floor_seconds": 0.1, "fraction_of_floor": 0.1 / median, "first_seconds": 9.0, "batch": batch}
    return measurement(f"batch {batch}, euler 4", variant, median, per="image", times=times, **figures, **more)


def stage(number: int, variant: str, median: float, **more: Any) -> dict[str, Any]:
    tokens = 64 * 4**number
    figures = {"floor_seconds": 1e-3, "fraction_of_floor": 1e-3 / median, "flops": 1e9, "bytes": 1e6 * (number + 1)}
    place = {"stage": number, "batch": 16, "tokens": tokens}
    return measurement(f"stage {number}, batch 16, euler", variant, median, per="image and evaluation", **place,
                       **figures, times={"reference": spread_of(2e-3 / median)}, **more)  # fmt: skip


def kernel(op: str, variant: str, median: float, flops: float = 0) -> dict[str, Any]:
    rates = {"gigabytes_per_second": 1.0, "fraction_of_copy": 0.5}
    rates |= {"teraflops": 1.0, "fraction_of_product": 0.5} if flops else {}
    figures = {"floor_seconds": 1e-6, "fraction_of_floor": 1e-6 / median, "flops": flops, "bytes": 1e6}
    return measurement(
        op, variant, median, captured=True, times={"eager": spread_of(1e-5 / median)}, **figures, **rates
    )


IMAGES = run_of(
    "images", CEILINGS, image("reference", 1.0), image("engine", 0.5), image("engine", 0.4, batch=16), ABSENT,
    {**WRONG, "case": "batch 1, euler 4"}, shape="tiny", dtype="float32",
)  # fmt: skip
STAGES = Run("stages", "2026-01-02T00:00:00+00:00", [
    {**HEAD, **GPU, "shape": "xl", "dtype": "bfloat16"}, CEILINGS,
    *(stage(n, v, m) for n in (1, 0) for v, m in (("reference", 2e-3), ("triton/graphs", 1.5e-3 + n * 1e-4))),
    {"kind": "skipped", "case": "stage 3, batch 16, euler", "variants": ["reference"]}, HOT,
])  # fmt: skip
KERNELS = run_of(
    "kernels", CEILINGS, *(kernel(f"attention.forward/stage{s}-b1", v, m, 1e8) for s in (1, 0)
                           for v, m in (("ours", 3e-6), ("eager", 1e-5))), kernel("rope/stage0-b1", "ours", 2e-6),
    {**ABSENT, "case": "rope/stage0-b1"}, {**WRONG, "case": "rope/stage0-b1"}, dtype="float32", batch=1,
)  # fmt: skip
NEW = run_of(
    "a suite of tomorrow",
    measurement("step", "ours", 0.25, mfu=0.391, peak_bytes=3 * 2**30, joules=2.5),
    measurement("import", "ours", 0.125, breakdown={"forward": 0.3}),
    {"kind": "note", "text": "x"},
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_runs(folder / "a-cpu" / NAME, IMAGES, KERNELS, NEW)
    write_runs(folder / "a-gpu" / NAME, STAGES)
    return folder


@pytest.fixture(scope="module")
def text(everything: Path) -> str:
    return report(everything)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def page_of(tmp_path: Path, *runs: Run) -> Page:
    return Page(report(write_runs(tmp_path / NAME, *runs)))


def test_the_page_needs_nothing_beside_it(text: str, page: Page) -> None:
    assert not re.search(r"https?:|//\w|@import|<!DOCTYPE svg|<\?xml", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    assert [tag for tag, _ in page.tags].count("style") == 1, "a plot's rules would hold for the whole page"
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in text


def test_links_lead_somewhere_and_names_are_unique(page: Page) -> None:
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    used = [(attributes.get("href") or "")[1:] for _, attributes in page.tags if "href" in attributes]
    assert used
    assert set(used) <= set(names)


def test_who_cannot_see_it_is_told(page: Page) -> None:
    count = {tag: sum(name == tag for name, _ in page.tags) for tag in ("figure", "figcaption", "table", "caption")}
    assert count["figure"] == count["figcaption"] > 8
    assert count["table"] == count["caption"] == len(page.tables)
    assert all(table.caption for table in page.tables)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") or (attributes.get("role") == "img" and attributes.get("aria-label"))


@pytest.mark.parametrize("run", [IMAGES, STAGES, KERNELS, NEW], ids=lambda run: run.suite)
def test_every_measurement_is_in_a_table(run: Run, page: Page) -> None:
    tables = table_of(run)
    assert tables
    rows = {tuple(row) for table in page.tables for row in table.rows}
    for table in tables:
        assert set(table.without_empty().rows) <= rows
    for r in run.of_kind("measurement"):
        page.row(r["case"], r["variant"])


def test_a_suite_without_a_table_shows_all_its_figures(page: Page) -> None:
    cells, _ = page.row("step", "ours")
    assert cells[2:] == ["250 ms (248 ms to 252 ms)", "call", "39 %", "3.00 GiB", "2.50 J", ""]
    assert page.row("import", "ours")[0][-1] == "0.3"
    assert "1 of kind note" in page.text


def test_every_kind_of_plot_is_there(page: Page) -> None:
    for heading in ("Time against the floor", "Side by side", "Roofline", "Scaling over tokens", "Scaling over batch",
                    "Energy", "Peak memory", "The first call", "Share of the floor"):  # fmt: skip
        assert heading in page.headings, heading
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "role" in attributes]
    assert "batch 1, euler 4: the fastest of 2 is engine with 500 ms, the floor is 100 ms" in labels


def test_clocks_that_were_held_down_at_work_are_said(tmp_path: Path) -> None:
    """At the begin and the end a GPU is idle, which holds every clock down."""
    idle = {"held_down_by": ["GpuIdle"]}
    hot = measurement("stage 0", "ours", 1.0, at_work={"held_down_by": ["SwPowerCap", "GpuIdle"]})
    write_runs(tmp_path / "2026-01-01-abc.jsonl", run_of("stages", hot, **idle))
    assert "clocks held down: SwPowerCap<" in report(tmp_path)


def test_what_was_wrong_or_absent_is_said(page: Page) -> None:
    assert page.row("rope/stage0-b1", "broken")[1] == "wrong"
    assert page.row("rope/stage0-b1", "flash")[1] == "absent"
    assert page.row("rope/stage0-b1", "ours")[1] == ""
    assert "batch 1, euler 4, broken: zeros" in page.text
    assert "flash: not installed" in page.text
    assert page.text.count("wrong: no time") == 2, "in the plot and in the table"
    assert "stage 3, batch 16, euler: reference" in page.text
    assert "1 wrong result" in page.badges


def test_bytes_that_were_wrong_are_said_and_have_a_place(tmp_path: Path) -> None:
    case = {"kind": "memory", "case": "tiny, stage 1, batch 1", "counted": False}
    figures = {"weights_bytes": 2**20, "activation_bytes": 2**21, "peak_bytes": 3 * 2**20}
    right, wrong = ({**case, "right": True, **figures}, {**case, "right": False, "fault": "zeros"})
    found = page_of(tmp_path, run_of("memory", {**right, "variant": "ours"}, {**wrong, "variant": "theirs"}))
    assert "1 wrong result" in found.badges
    assert "wrong:\N{NO-BREAK SPACE}1" in found.row("a-cpu", "Memory")[0]
    assert "tiny, stage 1, batch 1, theirs: zeros" in found.text
    assert found.row("tiny, stage 1, batch 1", "theirs")[1] == "wrong"
    assert "no place for" not in found.text


def test_what_no_time_was_left_for_is_said_as_exactly_as_its_record(tmp_path: Path) -> None:
    reason = {"kind": "skipped", "reason": "no time was left"}
    found = page_of(
        tmp_path,
        run_of("images", {**reason, "case": "batch 1, euler 4", "variant": "engine"}, {**reason, "case": "batch 16"}),
        run_of("memory", {**reason, "case": "tiny, stage 3", "variants": ["a", "b"]}),
        run_of("kernels", {"kind": "skipped", "reason": "no time was left after 3 cases"}),
    )
    lines = found.text.splitlines()
    said = (
        "batch 1, euler 4: engine",
        "batch 16",
        "tiny, stage 3: a, b",
        "further cases: no time was left after 3 cases",
    )
    for line in said:
        assert any(line in one for one in lines), line


def test_the_state_of_the_device_is_said(page: Page) -> None:
    assert "clocks held down: SwPowerCap" in page.badges
    assert "1980 → 1700 MHz" in page.text
    assert "GpuIdle → SwPowerCap" in page.text
    assert "uncommitted changes" not in page.badges
    assert page.badges.count("complete") == 4


def test_what_was_not_measured_is_said(page: Page, tmp_path: Path) -> None:
    for suite in ("Whole images", "Kernels", "Training", "Memory", "Cold start"):
        assert page.row("a-gpu", suite)[0][2] == "not measured"
    assert page.row("a-cpu", "Stages") == (["a-cpu", "Stages", "not measured", "", "", "", ""], "absent")
    assert page.row("a-cpu", "Kernels")[0][4] == "6"
    gpu = page_of(tmp_path, STAGES)
    assert gpu.headings.count("Energy") == 1, "no joules in the run of a GPU"
    assert "Energy\nNot measured." in gpu.text
    alone = page_of(tmp_path, NEW)
    assert "Not measured: none of the results is of a GPU." in alone.text
    assert alone.row("GPU", "all suites")[0][2] == "not measured"
    empty = page_of(tmp_path, run_of("stages", shape="xl", dtype="bfloat16"))
    assert "Not measured: the run has no measurement." in empty.text


def test_a_run_that_was_cut_short_is_said_to_be(tmp_path: Path) -> None:
    short = Run("kernels", KERNELS.began, [{**KERNELS.records[0], "commit": "abc+changes"}, *KERNELS.records[2:-1]])
    found = page_of(tmp_path, short)
    assert {"cut short", "uncommitted changes"} <= set(found.badges)
    assert "complete" not in found.badges
    assert "it has no end" in found.text
    assert "own table needs more" in found.text, "there are no ceilings"
    assert found.row("rope/stage0-b1", "ours")[0][2].startswith("2.00 µs")


HOSTILE = '<script>alert(\'1\')</script>" onload="x" & $\\frac$ id="q" #010203 </svg>\ud800\x00'
SHOWN = HOSTILE.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")


def test_names_are_text_whatever_they_are(tmp_path: Path) -> None:
    odd = measurement(HOSTILE, HOSTILE, 1.0, per=HOSTILE, times={HOSTILE: spread_of(1.0)}, joules=1.0, flops=2.0,
                      bytes=1.0, batch=2, **{HOSTILE: HOSTILE})  # fmt: skip
    other = {**odd, "variant": "other"}
    records = (
        CEILINGS,
        odd,
        other,
        {**WRONG, "fault": HOSTILE, "variant": HOSTILE, "case": "b"},
        {"kind": HOSTILE},
        {"kind": "absent", "variant": HOSTILE, "reason": HOSTILE},
        {"kind": "skipped", "case": HOSTILE},
    )
    head = {"gpu": HOSTILE, "device": HOSTILE, "shape": HOSTILE, "commit": HOSTILE, "held_down_by": [HOSTILE]}
    dates = ("2026-01-01", "2026-01-02")
    runs = [run_of(suite, *records, began=date, **head) for date in dates for suite in (HOSTILE, "stages")]
    found = page_of(tmp_path, *runs)
    assert not {tag for tag, _ in found.tags} & {"script"}
    assert not [attributes for _, attributes in found.tags if "onload" in attributes or attributes.get("id") == "q"]
    assert found.row(SHOWN, SHOWN)
    assert SHOWN in found.text
    assert {dict(found.tags[0][1])["lang"]} == {"en"}
    inside = [line for line in found.text.splitlines() if line.strip() == "<script>alert('1')</script>\""]
    assert inside, "a label in a plot"


def test_the_same_files_make_the_same_page(tmp_path: Path) -> None:
    path = write_runs(tmp_path / NAME, NEW, STAGES)
    assert report(path) == report(path)


def test_of_several_runs_the_newest_is_shown_beside_the_others(tmp_path: Path) -> None:
    runs = [
        run_of("images", CEILINGS, image("reference", 1.0), image("engine", median), began=f"2026-01-0{day}T00:00:00",
               shape="tiny", dtype="float32", commit=commit)
        for day, commit, median in ((2, "second", 0.25), (1, "first", 0.75), (3, "third", 0.125))
    ]  # fmt: skip
    runs.append(run_of("images", image("engine", 9.0), began="2026-01-09", shape="xl", dtype="float32"))
    found = page_of(tmp_path, *runs)
    title = "Whole images (shape tiny)"
    assert found.row("a-cpu", title)[0][2:5] == ["2026-01-03, third", "3", "2"]
    assert found.row("a-cpu", "Whole images (shape xl)")[0][2:4] == ["2026-01-09, abc", "1"]
    assert found.row("batch 1, euler 4", "engine", "0.125 (0.124 to 0.126)")
    assert found.row("batch 1, euler 4", "engine", "750 ms", "250 ms", "125 ms")
    assert found.headings.count("Over runs") == 1
    (header,) = [table.rows[0] for table in found.tables if table.caption.startswith("Medians of all runs")]
    assert header[2:] == ["1: 2026-01-01, first", "2: 2026-01-02, second", "3: 2026-01-03, third"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"suite": "a", "run": "b", "kind": "environment"}\nnonsense\n', "{file}, line 2: expected a record"),
        (b'{"suite": "a", "run": "b", "kind": "environment"}\n\xff\n', "{file}, line 2: expected UTF-8"),
        (b'{"suite": "a", "run": "b", "kind": "end"}\n', "{file}, line 1: expected a run to begin"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / NAME
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape("results: " + said.format(file=file))):
        report(tmp_path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"kind": "measurement", "case": "a", "right": True}, "case, variant and right"),
        ({**measurement("a", "b", 1.0), "seconds": {"median": 1.0}}, "case, variant and right"),
        ({**measurement("a", "b", 1.0), "times": {"c": 1.0}}, "case, variant and right"),
        ({**measurement("a", "b", 1.0), "joules": "many"}, "case, variant and right"),
        ({**measurement("a", "b", 1.0), "floor_seconds": float("inf")}, "case, variant and right"),
        ({"kind": "absent", "variant": "a"}, "variant and reason"),
        ({**CEILINGS, "flops_per_second": 0}, "above 0"),
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    file = write_runs(tmp_path / NAME, run_of("images", record))
    with pytest.raises(ValueError, match=rf"results: {re.escape(str(file))}, run 2026-01-01\S* of images: .*{said}"):
        report(file)


def test_where_there_are_no_results_there_is_no_page(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"results: got .*, expected a result file, or a folder"):
            report(path)


def test_the_command(tmp_path: Path) -> None:
    output, results = tmp_path / "page.html", str(write_runs(tmp_path / NAME, NEW))
    result = CliRunner().invoke(bench, ["report", results, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert Page(output.read_text(encoding="utf-8")).row("step", "ours")
    refused = CliRunner().invoke(bench, ["report", results, "--output", str(tmp_path)])
    assert "output: got the folder" in str(refused.exception)


def test_the_command_says_which_files_it_did_not_read(tmp_path: Path) -> None:
    write_runs(tmp_path / "results" / NAME, NEW)
    write_runs(tmp_path / "results" / "gpu" / "mine.jsonl", NEW)
    output = tmp_path / "new" / "page.html"
    result = CliRunner().invoke(bench, ["report", str(tmp_path / "results"), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert output.is_file()
    assert "not read, because not named DATE-COMMIT.jsonl: gpu/mine.jsonl" in result.output


def test_without_matplotlib_the_extra_is_named(everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="the extra `report`"):
        report(everything)


def test_a_time_below_zero_is_in_the_table_and_breaks_no_plot(tmp_path: Path) -> None:
    """What is left of a short kernel when the reads before it are taken off may be negative."""
    odd = kernel("rope/stage0-b1", "ours", -1e-9)
    found = page_of(tmp_path, run_of("kernels", CEILINGS, odd, dtype="float32", batch=1), run_of("x", odd))
    assert found.row("rope/stage0-b1", "ours", "-1.00 ns (-0.990 ns to -1.01 ns)")


def test_general_table_without_times_says_what_is_wrong() -> None:
    table = general_table(run_of("memory", {**measurement("a", "b", 1.0), "seconds": spread_of(1.0)}, WRONG))
    assert table.rows[1][2] == "wrong: zeros"
    assert {len(row) for row in table.rows} == {len(table.header)}
    bare = general_table(run_of("memory", WRONG))
    assert bare.rows == (("a", "broken", "wrong: zeros"),)
    assert len(bare.header) == 3
