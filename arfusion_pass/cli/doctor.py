"""What ``arfusion doctor`` reports: torch, CUDA, compilers, GPUs and their links, the library, the backend to be used,
the engines beside it and whether they take the plug-in.

Collecting the facts builds nothing, loads nothing and creates no CUDA context beyond what torch's device queries need::

    facts = collect()
    print("\\n".join(f"{name}: {value}" for name, value in facts.rows()))
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from arfusion_pass.config import SWITCHES, FusionConfig, misread_switch, switch
from arfusion_pass.publishing import misread_level
from arfusion_pass.runtime import build, native, prebuilt, thresholds, workspace


@dataclasses.dataclass(frozen=True)
class Device:
    """One visible GPU."""

    index: int
    name: str
    capability: str
    arch: str
    memory_gib: float
    multiprocessors: int


@dataclasses.dataclass(frozen=True)
class LibraryState:
    """The kernel library: where it is or would be, and whether it is built and loaded."""

    arch: str | None
    path: str | None
    built: bool
    loaded: str | None
    sources: str | None
    cache: str
    prebuilt: bool
    """``ARFUSION_LIBRARY`` names it."""
    wheel: str | None = None
    """The version of the installed ``arfusion-pass-kernels`` that it is a part of."""
    problem: str | None = None
    """Why what lies there, or an environment variable, is not used."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """A serving engine that is installed beside this package, and whether its next start has the plug-in."""

    name: str
    version: str
    plug_in: str
    """``on``, or ``off: ...`` with the reason."""


@dataclasses.dataclass(frozen=True)
class DoctorFacts:
    """Everything that decides how the fused ops run in this process.

    Args:
        backend: ``"native"``, ``"native, built on first use"`` or ``"reference"``.
        reason: why that backend.
        p2p: rows of the P2P matrix, ``p2p[i][j]`` whether GPU i can access GPU j.
        problems: sentences on what should be changed; empty where all is well.
    """

    python: str
    torch: str
    cuda: str | None
    driver: str | None
    nccl: str | None
    nvcc: str | None
    nvcc_version: str | None
    cxx: str | None
    devices: tuple[Device, ...]
    p2p: tuple[tuple[bool, ...], ...]
    multicast_disabled: bool
    library: LibraryState
    thresholds: str
    backend: str
    reason: str
    engines: tuple[Engine, ...]
    problems: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of the report."""
        links = "".join(f"\n  {' '.join('x' if ok else '-' for ok in row)}" for row in self.p2p)
        library = self.library
        state = "loaded" if library.loaded else "built" if library.built else "not built"
        origin = f" ({prebuilt.DISTRIBUTION} {library.wheel})" if library.wheel else ""
        where = f"{state}, {library.path}{origin}" if library.path else "unknown: neither a GPU nor an ARFUSION_ARCH"
        rows = [
            ("python", self.python),
            ("torch", f"{self.torch} (CUDA {self.cuda or 'none'}, NCCL {self.nccl or 'none'})"),
            ("driver", self.driver or "none"),
            ("nvcc", f"{self.nvcc} ({self.nvcc_version})" if self.nvcc else "none"),
            ("C++ compiler", self.cxx or "none"),
            ("GPUs", "\n  ".join(["", *(f"{d.index}: {d.name}, sm_{d.arch}" for d in self.devices)]) or "none"),
            ("P2P access", links or "none"),
            ("kernel sources", library.sources or "none"),
            ("kernel library", where),
            ("cache", library.cache),
            ("strategy table", self.thresholds),
            ("backend", f"{self.backend}: {self.reason}"),
            *((engine.name, f"{engine.version}, plug-in {engine.plug_in}") for engine in self.engines),
        ]
        return rows + [("problem", problem) for problem in self.problems]


def collect() -> DoctorFacts:
    """Look around, now."""
    devices = tuple(_device(index) for index in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    count = len(devices)
    p2p = tuple(
        tuple(i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count))
        for i in range(count)
        if count > 1
    )
    nvcc, cxx = build.find_nvcc(), build.find_cxx()
    library = _library_state()
    problems = [] if library.problem is None else [library.problem]
    for read in (FusionConfig.from_env, workspace.default_bytes, build.max_jobs):
        try:
            read()
        except (ValueError, build.BuildError) as error:
            problems.append(str(error))
    problems += filter(None, (*map(misread_switch, SWITCHES), misread_level()))
    try:
        table = thresholds.load().source
    except thresholds.ThresholdError as error:
        table = "built in"
        problems.append(str(error))
    backend, reason = _backend(devices, library, nvcc, cxx)
    if backend == "reference" and devices:
        problems.append(f"the GPUs would run the reference in torch ops, which is correct and slow: {reason}")
    problems += [
        f"GPU {i} has no P2P access to GPU {j}: groups with both use NCCL and a local fused kernel"
        for i, row in enumerate(p2p)
        for j, ok in enumerate(row)
        if i < j and not ok
    ]
    return DoctorFacts(
        python=sys.version.split()[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=_driver_version(),
        nccl=_nccl_version() if devices else None,
        nvcc=nvcc,
        nvcc_version=_nvcc_version(nvcc),
        cxx=cxx,
        devices=devices,
        p2p=p2p,
        multicast_disabled=os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0") not in ("", "0"),
        library=library,
        thresholds=table,
        backend=backend,
        reason=reason,
        engines=_engines(),
        problems=tuple(problems),
    )


def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        index=index,
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        arch=_arch(index) or "unknown",
        memory_gib=round(properties.total_memory / 2**30, 1),
        multiprocessors=properties.multi_processor_count,
    )


def _engines() -> tuple[Engine, ...]:
    """Those that are installed, found without importing one."""
    environment = os.environ
    ours = ("vllm", "vLLM", "vllm.general_plugins"), ("sglang", "SGLang", "sglang.srt.plugins")
    found = []
    for module, name, group in ours:
        if importlib.util.find_spec(module) is None:
            continue
        distributions = importlib.metadata.packages_distributions().get(module, [])
        version = importlib.metadata.version(distributions[0]) if distributions else "of unknown version"
        variable, chosen = f"ARFUSION_{module.upper()}", f"{module.upper()}_PLUGINS"
        names = environment.get(chosen, "")
        restricted = chosen in environment if module == "vllm" else bool(names)  # an empty one is vLLM's word for none
        if "arfusion" not in importlib.metadata.entry_points(group=group).names:
            plug_in = "off: this package is on the path and not installed, so the engine does not find it"
        elif not switch(variable, True):
            plug_in = f"off: {variable}={environment[variable]}"
        elif restricted and "arfusion" not in names.split(","):
            plug_in = f"off: {chosen}={names} does not name arfusion"
        else:
            plug_in = "on"
        found.append(Engine(name, version, plug_in))
    return tuple(found)


def _arch(index: int | None = None) -> str | None:
    """The architecture to build for, None where ARFUSION_ARCH is none."""
    with contextlib.suppress(build.BuildError):
        return build.device_arch(index)
    return None


def _library_state() -> LibraryState:
    path, problem, cache = None, None, "none"
    try:
        cache = str(build.cache_dir())
        path, problem = build.library_path(), build.why_not_installed()
        if path is not None and os.environ.get("ARFUSION_LIBRARY") and not os.path.isfile(path):
            problem = f"ARFUSION_LIBRARY={path} is no file"
        elif path is not None and os.path.isfile(path) and not build.is_usable(path):
            problem = build.distrust(path) or f"{path} is no library, or one that was cut short: `arfusion build`"
    except build.BuildError as error:
        problem = str(error)
    sources = build.source_dir()
    loaded = native.loaded_path()
    return LibraryState(
        arch=_arch(),
        path=None if path is None else str(path),
        built=path is not None and build.is_usable(path),
        loaded=None if loaded is None else str(loaded),
        sources=None if sources is None else str(sources),
        cache=cache,
        prebuilt=bool(os.environ.get("ARFUSION_LIBRARY")),
        wheel=prebuilt.version() if path is not None and prebuilt.holds(path) else None,
        problem=problem,
    )


def _backend(devices: tuple[Device, ...], library: LibraryState, nvcc: str | None, cxx: str | None) -> tuple[str, str]:
    """The backend that a fused op on this machine's GPUs would get, and why."""
    if not devices:
        return "reference", "no CUDA device is visible"
    if native.failure():
        return "reference", str(native.failure())
    if library.loaded or library.built:
        return "native", f"the kernel library is {'loaded' if library.loaded else 'built'}"
    if library.prebuilt:
        return "reference", f"ARFUSION_LIBRARY names {library.path}, which is no whole library"
    if int(devices[0].capability.split(".")[0]) < 8:
        return "reference", f"the kernels need compute capability 8.0, {devices[0].name} has {devices[0].capability}"
    if not switch("ARFUSION_BUILD", True):
        return "reference", "the kernel library is not built and ARFUSION_BUILD=0 forbids building it on first use"
    if nvcc is None or cxx is None:
        missing = " and ".join(name for name, found in (("nvcc", nvcc), ("a C++ compiler", cxx)) if found is None)
        return "reference", f"the kernel library is not built and there is no {missing}"
    if library.sources is None:
        return "reference", "this installation holds no kernel sources"
    return "native, built on first use", f"nvcc is {nvcc}; `arfusion build` does it ahead of time"


def _nvcc_version(nvcc: str | None) -> str | None:
    if nvcc is None:
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((part.strip() for line in text.splitlines() for part in line.split(",") if "release" in part), None)


def _driver_version() -> str | None:
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[:1].isdigit() and "." in word), None)


def _nccl_version() -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (RuntimeError, AttributeError):
        return None
