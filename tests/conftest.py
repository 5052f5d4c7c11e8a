"""Options and fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulate import fake_world

pytest_plugins = ["arfusion_pass.testing.plugin"]


@pytest.fixture
def world() -> Iterator[None]:
    """A fake world of two ranks (:mod:`tests.simulate`)."""
    with fake_world(2):
        yield
