"""The ``arfusion-pass-kernels`` wheel: built libraries of several architectures, for machines without a compiler.

::

    wheel = write_wheel([library, ...], Path("dist"))      # what ``arfusion build --wheel dist`` ends with
    path = find("libarfusion-sm90a-0123456789abcdef.so")   # in the wheel that is installed here, or None

A library's name holds its architecture and the key of the sources that it was built from, so that a wheel of other
sources is never loaded: :func:`why_not` says what is in the way then.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

DISTRIBUTION, PACKAGE = "arfusion-pass-kernels", "arfusion_pass_kernels"
ARCHITECTURES = ("80", "90a", "100a", "120a")
"""What a wheel holds unless it is told otherwise."""

_NAME = re.compile(r"libarfusion-sm(?P<arch>\w+)-(?P<key>[0-9a-f]+)\.so")
_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "{version}"
description = "Built CUDA kernels of arfusion-pass, for {archs}"
license = "Apache-2.0"
requires-python = ">=3.10"
dependencies = ["arfusion-pass=={version}"]

[tool.hatch.build]
ignore-vcs = true

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.hatch.build.targets.wheel.hooks.custom]
"""
_HOOK = """\
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Platform(BuildHookInterface):
    def initialize(self, version, build_data):
        build_data.update(pure_python=False, tag="py3-none-{platform}")
"""


class WheelError(RuntimeError):
    """The wheel cannot be made; the message says why and what to do."""


def version() -> str | None:
    """Of the wheel that is installed, or None."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def find(name: str) -> Path | None:
    """The installed library called ``name``, or None."""
    return next((path for path in _installed() if path.name == name), None)


def holds(path: Path) -> bool:
    """Whether ``path`` is one of the installed libraries: what pip installed is trusted like the package itself."""
    return path in _installed()


def why_not(name: str) -> str | None:
    """Why the wheel that is installed does not serve the library called ``name``; None where it does, or is not."""
    wanted, found = _NAME.fullmatch(name), [_NAME.fullmatch(path.name) for path in _installed()]
    if version() is None or wanted is None or find(name) is not None:
        return None
    what = f"{DISTRIBUTION} {version()}"
    keys = [match["key"] for match in found if match and match["arch"] == wanted["arch"]]
    if keys:
        return (
            f"{what} is not used: its kernels for sm_{wanted['arch']} were built from other sources (key {keys[0]}) "
            f"than this arfusion-pass has (key {wanted['key']}). Install the two of one version, or make the wheel "
            "anew with `arfusion build --wheel`."
        )
    archs = ", ".join(f"sm_{match['arch']}" for match in found if match) or "no architecture"
    return f"{what} is not used: it holds kernels for {archs}, not for sm_{wanted['arch']}."


def check_builder(folder: Path) -> None:
    """Make ``folder``, or say why no wheel can be made there, before hours of compiling.

    Raises:
        WheelError: there is no hatchling, or the folder cannot be written to.
    """
    if importlib.util.find_spec("hatchling") is None:
        raise WheelError("a wheel is made by hatchling, which is not installed: `pip install hatchling`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise WheelError(f"no wheel can be written to {folder}: {error.strerror}") from error


def write_wheel(libraries: Sequence[Path], folder: Path, package_version: str) -> Path:
    """Make the wheel that holds ``libraries`` (named as the cache names them) in ``folder``, and return its path.

    Raises:
        WheelError: no wheel can be made there, hatchling failed, or a library's name does not say what it is built of.
    """
    check_builder(folder)
    named = [_NAME.fullmatch(path.name) for path in libraries]
    if None in named:
        raise WheelError(
            f"the name of {libraries[named.index(None)]} does not say for what and from what it was built, as those in "
            "the cache do: unset ARFUSION_LIBRARY"
        )
    archs = ", ".join(f"sm_{match['arch']}" for match in named if match)
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    with tempfile.TemporaryDirectory(prefix="arfusion-wheel-") as name:
        work = Path(name)
        (work / PACKAGE).mkdir()
        (work / PACKAGE / "__init__.py").write_text('"""Built kernels of arfusion_pass, which finds them here."""\n')
        for path in libraries:
            shutil.copyfile(path, work / PACKAGE / path.name)
        project = _PROJECT.format(distribution=DISTRIBUTION, package=PACKAGE, version=package_version, archs=archs)
        (work / "pyproject.toml").write_text(project)
        (work / "hatch_build.py").write_text(_HOOK.format(platform=platform))
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(work / "dist")]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        wheels = list((work / "dist").glob("*.whl"))
        if done.returncode or not wheels:
            raise WheelError(f"hatchling made no wheel (exit status {done.returncode}):\n{done.stderr.strip()}")
        return Path(shutil.copy(wheels[0], folder))


def _installed() -> list[Path]:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return []
    listed = [file for file in distribution.files or () if _NAME.fullmatch(file.name)]
    return [path for file in listed if os.path.isfile(path := Path(str(distribution.locate_file(file))))]
