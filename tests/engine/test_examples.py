"""The examples run as a reader would run them."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_sampler(tmp_path: Path) -> None:
    path = tmp_path / "heun.png"
    subprocess.run([sys.executable, EXAMPLES / "own_sampler.py", path], check=True)
    with Image.open(path) as image:
        assert image.size == (10 * 66 + 2, 66 + 2)
        low, high = image.convert("L").getextrema()
    assert low < 10  # type: ignore[operator]
    assert high > 245  # type: ignore[operator]
