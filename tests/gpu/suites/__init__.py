"""The GPU cases, one file a subject. Importing a file registers its cases."""

import importlib

NAMES = (
    "epilogues", "shapes", "determinism", "graphs", "robustness", "moe", "workspaces", "eager", "sharded", "scattering",
    "faults", "soak",
)  # fmt: skip


def load() -> None:
    """Register every case."""
    for name in NAMES:
        importlib.import_module(f"tests.gpu.suites.{name}")
