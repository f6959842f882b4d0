"""Strict reading of small JSON and YAML files from untrusted sources."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pixelflow_engine.errors import CheckpointError

from .problems import about

LARGEST_CONFIG = 64 * 1024
DEEPEST_CONFIG = 32
"""Maximum nesting depth. Python's own recursion limit cannot be relied on, because libraries raise it."""


def read_config_bytes(path: Path) -> bytes:
    """Read the bytes of a configuration file.

    Args:
        path: a regular file of at most 64 KiB, or a link to one.

    Raises:
        CheckpointError: it is missing, not a regular file, empty or too large.
    """
    with about(path, OSError):
        check_is_file(path)
        with path.open("rb") as file:
            data = file.read(LARGEST_CONFIG + 1)  # the size from stat could change before the read
    if len(data) > LARGEST_CONFIG:
        raise CheckpointError(f"{path}: larger than {LARGEST_CONFIG} bytes, which no configuration is")
    if not data:
        raise CheckpointError(f"{path}: the file is empty")
    return data


def check_is_file(path: Path) -> None:
    """Refuse anything but a regular file: opening a pipe could block forever."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")


def parse_json(data: bytes, path: Path) -> object:
    """Parse JSON; duplicate keys and numbers that are not finite are errors.

    Args:
        data: the file's bytes, UTF-8.
        path: the file, for messages.

    Raises:
        CheckpointError: the text is invalid.
    """
    with about(path, ValueError):
        _check_depth(data)
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_yaml(data: bytes, path: Path) -> object:
    """Parse YAML of plain data; aliases, merge keys and duplicate keys are errors.

    Args:
        data: the file's bytes, UTF-8.
        path: the file, for messages.

    Raises:
        CheckpointError: the text is invalid.
    """
    # Besides YAMLError, parsing of scalars raises its own errors: a date with month 13, a number of 5000 digits.
    with about(path, yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        # The strict loader derives from the safe one, so it constructs only plain data.
        return yaml.load(data.decode("utf-8"), Loader=StrictLoader)


def _check_depth(data: bytes) -> None:
    depth = 0
    # A string without an end counts too, and none is read twice: a file of escaped quotes would take seconds.
    for byte in re.sub(rb'"(?:[^"\\]|\\.)*+"?', b"", data, flags=re.DOTALL):
        depth += (byte in b"[{") - (byte in b"]}")
        if depth > DEEPEST_CONFIG:
            raise ValueError(f"nested too deeply: more than {DEEPEST_CONFIG} levels")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping: dict[str, object] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r} occurs twice")
        mapping[key] = value
    return mapping


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"got {name}, expected a finite number")


class StrictLoader(yaml.SafeLoader):
    """The safe loader without aliases, which can expand exponentially; duplicate keys are errors."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse anchors, aliases and deep nesting."""
        events: Any = self  # its stubs give this method no types
        event = events.peek_event()
        if getattr(event, "anchor", None) is not None:  # an alias carries its anchor's name here too
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not accepted", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST_CONFIG:
            problem = f"nested too deeply: more than {DEEPEST_CONFIG} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse duplicate keys, and keys that are no plain values."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem="a key must be a plain value", problem_mark=key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} occurs twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
