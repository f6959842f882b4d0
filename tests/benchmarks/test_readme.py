"""Figures in the README are those of the committed results."""

import json
import re
from pathlib import Path

from pixelflow_benchmarks.tables import quality_table

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- quality: pixelflow eval table (\S+) -->\n(.*?)<!-- /quality -->", re.DOTALL)


def test_the_quality_table_is_the_one_of_the_results() -> None:
    block = BLOCK.search((ROOT / "README.md").read_text())
    assert block is not None
    results = [json.loads(line) for line in (ROOT / block[1]).read_text().splitlines()]
    assert block[2].strip() == quality_table(results).markdown().strip()
