"""Launch configurations: tile sizes, warps and stages per kernel, shape class and GPU architecture, fixed in files.

Files such as ``configs/sm_90.json`` hold the best known configurations for one architecture; ``configs/default.json``
holds configurations that run on every architecture::

    {"modulate.backward": {"half-c1280": {"TOKENS": 32, "num_warps": 4}}}

Nothing is tuned at run time, because a configuration determines bits (the order of sums) as well as speed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("configs")
ARCHITECTURES = (80, 90, 100)

Table = dict[str, dict[str, dict[str, int]]]
"""Maps kernel -> shape class -> configuration."""

_CONSTANT = re.compile(r"[A-Z][A-Z0-9_]*")
_LIMITS = {"num_warps": 32, "num_stages": 16, "num_ctas": 16, "maxnreg": 255}


def launch_config(op: str, shape_class: str, arch: int | None) -> dict[str, int]:
    """Look up the configuration of one kernel.

    Args:
        op: operation and kernel, e.g. ``"modulate.forward"``.
        shape_class: a name from the kernel's table, e.g. ``"half-c1280"``.
        arch: compute capability as one number (90 for sm_90), from :func:`arch_of`; None without a GPU. The file of
            exactly this architecture takes precedence over ``default.json``.

    Returns:
        A new dictionary of constexpr arguments (e.g. ``BLOCK_M``) and compiler options (``num_warps``, ``num_stages``).

    Raises:
        ValueError: no table has the kernel or its shape class, or a file is malformed.
    """
    tables = [_shipped(name) for name in (*([f"sm_{arch}"] if arch is not None else []), "default")]
    for table in tables:
        if (found := table.get(op, {}).get(shape_class)) is not None:
            return dict(found)
    classes = {name for table in tables for name in table.get(op, {})}
    if not classes:
        known = sorted({name for table in tables for name in table})
        raise ValueError(f"op: got {op!r}, expected one with launch configurations: {', '.join(known) or 'none'}")
    raise ValueError(f"shape_class: got {shape_class!r} for {op}, expected one of {', '.join(sorted(classes))}")


def arch_of(device: torch.device | str | None) -> int | None:
    """Return a CUDA device's compute capability as one number (90 for sm_90); None for other devices and for None."""
    if device is None:
        return None
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def read_table(path: str | Path) -> Table:
    """Read and validate one configuration file.

    Raises:
        ValueError: the file is not JSON of the form above; the message names file, kernel, shape class and key.
    """
    path = Path(path)
    try:
        table: Table = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    check_table(table, path.name)
    return table


def check_table(table: Any, name: str = "table") -> None:
    """Validate a table of configurations.

    Raises:
        ValueError: an entry is invalid; the message names its location, what was found and what was expected.
    """
    for op, classes in _object(table, name).items():
        for shape_class, config in _object(classes, f"{name}: {op}").items():
            place = f"{name}: {op}: {shape_class}"
            for key, value in _object(config, place).items():
                _check_entry(f"{place}: {key}", key, value)
            if "num_warps" not in config:
                raise ValueError(f"{place}: got no num_warps, expected one")


def write_table(table: Mapping[str, Mapping[str, Mapping[str, int]]], path: str | Path) -> None:
    """Write a file for :func:`read_table`: sorted, with one configuration per line, so that diffs are easy to read.

    Raises:
        ValueError: ``table`` is invalid; nothing is written.
    """
    check_table(table, Path(path).name)
    ops = []
    for op in sorted(table):
        rows = [f"    {json.dumps(name)}: {json.dumps(dict(table[op][name]))}" for name in sorted(table[op])]
        ops.append(f"  {json.dumps(op)}: {{\n" + ",\n".join(rows) + "\n  }")
    Path(path).write_text("{\n" + ",\n".join(ops) + "\n}\n" if ops else "{}\n", "utf-8")


@cache
def _shipped(name: str) -> Table:
    path = FOLDER / f"{name}.json"
    return read_table(path) if path.is_file() else {}


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: got {value!r}, expected an object")
    return dict(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} occurs twice")
        found[key] = value
    return found


def _check_entry(place: str, key: str, value: Any) -> None:
    limit = _LIMITS.get(key, 1 << 20)
    if key not in _LIMITS and not _CONSTANT.fullmatch(key):
        expected = "an upper-case constant of the kernel or one of " + ", ".join(_LIMITS)
        raise ValueError(f"{place}: got the name {key!r}, expected {expected}")
    if type(value) is not int or not 0 < value <= limit:
        raise ValueError(f"{place}: got {value!r}, expected an integer in 1..{limit}")
    if (key == "num_warps" or key.startswith("BLOCK")) and value & (value - 1):
        raise ValueError(f"{place}: got {value}, expected a power of two")
