"""Report on result files as one self-contained HTML page: tables, plots, and what was not measured.

The same files always give the same page: it contains no times but those of the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Template

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.harness.tables import TextTable, missing

from .collect import STATE, VERSIONS, Group, groups, read_results
from .report_html import Figures, Section, badge, contents_html, facts_html, list_html, table_html, text_of
from .suite_plots import figures_of, over_runs
from .suite_tables import table_of
from .svg import drawing
from .units import percent, quantity

SUITES = {
    "images": "Whole images",
    "stages": "Stages",
    "kernels": "Kernels",
    "training": "Training",
    "memory": "Memory",
    "coldstart": "Cold start",
    "blocks": "Launches and bytes of a block",
    "distance": "Distance from float64",
    "curves": "Loss curves",
}
"""Titles by suite, in the order of the page."""
MEASURED = ("images", "stages", "kernels", "training", "memory", "coldstart")
"""Suites that every device is expected to have."""
TITLE = "pixelflow-engine: benchmark report"


def report(path: Path) -> str:
    """Return the HTML page for a result file, or for all result files of a folder.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: see :func:`~.collect.read_results`.
    """
    with drawing():
        files, runs = read_results(path)
        found = groups(runs, SUITES)
        figures = Figures()
        parts = [_head(files, runs, found)]
        contents: list[Section] = [("overview", "Overview", ())]
        for kind, on_gpu in (("GPU", True), ("CPU", False)):
            of_kind = [group for group in found if group.on_gpu == on_gpu]
            if not of_kind:
                target = f"no-{kind.lower()}"
                parts.append(f'<h2 id="{target}">{kind}</h2>')
                parts.append(f'<p class="none">Not measured: none of the results is of a {kind}.</p>')
                contents.append((target, f"{kind}: not measured", ()))
            for device, of_device in groupby(of_kind, key=lambda group: group.device):
                target = f"device-{len(contents)}"
                here = list(of_device)
                sections = [
                    (f"{target}-{number}", _title(group, here), group) for number, group in enumerate(here, start=1)
                ]
                parts += _device(target, device, sections, figures)
                contents.append((target, device, tuple((part, title) for part, title, _ in sections)))
    template = Template(Path(__file__).with_name("report_page.html").read_text(encoding="utf-8"))
    parts.append("<footer>Written by <code>pixelflow bench report</code>; its times are those of the results.</footer>")
    return template.substitute(title=text_of(TITLE), contents=contents_html(contents), body="\n".join(parts))


def _head(files: Sequence[Path], runs: Sequence[Run], found: Sequence[Group]) -> str:
    dates = [run.began[:10] for run in runs]
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lead = (
        f"{_count(len(runs), 'run')} from {_count(len(files), 'result file')}, {span}. Every figure was measured or "
        "counted; what could not be is said to be not measured. Of several runs of a suite the newest is shown."
    )
    table, absent = _overview(found)
    return (
        f'<h1>{text_of(TITLE)}</h1>\n<p class="lead">{text_of(lead)}</p>\n'
        f'<h2 id="overview">Overview</h2>\n{table_html(table, absent=absent)}'
    )


def _overview(found: Sequence[Group]) -> tuple[TextTable, set[tuple[str, ...]]]:
    """Return a table with a row for each device and suite, missing ones included, and the names of the missing rows."""
    rows: list[tuple[str, ...]] = []
    absent: set[tuple[str, ...]] = set()
    kinds = {group.on_gpu for group in found}
    for on_gpu in (True, False):
        if on_gpu not in kinds:
            name = ("GPU" if on_gpu else "CPU", "all suites")
            rows.append((*name, "not measured", "", "", "", ""))
            absent.add(name)
        of_kind = [group for group in found if group.on_gpu == on_gpu]
        for device, of_device in groupby(of_kind, key=lambda group: group.device):
            here = list(of_device)
            for group in here:
                run = group.newest
                wrong = len(_wrong(run))
                said = [
                    *(["cut\N{NO-BREAK SPACE}short"] if run.cut_short else []),
                    *([f"wrong:\N{NO-BREAK SPACE}{wrong}"] if wrong else []),
                ]
                commit = _commit(run)
                when = f"{run.began[:10]}, {commit}"
                count = str(len(run.of_kind("measurement"))) if run.of_kind("measurement") else ""
                rows.append(
                    (device, _title(group, here), when, str(len(group.runs)), count, ", ".join(said), _headline(run))
                )
            for suite in _not_measured(here):
                rows.append((device, SUITES[suite], "not measured", "", "", "", ""))
                absent.add((device, SUITES[suite]))
    header = ("device", "suite", "newest run", "runs", "measurements", "state", "fastest of what was measured first")
    return TextTable("What was measured where.", header, tuple(rows)), absent


def _device(target: str, device: str, sections: Sequence[tuple[str, str, Group]], figures: Figures) -> Iterator[str]:
    environment = sections[0][2].newest.environment
    yield f'<h2 id="{target}">{text_of(environment.get("gpu") or environment.get("processor") or device)}</h2>'
    yield f'<p class="when"><code>{text_of(device)}</code></p>'
    for part, title, group in sections:
        yield from _suite(part, title, group, figures)
    lacking = [SUITES[suite] for suite in _not_measured([group for *_, group in sections])]
    if lacking:
        yield "<h3>Not measured here</h3>"
        yield f'<p class="none">Not measured: {text_of("; ".join(lacking))}.</p>'


def _suite(part: str, title: str, group: Group, figures: Figures) -> Iterator[str]:
    run = group.newest
    yield f'<h3 id="{part}">{text_of(title)}</h3>'
    of = f", the newest of {len(group.runs)} runs" if len(group.runs) > 1 else ""
    yield f'<p class="when">{text_of(_when(run))}, commit <code>{text_of(_commit(run))}</code>{of}</p>'
    yield f"<p>{''.join(_badges(run))}</p>"
    if run.cut_short:
        yield "<p>This run was cut short: it has no end. What is here was measured before that, and stands.</p>"
    yield facts_html(_facts(group))
    yield from _notes(run)
    for figure in figures_of(run):
        yield figures.html(figure)
    if group.on_gpu and group.suite in ("images", "stages") and not any("joules" in r for r in run.records):
        yield '<h4>Energy</h4>\n<p class="none">Not measured.</p>'
    tables = table_of(run)
    marks = [
        {(str(r.get("case")), str(r.get("variant"))) for r in _wrong(run)},
        {(str(r.get("case")), str(r["variant"])) for r in run.of_kind("absent")},
    ]
    if tables:
        yield "<h4>Tables</h4>"
        yield from (table_html(table, *marks) for table in tables)
    else:
        yield '<p class="none">Not measured: the run has no measurement.</p>'
    if len(group.runs) > 1:
        trend = over_runs(group.runs)
        if trend is not None:
            yield figures.html(trend)
            yield table_html(_runs_table(group.runs))


def _badges(run: Run) -> Iterator[str]:
    yield badge("cut short", "bad") if run.cut_short else badge("complete", "good")
    if wrong := _wrong(run):
        yield badge(_count(len(wrong), "wrong result"), "bad")
    if "+" in str(run.environment.get("commit")):
        yield badge("uncommitted changes", "warn")
    states = [run.records[0], *(r["at_work"] for r in run.records if "at_work" in r), run.records[-1]]
    held = [reason for state in states for reason in _held_down(state)]
    if held:
        yield badge(f"clocks held down: {', '.join(dict.fromkeys(held))}", "warn")
    if absent := {r["variant"] for r in run.of_kind("absent")}:
        yield badge(f"{len(absent)} absent", "warn")


def _notes(run: Run) -> Iterator[str]:
    """Yield HTML about wrong, absent and skipped results, and about records that the page does not show."""
    if wrong := _wrong(run):
        yield "<p>Wrong, and therefore without a figure:</p>"
        said = (f"{r.get('case')}, {r.get('variant')}: {r.get('fault', 'no reason given')}" for r in wrong)
        yield list_html(map(text_of, said), "wrong")
    if gone := missing(run):
        yield "<p>Absent:</p>"
        names = (("; ".join(dict.fromkeys(variants)), reason) for reason, variants in gone.items())
        yield list_html((text_of(f"{variants}: {reason}") for variants, reason in names), "absent")
    if skipped := run.of_kind("skipped"):
        yield "<p>No time was left for:</p>"
        yield list_html((text_of(_skipped(r)) for r in skipped), "absent")
    own = {
        "blocks": ("block", "cited"),
        "curves": ("curve", "agreement"),
        "distance": ("distance", "reference"),
        "memory": ("memory",),
    }.get(run.suite, ())
    shown = ("environment", "end", "ceilings", "measurement", "absent", "skipped", *own)
    if other := [r["kind"] for r in run.records if r["kind"] not in shown]:
        kinds = ", ".join(f"{other.count(kind)} of kind {kind}" for kind in dict.fromkeys(other))
        yield f'<p class="none">Records that this page has no place for: {text_of(kinds)}.</p>'


def _facts(group: Group) -> dict[str, object]:
    """Return settings, versions and hardware, ceilings, and the device's state at the beginning and at the end."""
    run = group.newest
    head = run.environment
    facts: dict[str, object] = {
        name.replace("_", " ").capitalize(): _value(value) for name, value in group.settings.items()
    }
    facts |= {said: head[name] for name, said in VERSIONS.items() if name in head}
    for ceilings in run.of_kind("ceilings")[:1]:
        facts["Copy, measured"] = quantity(ceilings["bytes_per_second"], "B/s")
        facts[f"Product, {ceilings.get('dtype', '')}, measured"] = quantity(ceilings["flops_per_second"], "FLOP/s")
    end = None if run.cut_short else run.records[-1]
    for name, (said, unit) in STATE.items():
        if name in head or (end and name in end):
            before = _reading(name, head)
            after = _reading(name, end) if end else before
            when = f"{said}, begin → end" if before != after else said if end else f"{said} at the begin"
            facts[when] = f"{before if before == after else f'{before} → {after}'} {unit}".strip()
    return facts


def _reading(name: str, record: Record) -> str:
    if name not in record:
        return "not known"
    if name == "held_down_by":
        return ", ".join(map(str, record[name])) or "nothing"
    value = record[name]
    return f"{value:.{1 if name == 'load' else 0}f}" if isinstance(value, int | float) else str(value)


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _held_down(record: Record) -> list[str]:
    """Return why clocks are below their maximum; that of an idle device is left out, because it always is."""
    return [str(reason) for reason in record.get("held_down_by", []) if reason != "GpuIdle"]


def _headline(run: Run) -> str:
    """Describe the fastest variant of the case measured first, because suites measure the most important case first."""
    timed = [r for r in run.of_kind("measurement") if "seconds" in r]
    if not timed:
        return ""
    here = [r for r in timed if r["case"] == timed[0]["case"]]
    best = min(here, key=lambda r: float(r["seconds"]["median"]))
    said = f"{best['case']}: {best['variant']}, {quantity(best['seconds']['median'], 's')} per {best.get('per', 'run')}"
    beside = [
        f"{spread['median']:.2f} times as fast as {name}"
        for name, spread in best.get("times", {}).items()
        if name != best["variant"]
    ]
    floor = [f"{percent(best['fraction_of_floor'])} of the floor"] if "fraction_of_floor" in best else []
    return ", ".join([said, *beside, *floor])


def _runs_table(runs: Sequence[Run]) -> TextTable:
    """Return a table with the median of every measurement in every run."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for place, run in enumerate(runs):
        for r in run.of_kind("measurement"):
            said = "wrong" if not r["right"] else quantity(r["seconds"]["median"], "s") if "seconds" in r else ""
            found.setdefault((r["case"], r["variant"]), {})[place] = said
    header = ("case", "variant", *(f"{n}: {run.began[:10]}, {_commit(run)}" for n, run in enumerate(runs, start=1)))
    rows = tuple((*name, *(cells.get(place, "") for place in range(len(runs)))) for name, cells in found.items())
    return TextTable("Medians of all runs, oldest first; the number of a run is its place in the plots.", header, rows)


def _not_measured(found: Sequence[Group]) -> list[str]:
    return [suite for suite in MEASURED if suite not in {group.suite for group in found}]


def _title(group: Group, beside: Sequence[Group]) -> str:
    """Return the suite's title, with the settings that distinguish it from the device's other groups of the suite."""
    named = SUITES.get(group.suite, group.suite)
    others = [other.settings for other in beside if other.suite == group.suite and other is not group]
    telling = {
        name: value
        for name, value in group.settings.items()
        if any(other.get(name, value) != value or name not in other for other in others)
    }
    return f"{named} ({_said(telling)})" if telling else named


def _said(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in settings.items())


def _commit(run: Run) -> str:
    head, _, changes = str(run.environment.get("commit", "unknown")).partition("+")
    return f"{head[:10]}{'+' if changes else ''}{changes}"


def _when(run: Run) -> str:
    return f"{run.began[:10]} {run.began[11:16]} UTC"


def _wrong(run: Run) -> list[Record]:
    """Return the records of all kinds, times and bytes, that failed their check."""
    return [r for r in run.records if r.get("right") is False]


def _skipped(r: Record) -> str:
    """Describe a skipped record by its case and variants or, if it names neither, by its reason."""
    variants = ", ".join(map(str, r.get("variants", [r["variant"]] if "variant" in r else [])))
    named = [str(part) for part in (r.get("case"), variants) if part]
    return ": ".join(named) or f"further cases: {r.get('reason', 'no reason given')}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
