"""The plan of the house, held by machine: who may import whom, what an import does, what is pinned.

Every check is a plain function from a text (or a package) to a list of complaints, and is also shown made-up
offenders: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {
    "pixelflow_kernels": "triton_kernels",
    "pixelflow_engine": "engine",
    "pixelflow_training": "training",
    "pixelflow_benchmarks": "benchmarks",
}
FLOORS = {package: floor for floor, package in enumerate(SOURCE_ROOTS)}
REFERENCE = "pixelflow_engine.reference"

# A module of an operation that computes by other means than plain PyTorch.
FAST = re.compile(r"\.(\w*kernels|forward|backward|rotation|blocks|tiles|normals|pairs|flash|sdpa)$")

# Slow to import or often absent: the two lower floors import them inside functions only.
HEAVY = {
    "diffusers", "flash_attn", "matplotlib", "scipy", "sklearn", "torchdiffeq", "torchvision", "transformers",
}  # fmt: skip


# --- floors ------------------------------------------------------------------------------------------------


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """``(line, absolute dotted name, deferred)`` of every import in ``source``, the text of ``module``.

    ``from a import b`` gives both ``a`` and ``a.b``, as ``b`` may be a module. Deferred: inside a function,
    or for the type checker only. ``import_module`` and ``__import__`` of a literal count.
    """
    tree = ast.parse(source)
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            deferred.update(ast.walk(node))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names if alias.name != "*")]
        else:
            called = ast.unparse(node.func).rpartition(".")[2]
            literal = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called in {"__import__", "import_module"} and isinstance(literal, str):
                names = [literal]
        for name in names:
            yield node.lineno, name, node in deferred


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def import_complaint(module: str, name: str, deferred: bool) -> str | None:
    """Why ``module`` may not import ``name``, or None where it may."""
    own, root = module.partition(".")[0], name.partition(".")[0]
    standard = root in sys.stdlib_module_names
    if FLOORS.get(root, -1) > FLOORS[own]:
        return "a higher floor"
    if FLOORS[own] <= 1 and root in HEAVY and not deferred:
        return "imported eagerly: only functions import it"
    if own == "pixelflow_kernels":
        allowed = {"torch", "triton", "numpy", "flash_attn", own}
        if not standard and root not in allowed:
            return "floor 0 stands on torch, triton and numpy alone"
        if FAST.search(module) and root == own and "reference" in name.split("."):
            return "a fast backend never imports the reference"
    if within(module, REFERENCE):
        if not standard and root != "torch" and not within(name, REFERENCE):
            return "the reference stands on torch alone"
    elif own == "pixelflow_engine" and within(name, REFERENCE):
        return "the engine never imports the reference that it is held against"
    return None


def import_complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    found: dict[tuple[int, str], str] = {}  # one complaint a line and reason: `from a import b` names a twice
    for line, name, deferred in imports(source, module, is_package):
        if why := import_complaint(module, name, deferred):
            found.setdefault((line, why), f"{module}, line {line}: {name}: {why}")
    return list(found.values())


def modules(package: str) -> Iterator[tuple[Path, str, bool]]:
    source_root = ROOT / SOURCE_ROOTS[package]
    for path in sorted((source_root / package).rglob("*.py")):
        parts = path.relative_to(source_root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


@pytest.mark.parametrize("package", SOURCE_ROOTS)
def test_floors(package: str) -> None:
    complaints = [
        complaint
        for path, module, is_package in modules(package)
        for complaint in import_complaints(path.read_text("utf-8"), module, is_package)
    ]
    assert not complaints, "\n".join(complaints)


def test_floors_sees_the_sources() -> None:
    seen = {module for package in SOURCE_ROOTS for _, module, _ in modules(package)}
    assert {"pixelflow_kernels", "pixelflow_engine.config", REFERENCE, f"{REFERENCE}.model"} <= seen


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("pixelflow_kernels.packing", "import pixelflow_engine", "higher floor"),
        ("pixelflow_kernels.packing", "def f():\n    from pixelflow_training import loss", "higher floor"),
        ("pixelflow_engine.cli", "import_module('pixelflow_benchmarks.cli')", "higher floor"),
        ("pixelflow_training.loop", "import pixelflow_benchmarks.timing as t", "higher floor"),
        ("pixelflow_kernels.packing", "import yaml", "torch, triton and numpy alone"),
        ("pixelflow_kernels.ode_step.kernels", "from .reference import euler", "never imports the reference"),
        ("pixelflow_kernels.ode_step.norm_kernels", "from . import reference", "never imports the reference"),
        ("pixelflow_kernels.attention.flash", "from flash_attn import flash_attn_func", "only functions"),
        ("pixelflow_engine.hub", "try:\n    import diffusers\nexcept ImportError: ...", "only functions"),
        ("pixelflow_engine.reference.model", "import numpy", "stands on torch alone"),
        ("pixelflow_engine.reference.model", "from ..config import ModelConfig", "stands on torch alone"),
        ("pixelflow_engine.sampler", "from .reference.sampler import sample", "never imports the reference"),
        ("pixelflow_engine.sampler", "from . import config, reference", "never imports the reference"),
    ],
)  # fmt: skip
def test_floors_can_fail(module: str, source: str, why: str) -> None:
    complaints = import_complaints(source, module)
    assert len(complaints) == 1, complaints
    assert why in complaints[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pixelflow_kernels.attention.op", "import torch, triton\nfrom .reference import attention"),
        ("pixelflow_kernels.attention.flash", "def f():\n    from flash_attn import flash_attn_func"),
        ("pixelflow_engine.reference.sampler", "import math\nfrom .model import x\nfrom . import noise"),
        ("pixelflow_engine.hub", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"),
        ("pixelflow_benchmarks.cases", "from pixelflow_engine.reference import sample\nimport sklearn"),
    ],
)
def test_floors_allow(module: str, source: str) -> None:
    assert import_complaints(source, module) == []


# --- what an import does -----------------------------------------------------------------------------------

PROBE = """
import json, multiprocessing, os, random, signal, sys, threading
import numpy, torch

def state():
    backends = torch.backends
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "TF32": (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "reduced-precision sums": (
            backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        ),
        "cuDNN": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "attention backends": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.cudnn_sdp_enabled(),
        ),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "gradients": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        "CUDA started": torch.cuda.is_initialized(),
        "random state": (
            hash(torch.get_rng_state().numpy().tobytes()),
            hash(random.getstate()),
            hash(numpy.random.get_state()[1].tobytes()),
        ),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "process start method": multiprocessing.get_start_method(allow_none=True),
        "native threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None,
        "Python threads": threading.active_count(),
    }

def start(thread, _start=threading.Thread.start):  # older Pythons have no audit event for threads
    started.append("thread")
    _start(thread)

started = []
watched = "subprocess.", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "socket.connect"
before, known = state(), set(sys.modules)
sys.addaudithook(lambda event, args: started.append(event) if event.startswith(watched) else None)
threading.Thread.start = start
__import__(sys.argv[1])
events, after = list(started), state()
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - known}),
    "changed": sorted(name for name in before if before[name] != after[name]),
    "started": events,
}))
"""


def import_effects(module: str, *source_roots: Path, cwd: Path) -> dict[str, list[str]]:
    """What importing ``module`` in a fresh process loads, changes and starts, beyond what torch does."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, module],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, source_roots))},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, f"importing {module} failed:\n{run.stderr}"
    effects: dict[str, list[str]] = json.loads(run.stdout.splitlines()[-1])
    return effects


def test_importing_the_engine_does_nothing_else(tmp_path: Path) -> None:
    roots = [ROOT / folder for folder in SOURCE_ROOTS.values()]
    effects = import_effects("pixelflow_engine", *roots, cwd=tmp_path)
    assert "pixelflow_engine" in effects["modules"]
    assert not HEAVY & set(effects["modules"])
    assert not {"pixelflow_training", "pixelflow_benchmarks"} & set(effects["modules"])
    assert effects["changed"] == [], "process-wide state changed by the import"
    assert effects["started"] == [], "processes, threads or connections started by the import"


def test_import_effects_are_seen(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").touch()
    (tmp_path / "loud.py").write_text(
        "import os, random, subprocess, sys, threading\n"
        "import torch, torchvision\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_num_threads(torch.get_num_threads() + 1)\n"
        "torch.backends.cuda.matmul.allow_tf32 = True\n"
        "torch.backends.cudnn.benchmark = True\n"
        "torch.use_deterministic_algorithms(True)\n"
        "torch.set_grad_enabled(False)\n"
        "torch.rand(1)\n"
        "os.environ['LOUD'] = '1'\n"
        "subprocess.run([sys.executable, '-S', '-c', ''], check=True)\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    effects = import_effects("loud", tmp_path, cwd=tmp_path)
    assert {"loud", "torchvision"} <= set(effects["modules"])
    expected = {
        "default dtype", "threads", "TF32", "float32 matmul precision", "cuDNN", "determinism", "gradients",
        "random state", "environment", "Python threads",
    }  # fmt: skip
    assert expected <= set(effects["changed"])
    assert {"subprocess.Popen", "thread"} <= set(effects["started"])


# --- versions ----------------------------------------------------------------------------------------------


def version_complaints(pyproject: dict[str, Any], constraints: str) -> list[str]:
    """Where the pins of ``constraints.txt`` and the requirements of ``pyproject.toml`` disagree."""
    project = pyproject["project"]
    this = canonicalize_name(project["name"])
    groups = {
        "dependencies": project["dependencies"],
        "build-system": pyproject["build-system"]["requires"],
        **project.get("optional-dependencies", {}),
    }
    declared = [(group, Requirement(line)) for group, lines in groups.items() for line in lines]
    pins: dict[str, str] = {}
    complaints = []
    for line in constraints.splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        pin = Requirement(text)
        name, exact = canonicalize_name(pin.name), [s.version for s in pin.specifier if s.operator == "=="]
        if len(exact) != 1 or len(pin.specifier) != 1:
            complaints.append(f"{text}: not an exact pin")
        elif name in pins:
            complaints.append(f"{text}: pinned twice")
        else:
            pins[name] = exact[0]
    for group, requirement in declared:
        name = canonicalize_name(requirement.name)
        if name == this:
            if group != "flash" and "flash" in requirement.extras:
                complaints.append(f"[{group}] takes in the extra flash")
        elif name == "flash-attn":
            if group != "flash":
                complaints.append(f"[{group}] asks for flash-attn")
        elif name not in pins:
            complaints.append(f"[{group}] {requirement}: not pinned")
        elif not requirement.specifier.contains(pins[name], prereleases=True):
            complaints.append(f"[{group}] {requirement}: pinned to {pins[name]}")
    return complaints


def test_versions() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    complaints = version_complaints(pyproject, (ROOT / "constraints.txt").read_text("utf-8"))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("requirement", "pins", "why"),
    [
        ("numpy>=2.0", "numpy==1.26", "pinned to 1.26"),
        ("numpy>=2.0", "", "not pinned"),
        ("numpy>=2.0", "numpy>=2.1", "not an exact pin"),
        ("numpy>=2.0", "numpy==2.1\nNumPy==2.2", "pinned twice"),
        ("flash-attn>=2.8", "", "asks for flash-attn"),
        ("house[flash]", "", "takes in the extra flash"),
    ],
)
def test_versions_can_fail(requirement: str, pins: str, why: str) -> None:
    pyproject: dict[str, Any] = {
        "build-system": {"requires": []},
        "project": {
            "name": "house",
            "dependencies": [],
            "optional-dependencies": {"flash": ["flash-attn>=2.8"], "all": [requirement]},
        },
    }
    complaints = version_complaints(pyproject, pins)
    assert any(why in complaint for complaint in complaints), complaints
    del pyproject["project"]["optional-dependencies"]["all"]
    assert version_complaints(pyproject, "numpy==2.1") == []


# --- source distribution -------------------------------------------------------------------------------------

# What the tests read, besides what every source distribution has: they run from an unpacked one too.
READ_BY_TESTS = (
    *SOURCE_ROOTS.values(), "tests", "examples", "docs", "CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md",
    "Makefile", "constraints.txt",
)  # fmt: skip


def sdist_complaints(pyproject: dict[str, Any]) -> list[str]:
    """What a list of the distribution's files leaves out; without a list, it has all that git does not ignore."""
    listed = pyproject["tool"]["hatch"]["build"].get("targets", {}).get("sdist", {}).get("include")
    return [] if listed is None else [f"left out: {name}" for name in READ_BY_TESTS if name not in listed]


def test_source_distribution() -> None:
    assert all((ROOT / name).exists() for name in READ_BY_TESTS)
    assert sdist_complaints(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))) == []


def test_source_distribution_can_fail() -> None:
    include = [name for name in READ_BY_TESTS if name != "examples"] + ["benchmarks/pixelflow_benchmarks"]
    assert sdist_complaints({"tool": {"hatch": {"build": {"targets": {"sdist": {"include": include}}}}}}) == [
        "left out: examples"
    ]


# --- tests -------------------------------------------------------------------------------------------------


def collected_as(path: Path) -> str:
    """The name under which pytest imports a file of tests: a folder without ``__init__.py`` is no part of it."""
    parts = [path.stem]
    for folder in path.parents:
        if not (folder / "__init__.py").exists():
            break
        parts.insert(0, folder.name)
    return ".".join(parts)


def name_complaints(paths: Iterable[Path]) -> list[str]:
    """Files of tests that cannot be collected in one call, since they are imported under one name."""
    known: dict[str, Path] = {}
    return [
        f"{path} and {known[name]} are both {name}"
        for path in sorted(paths)
        if known.setdefault(name := collected_as(path), path) != path
    ]


def test_names_of_tests() -> None:
    found = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("test_*.py")]
    assert {"tests", "benchmarks"} == {path.relative_to(ROOT).parts[0] for path in found}
    complaints = name_complaints(found)
    assert not complaints, "\n".join(complaints)


def test_names_of_tests_can_fail(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "test_stages.py" for folder in ("one", "two", "packed")]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    (tmp_path / "packed" / "__init__.py").touch()
    assert name_complaints(paths) == [f"{paths[1]} and {paths[0]} are both test_stages"]


# --- words -------------------------------------------------------------------------------------------------

# Brackets keep the patterns from matching themselves.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/([w]ork|[r]oot|[h]ome/\w+|[U]sers/\w+)/")
REGISTRY_HOST = re.compile(r"[p]ypi\.org|[p]ythonhosted\.org|[d]ownload\.pytorch\.org", re.IGNORECASE)
TEMPORARY = re.compile(r"(?<![\w.~/-])/[t]mp/")
CONFLICT = re.compile(r"^\s*([<]{7}|[>]{7}) ")
CODE = {".py", ".toml", ".cmake", ".sh", ".txt", ".yaml", ".yml", ""}


def word_complaints(path: str, text: str) -> Iterable[str]:
    patterns = {
        "a path of some machine": MACHINE_PATH,
        "a registry's host": REGISTRY_HOST,
        "the mark of a conflict left by a merge": CONFLICT,
    }
    if Path(path).suffix in CODE and not path.startswith("tests/"):
        patterns["a fixed temporary folder"] = TEMPORARY
    for number, line in enumerate(text.splitlines(), start=1):
        for what, pattern in patterns.items():
            if found := pattern.search(line):
                yield f"{path}, line {number}: {what}: {found.group()}"


def test_words() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of tracked files")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    complaints: list[str] = []
    for name in filter(None, listing.decode().split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content[:8192]:
            complaints += word_complaints(name, content.decode("utf-8", errors="replace"))
    assert not complaints, "\n".join(complaints)


def test_words_can_fail() -> None:
    user, host, temporary = "/" + "home/someone/x", "https://py" + "pi.org/simple", "/" + "tmp/x"
    assert list(word_complaints("docs/a.md", f"see {user}"))
    assert list(word_complaints("Makefile", f"pip install -i {host} x"))
    assert list(word_complaints("engine/a.py", f'open("{temporary}")'))
    assert list(word_complaints("engine/a.py", "    " + "<" * 7 + " HEAD"))
    assert not list(word_complaints("docs/a.md", f"write it to {temporary}, then see docs/" + "work/plan.md"))
