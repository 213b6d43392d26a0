"""The backend that a test is for; where there is no GPU, the CUDA kernels run emulated."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels import BACKENDS, DEVICE, emulation


@pytest.fixture(scope="session", autouse=True)
def _emulation() -> None:
    if DEVICE == "cpu":
        emulation.install()


@pytest.fixture(params=["in place", "layer"])
def operation(request: Any) -> Any:
    """The name of an operation, see `operations.call`."""
    return request.param


@pytest.fixture(params=BACKENDS)
def name(request: Any) -> Any:
    return request.param
