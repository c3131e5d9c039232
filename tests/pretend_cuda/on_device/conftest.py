"""The machine with the pretend device."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.pretend_cuda import machine as pretend_machine
from tests.pretend_cuda.counts import Counts


@pytest.fixture
def machine() -> Callable[..., AbstractContextManager[Counts]]:
    """A context with the pretend device, see `tests.pretend_cuda.machine`."""
    return pretend_machine.machine
