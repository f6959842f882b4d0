"""Every operation's specimens keep their promises; and what reads them can fail.

A normal run compiles a fixed sample of each operation's specimens, spread over its list and the architectures;
PIXELFLOW_FUZZ (`make fuzz`) and `make aot` compile all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend

from pixelflow_kernels import aot
from pixelflow_kernels.configs import ARCHITECTURES
from pixelflow_kernels.listing import Instruction, loops, parse
from pixelflow_kernels.machine_code import Promises, Report, Specimen, compile_specimen, count
from support.compiled import compiles
from support.packs import FUZZ

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/aot"
SAMPLE = 4  # specimens of one operation on one architecture
TINY = "rope2d.rotate/fp32/c144-d72"


def sample(op: str, arch: int) -> list[Specimen]:
    """Evenly over the list, beginning elsewhere on each architecture."""
    every = list(aot.specimens_of(op, arch))
    if FUZZ > 1 or len(every) <= SAMPLE:
        return every
    start = ARCHITECTURES.index(arch) * len(every) // (SAMPLE * len(ARCHITECTURES))
    return [every[start + i * len(every) // SAMPLE] for i in range(SAMPLE)]


# --- promises ----------------------------------------------------------------------------------------------


@lru_cache
def examined(op: str, arch: int) -> list[aot.Row]:
    return [aot.examine(specimen, arch) for specimen in sample(op, arch)]


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", aot.operations())
def test_promises_are_kept(op: str, arch: int) -> None:
    rows = examined(op, arch)
    assert rows
    broken = [f"{row.specimen.name}: {'; '.join(row.broken)}" for row in rows if row.broken]
    assert not broken, "\n".join(broken)


def alike(got: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether both are of one kernel: a compiler does not always choose the same registers and order."""
    return got["matrix"] == entry["matrix"] and abs(got["instructions"] / entry["instructions"] - 1) < 0.02


def test_kernels_that_are_not_alike_are_told_apart() -> None:
    entry = {"matrix": {"HGMMA": 3}, "instructions": 1000, "sha256": "a"}
    assert alike(entry | {"instructions": 1015, "sha256": "b"}, entry)
    assert not alike(entry | {"instructions": 1021}, entry)
    assert not alike(entry | {"matrix": {"HGMMA": 2}}, entry)


@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", aot.operations())
def test_the_committed_report_is_of_these_kernels(op: str, arch: int) -> None:
    path = RESULTS / f"triton-{aot.versions()['triton']}.json"
    if not path.exists():
        pytest.skip(f"no report by this Triton: {path}")
    report = json.loads(path.read_text())
    assert report["versions"] == aot.versions()
    entries = {
        entry["specimen"]: entry for entry in report["specimens"] if (entry["op"], entry["arch"]) == (op, f"sm_{arch}")
    }
    assert [*entries] == [specimen.name for specimen in aot.specimens_of(op, arch)]
    old = [row.specimen.name for row in examined(op, arch) if not alike(row.record(), entries[row.specimen.name])]
    assert not old, f'make aot ARGS="--op {op} --json {path.relative_to(ROOT)}": {", ".join(old)}'


def lower(specimen: Specimen, arch: int, types: dict[str, str], ones: tuple[str, ...]) -> None:
    """To Triton's first intermediate form, for these types and with these arguments equal to 1."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(specimen.options))
    signature = {name: types.get(name, "constexpr") for name in specimen.kernel.arg_names}
    constants = {**specimen.constants, **dict.fromkeys(ones, 1)}
    source = ASTSource(fn=specimen.kernel, signature=signature, constexprs=constants)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source.make_ir(target, options, functions, modules, context)


@compiles
@pytest.mark.parametrize("op", aot.operations())
def test_kernels_take_whole_numbers_as_triton_gives_them(op: str) -> None:
    """A number that is 1 is a constant of the compiled kernel, and one beyond 32 bits is wider than in a specimen.

    The interpreter knows neither, and specimens are compiled with other numbers.
    """
    seen = set()
    for specimen in aot.specimens_of(op, 90):
        whole = tuple(name for name, kind in specimen.types.items() if kind in ("i32", "i64"))
        absent = tuple(name for name, value in specimen.constants.items() if value is None or value is False)
        if (specimen.kernel.__name__, absent) in seen:
            continue
        seen.add((specimen.kernel.__name__, absent))
        lower(specimen, 90, {name: kind for name, kind in specimen.types.items() if name not in whole}, whole)
        lower(specimen, 90, {**specimen.types, **dict.fromkeys(whole, "i64")}, ())
    assert seen


@compiles
@pytest.mark.parametrize("op", aot.operations())
def test_specimens_are_of_their_operation_and_differ_in_name(op: str) -> None:
    for arch in ARCHITECTURES:
        names = [specimen.name for specimen in aot.specimens_of(op, arch)]
        assert all(name.startswith(f"{op}.") for name in names)
        assert len({*names}) == len(names)


def report(*, flushes: int = 0, **opcodes: int) -> Report:
    names = Counter({name.replace("_", "."): n for name, n in opcodes.items()})
    return Report(registers=40, stack=0, shared=1024, opcodes=names, main_loop=None, cubin=b"", flushes=flushes)


@pytest.mark.parametrize(
    ("promises", "opcodes", "why"),
    [
        (Promises(), {"LDL_64": 1, "STL": 2}, "spills: got 3, promised at most 0"),
        (Promises(ffma=0), {"FFMA_FTZ": 1, "FFMA2": 1, "DFMA": 1}, "ffma: got 3, promised at most 0"),
        (Promises(flushes=0), {"flushes": 2}, "flushes: got 2, promised at most 0"),
        (Promises(wide_loads=4), {"LDG_E_128": 1, "LDG_E_64": 9, "LDG_E_ENL2_256": 1}, "wide_loads: got 3, promised"),
        (Promises(wide_loads=2), {"LDGSTS_E_BYPASS_128": 1, "STG_E_128": 9, "LDS_128": 9}, "wide_loads: got 1"),
        (Promises(narrow=0), {"LDG_E_U16_CONSTANT": 1, "STG_E_U8": 1, "LDS_U16": 7}, "narrow: got 2"),
        (Promises(matrix=True), {"FFMA": 1, "HADD2": 9}, "matrix: got no matrix instruction"),
        (Promises(per_score=7.0), {"HGMMA_64x128x16": 1}, "per_score: got no main loop"),
        (Promises(registers=39), {}, "registers: got 40, promised at most 39"),
        (Promises(shared=0), {}, "shared: got 1024, promised at most 0"),
    ],
)
def test_a_broken_promise_is_named(promises: Promises, opcodes: dict[str, int], why: str) -> None:
    broken = report(**opcodes).broken(promises)
    assert len(broken) == 1, broken
    assert why in broken[0]


def test_kept_promises() -> None:
    promises = Promises(spills=0, wide_loads=3, narrow=0, matrix=True, ffma=0, registers=40, shared=1024)
    opcodes = {"LDG_E_128": 1, "LDG_E_ENL2_256": 1, "HMMA_16816": 2, "HFMA2_MMA": 5, "LDGDEPBAR": 1, "BAR_SYNC": 1}
    assert report(**opcodes).broken(promises) == []
    assert report(**opcodes).matrix == {"HMMA": 2}


# --- reading machine code ----------------------------------------------------------------------------------


def listing(*lines: str) -> list[Instruction]:
    return parse("\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */" for i, line in enumerate(lines)))


def test_lines_are_read() -> None:
    first, second, third = listing("@!UP0 UIADD3 UR4, UR4, 0x1, URZ", "LDG.E.128 R4, desc[UR6][R2.64]", "@P1 BRA 0x10")
    assert (first.name, first.guarded, first.target) == ("UIADD3", True, None)
    assert (second.name, second.operands, second.guarded) == ("LDG.E.128", "R4, desc[UR6][R2.64]", False)
    assert (third.address, third.name, third.target) == (0x20, "BRA", 0x10)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["MOV", "IADD", "@P0 BRA 0x10", "EXIT", "BRA 0x40", "NOP"], [{1, 2}]),  # the padding loops on itself
        (["MOV", "MOV", "MOV", "@P0 BRA 0x20", "@P1 BRA 0x10", "EXIT"], [{1, 2, 3, 4}, {2, 3}]),  # nested
        # A waiting path out of line: its branch back to 0x20 makes no second loop, and it is part of the first.
        (["MOV", "@!P0 BRA 0x50", "HGMMA", "@P1 BRA 0x10", "EXIT", "SYNCS", "@!P2 BRA 0x50", "BRA 0x20"],
         [{1, 2, 3, 5, 6, 7}, {5, 6}]),
        (["MOV", "@P0 EXIT", "BRA.U UP0, 0x0", "EXIT"], [{0, 1, 2}]),
        (["BRA 0x30", "MOV", "BRA 0x10", "EXIT"], []),  # never reached
        (["MOV", "BSSY B0, 0x50", "@P0 BRA 0x40", "BSYNC B0", "BSYNC B0", "@P1 BRA 0x0", "EXIT"], [{0, 1, 2, 3, 4, 5}]),
        ([], []),
    ],
)  # fmt: skip
def test_loops(lines: list[str], expected: list[set[int]]) -> None:
    assert [set(body) for body in loops(listing(*lines))] == expected


def test_prefixes_are_whole_words() -> None:
    assert count({"LDG.E": 1, "LDGSTS.E": 2, "LDGDEPBAR": 4}, "LDG") == 1


def dot_specimen(**promises: Any) -> Specimen:
    """A product in a loop, for its matrix instructions, and beside it a loop without any."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, out_ptr, turns, BLOCK: tl.constexpr):
        rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        here = rows * BLOCK + columns
        total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for i in range(turns):
            total += tl.dot(tl.load(x_ptr + here + i), tl.load(y_ptr + here + i))
        for i in range(turns):
            total += tl.load(out_ptr + here + i)
        tl.store(out_ptr + here, total)

    return Specimen(
        name="made_up.dot",
        kernel=kernel,
        types={"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "turns": "i32"},
        constants={"BLOCK": 64},
        options={"num_warps": 4, "num_stages": 1},
        promises=Promises(**promises),
        scores_per_thread=64 * 64 / 128,
    )


@compiles
@pytest.mark.parametrize(("arch", "family"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_the_main_loop_is_the_one_with_matrix_instructions(arch: int, family: str) -> None:
    found = compile_specimen(dot_specimen(), arch)
    assert family in found.matrix
    assert found.main_loop is not None
    assert count(found.main_loop, family) == found.matrix[family]  # all of them are in the loop
    assert found.main_loop.total() < found.instructions
    assert found.per_score == found.main_loop.total() / 32
    assert found.narrow > 0  # x_ptr + i is aligned to nothing


@compiles
def test_alignment_decides_how_wide_loads_are() -> None:
    specimen = next(s for s in aot.specimens_of("rope2d", 90) if s.name == "rope2d.rotate/bf16/c1024-d64")
    aligned = compile_specimen(specimen, 90)
    unaligned = compile_specimen(replace(specimen, unaligned=("x_ptr", "stride_x_token")), 90)
    assert aligned.narrow == 0
    assert unaligned.narrow > 0
    assert unaligned.wide_loads < aligned.wide_loads


@compiles
def test_what_takes_denormals_for_nothing_is_counted() -> None:
    """RMSNorm's reciprocal root is approximate, for q and for k; the rotation alone is level A."""
    found = {s.name: s for s in aot.specimens_of("rope2d", 90)}
    assert compile_specimen(found["rope2d.forward/fp32/c144-d72"], 90).flushes == 2
    assert compile_specimen(found[TINY], 90).flushes == 0


@compiles
def test_digests_name_the_binary() -> None:
    specimen = next(s for s in aot.specimens_of("rope2d", 90) if s.name == TINY)
    found = compile_specimen(specimen, 90)
    assert found.digest == hashlib.sha256(found.cubin).hexdigest()
    assert found.cubin[:4] == b"\x7fELF"
    assert b"rotation.py" not in found.cubin, "the paths of sources make the same code differ between checkouts"
    assert found.main_loop is None
    for change in ({"unaligned": ("z_ptr",)}, {"constants": {}}, {"types": specimen.types | {"z_ptr": "*fp32"}}):
        with pytest.raises(ValueError, match=r"z_ptr|got no type or constant for CONJUGATE"):
            compile_specimen(replace(specimen, **change), 90)


# --- the command -------------------------------------------------------------------------------------------


def made_up(op: str, arch: int) -> Iterator[Specimen]:
    yield next(replace(s, promises=Promises(ffma=0)) for s in aot.specimens_of("rope2d", arch) if s.name == TINY)
    yield dot_specimen(ffma=0, wide_loads=10**6)
    yield replace(dot_specimen(), name="made_up.odd", constants={"BLOCK": 63})


@compiles
def test_the_command_names_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cubins = tmp_path / "report" / "aot.json", tmp_path / "cubins"
    arguments = ["--arch", "sm_80", "--op", "rope2d", "--json", str(out), "--cubins", str(cubins)]
    assert aot.main(arguments, find=made_up) == 1
    text = capsys.readouterr().out
    assert "BROKEN made_up.dot on sm_80: wide_loads: got 0, promised at least 1000000" in text
    assert "BROKEN made_up.odd on sm_80: does not compile: " in text
    assert text.endswith("3 specimens, 2 with broken promises\n")
    assert f"BROKEN {TINY}" not in text
    header, first, *_ = text.splitlines()
    assert dict(zip(header.split(), first.split(), strict=True))["specimen"] == TINY
    record = json.loads(out.read_text())
    assert {"triton", "ptxas", "ptxas-blackwell"} == {*record["versions"]}
    broken, failed, good = record["specimens"]  # by operation
    assert (good["op"], good["arch"], good["spills"], good["broken"]) == ("rope2d", "sm_80", 0, [])
    assert broken["matrix"]["HMMA"] > 0
    assert "registers" not in failed
    for line in (cubins / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((cubins / name).read_bytes()).hexdigest() == digest
        assert digest in {good["sha256"], broken["sha256"]}
    assert len([*cubins.glob("sm_80/*.cubin")]) == 2


@compiles
def test_a_report_keeps_what_was_not_compiled_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, versions = tmp_path / "aot.json", aot.versions()
    others = [{"specimen": "modulate.x", "op": "modulate", "arch": "sm_80"}, {"op": "rope2d", "arch": "sm_90"}]
    old = {"specimen": TINY, "op": "rope2d", "arch": "sm_80"}
    report.write_text(json.dumps({"versions": versions, "specimens": [old, *others]}))
    arguments = ["--arch", "sm_80", "--op", "rope2d", "--json", str(report)]
    assert aot.main(arguments, find=only_tiny) == 0
    first, new, last = json.loads(report.read_text())["specimens"]
    assert [first, last] == others
    assert (new["specimen"], new["spills"]) == (TINY, 0)

    before = json.dumps({"versions": versions | {"ptxas": "1.2.3"}, "specimens": others})
    report.write_text(before)
    assert aot.main(arguments, find=only_tiny) == 2
    assert "1.2.3" in capsys.readouterr().err
    assert report.read_text() == before


def only_tiny(op: str, arch: int) -> Iterator[Specimen]:
    return (s for s in aot.specimens_of(op, arch) if s.name == TINY)


@compiles
def test_the_command_leaves_with_0_where_all_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--arch", "sm_80,sm_90", "--op", "rope2d"], find=only_tiny) == 0
    assert "2 specimens, 0 with broken promises" in capsys.readouterr().out


def test_bad_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--arch", "90"], ["--op", "nothing"]):
        with pytest.raises(SystemExit, match="2"):
            aot.main(arguments)
    with pytest.raises(ValueError, match=r"op: got 'nothing', expected one of .*rope2d"):
        list(aot.specimens_of("nothing", 90))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
