"""Compact storage of a large number of names that is fast to send to another process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

import torch


class Names:
    """An immutable sequence of names, stored as a single byte string, whatever their number.

    Args:
        names: file names, which need not be valid UTF-8.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = torch.tensor(list(itertools.accumulate(map(len, encoded), initial=0)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        begin, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._text[begin:end])
