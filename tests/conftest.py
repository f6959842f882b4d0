"""What each test needs is asked for here, so that a run says how many it skipped and why."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and (interpreted or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and Triton not interpreted"))
        if item.get_closest_marker("interpret") and not interpreted:
            item.add_marker(pytest.mark.skip(reason="needs a process of its own with TRITON_INTERPRET=1"))
