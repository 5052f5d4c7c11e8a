"""``arfusion doctor``: what this machine has, and which backend the fused ops would run on, and why.

Compiles nothing, starts no process group, allocates no GPU memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

State = Literal["ok", "note", "missing"]


class Finding(NamedTuple):
    """One line of the doctor's answer."""

    topic: str
    state: State
    text: str


def findings() -> list[Finding]:
    """Everything that decides whether and how fused ops run here."""
    return [*_software(), *_gpus(), *_compilers(), *_library(), _verdict()]


def print_findings(as_json: bool = False) -> None:
    """Print :func:`findings`, one line each, or as a JSON list."""
    found = findings()
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=2))
        return
    width = max(len(finding.topic) for finding in found)
    for topic, state, text in found:
        print(f"{topic:<{width}}  {state:<7}  {text}")


def _software() -> list[Finding]:
    found = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    version = torch.__version__
    state: State = "ok" if _version(version) >= (2, 11) else "missing"
    found.append(Finding("torch", state, f"{version}, CUDA {torch.version.cuda or 'none'} (2.11 or later is needed)"))
    if dist.is_available():
        backends = [
            name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
        ]
        found.append(Finding("torch.distributed", "ok", ", ".join(backends) or "no backend"))
    else:
        found.append(Finding("torch.distributed", "missing", "this torch was built without it"))
    found += [_package("flashinfer-python", "optional backend"), _package("transformers", "optional, for examples/")]
    return found


def _package(name: str, what: str) -> Finding:
    try:
        return Finding(name, "ok", f"{importlib.metadata.version(name)} ({what})")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "note", f"not installed ({what})")


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPUs", "note", "no CUDA device visible")]
    count = torch.cuda.device_count()
    found = []
    for device in range(count):
        properties = torch.cuda.get_device_properties(device)
        text = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        found.append(Finding(f"GPU {device}", "ok" if properties.major >= 8 else "missing", text))
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        blocked = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
        if blocked:
            some = ", ".join(f"{a}->{b}" for a, b in blocked[:6])
            found.append(Finding("P2P", "note", f"no peer access {some}: NCCL plus a local fused kernel there"))
        else:
            found.append(Finding("P2P", "ok", f"all {count} GPUs reach each other{_links()}"))
    return found


def _links() -> str:
    """How GPU 0 is linked, by nvidia-smi; empty where that cannot be asked."""
    try:
        text = _output(["nvidia-smi", "nvlink", "--status", "-i", "0"])
    except OSError:
        return ""
    links = sum("GB/s" in line for line in text.splitlines())
    return f"; GPU 0 has {links} NVLinks" if links else "; no NVLink reported"


def _compilers() -> list[Finding]:
    try:
        from arfusion_pass.backends.build import find_cxx, find_nvcc
    except ImportError:
        nvcc, cxx = shutil.which("nvcc"), shutil.which("g++")
    else:
        nvcc, cxx = find_nvcc(), find_cxx()
    found = []
    for name, path, what in (
        ("nvcc", nvcc, "builds the kernels"),
        ("C++ compiler", cxx, "Inductor's CPU code, op library"),
    ):
        if path is None:
            found.append(Finding(name, "note", f"not found ({what})"))
        else:
            found.append(Finding(name, "ok", f"{path}: {_compiler_version(path)}"))
    return found


def _compiler_version(path: str) -> str:
    try:
        text = _output([path, "--version"])
    except OSError as error:
        return f"cannot be run ({error})"
    lines = [line for line in text.splitlines() if "release" in line] or text.splitlines()
    return lines[0].strip() if lines else "version unknown"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except subprocess.TimeoutExpired:
        return ""


def _library() -> list[Finding]:
    """Whether the kernels' sources and a built library are there."""
    try:
        from arfusion_pass.backends import build
    except ImportError:
        return [Finding("kernels", "missing", "this installation holds no native backend")]
    folder = build.source_dir()
    if folder is None:
        return [Finding("kernels", "missing", "no kernel sources in this installation")]
    found = [Finding("kernels", "ok", f"sources in {folder}")]
    path = build.library_path()
    if path is None:
        found.append(
            Finding("library", "note", f"architecture unknown without a GPU; cache folder {build.cache_dir()}")
        )
    elif path.is_file():
        found.append(Finding("library", "ok", f"built: {path}"))
    else:
        found.append(Finding("library", "note", f"not built yet: {path} (at first use, or by `arfusion build`)"))
    return found


def _verdict() -> Finding:
    """The backend that ``FusionConfig(backend="auto")`` would run on."""
    topic = "backend"
    if not torch.cuda.is_available():
        return Finding(
            topic, "note", "reference (torch ops): no CUDA device; the pass works, its kernels do not run here"
        )
    try:
        from arfusion_pass.backends import build
    except ImportError:
        return Finding(topic, "note", "reference (torch ops): this installation holds no native backend")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return Finding(topic, "note", f"reference (torch ops): sm_{major}{minor} is older than sm_80")
    if build.is_built():
        return Finding(topic, "ok", "native: the kernels are built")
    try:
        build.find_toolchain()
    except build.BuildError as error:
        return Finding(topic, "note", f"reference (torch ops): {error}")
    return Finding(topic, "ok", "native: the kernels will be compiled at first use")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])
