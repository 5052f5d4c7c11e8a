"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.simulate import fake_world

pytest_plugins = ["arfusion_pass.testing.plugin"]
for name in (
    *("COLUMNS", "LINES"),  # pytest-xdist gives its workers a terminal's; tables have a width of their own
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES",  # a developer's; tests of warm starts need caches, in folders of their own
):
    os.environ.pop(name, None)
ENVIRONMENT = dict(os.environ)


def pytest_collection_finish(session: pytest.Session) -> None:
    """No module of tests, nor what it imports, leaves a variable behind: every other test's processes would have it."""
    changed = {name for name in os.environ.keys() | ENVIRONMENT.keys() if os.environ.get(name) != ENVIRONMENT.get(name)}
    changed -= {"PYTEST_CURRENT_TEST", "PYTEST_VERSION"}
    if changed:
        raise pytest.UsageError(f"importing the tests changed the environment: {', '.join(sorted(changed))}")


@pytest.fixture
def world() -> Iterator[None]:
    """A fake world of two ranks (:mod:`tests.simulate`)."""
    with fake_world(2):
        yield
