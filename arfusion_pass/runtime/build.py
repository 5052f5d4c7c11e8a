"""Compile the CUDA kernels and the op library into one shared object, once a machine, and find it again.

In: the folder of kernel sources (:func:`source_dir`) and an architecture such as ``"90a"``. Out: the path of
``libarfusion-<arch>-<key>.so`` in the cache folder, built by nvcc (one process a translation unit, in parallel) and
g++ (``*.cpp`` against torch's stable ABI) if it is not there yet. Nothing is compiled by ``pip install``: the library
is built on first use, or ahead of time by ``arfusion build`` (which needs no GPU when it is given an architecture).

    path = build(arch="90a")                     # what ``arfusion build --arch 90a`` does
    path = library_path()                        # where it is, or would be; None where nothing says for what GPU

The cache key is a hash of the sources, the flags, the architecture and the torch ABI target; not of the compiler, so
that a library built in one container is found in another that has none.

A library of the same key in an installed ``arfusion-pass-kernels`` (:mod:`arfusion_pass.runtime.prebuilt`) serves where
the cache has none. Environment:

* ``ARFUSION_LIBRARY``: path of a built library, used as it is.
* ``ARFUSION_CACHE_DIR``: the cache folder (default ``$XDG_CACHE_HOME/arfusion`` or ``~/.cache/arfusion``). A library
  in a default folder is loaded only where it and the folder belong to the user or to root and nobody else may write.
* ``ARFUSION_ARCH``: the architecture to build for where the device's is not wanted.
* ``ARFUSION_NVCC``, ``CUDA_HOME``, ``CXX``: the compilers.
* ``MAX_JOBS``: how many compilers run at once (default: the CPU cores this process may use).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import platformdirs
import torch

from arfusion_pass.runtime import files, prebuilt

TORCH_TARGET = "0x020b000000000000"
"""The stable ABI that the op library is written to: torch 2.11. One build serves that version and later ones."""

MINIMUM_TORCH = (2, 11)

NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static")
CXX_FLAGS = (
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
)
LINK_FLAGS = ("-Xlinker", "--as-needed", "-Xlinker", "-z,defs", "-Xlinker", "--exclude-libs,ALL", "-Xlinker", "-s")

_SOURCE_SUFFIXES = (".cu", ".cuh", ".h", ".hpp", ".cpp")
_ARCHITECTURES = {(9, 0): "90a", (10, 0): "100a", (10, 3): "103a", (12, 0): "120a", (12, 1): "121a"}
_COMPILER_TIMEOUT = 1800.0


class BuildError(RuntimeError):
    """The library could not be built; the message holds the command and the compiler's output."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """The compilers that a build uses, and where they were found."""

    nvcc: str
    cxx: str

    @property
    def cuda_root(self) -> Path:
        """The CUDA toolkit that ``nvcc`` belongs to."""
        return Path(os.path.realpath(self.nvcc)).parent.parent


@dataclasses.dataclass(frozen=True)
class CompileEvent:
    """Progress of a build: ``done`` of ``total`` steps are over, the last of them ``name`` after ``seconds``."""

    name: str
    seconds: float
    done: int
    total: int


def source_dir() -> Path | None:
    """The folder of the kernel sources: ``arfusion_pass/_kernels`` in a wheel, ``kernels/`` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_kernels", package.parent / "kernels"):
        if any(folder.glob("*.cu")):
            return folder
    return None


def cache_dir() -> Path:
    """The folder of built libraries and tuned thresholds (``ARFUSION_CACHE_DIR``, or the user's cache folder)."""
    if explicit := os.environ.get("ARFUSION_CACHE_DIR"):
        return _path("ARFUSION_CACHE_DIR", explicit)
    try:
        return platformdirs.user_cache_path("arfusion").expanduser()
    except RuntimeError:  # no home folder: a container run under an unknown user id
        return Path(tempfile.gettempdir()) / f"arfusion-{os.getuid()}"


def _path(variable: str, value: str) -> Path:
    """A path that the user named, with ``~`` as a shell has it."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise BuildError(f"{variable}={value}: {error}") from None


def is_named() -> bool:
    """Whether the user named the library or the cache folder, which are then taken as they are."""
    return bool(os.environ.get("ARFUSION_LIBRARY") or os.environ.get("ARFUSION_CACHE_DIR"))


def distrust(path: Path) -> str | None:
    """Why a library that lies at ``path`` must not be loaded, with what to do about it, or None."""
    if is_named() or prebuilt.holds(path):
        return None
    why = files.distrust(path.parent) or files.distrust(path)
    return why and f"{why}, so what lies in {path.parent} is not loaded. Remove it, or set ARFUSION_CACHE_DIR."


def device_arch(device: int | None = None) -> str | None:
    """The architecture to build for: ``ARFUSION_ARCH``, else that of the given or current device, else None.

    Raises:
        BuildError: ``ARFUSION_ARCH`` is no architecture.
    """
    if explicit := os.environ.get("ARFUSION_ARCH"):
        try:
            return normalise_arch(explicit)
        except ValueError as error:
            raise BuildError(f"ARFUSION_ARCH: {error}. Correct or unset it.") from None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in _ARCHITECTURES:
        return _ARCHITECTURES[major, minor]
    # sm_80 machine code runs on every 8.x; an unknown newer device gets its own plain target.
    return "80" if major == 8 else f"{major}{minor}"


def normalise_arch(arch: str) -> str:
    """``"sm_90a"``, ``"9.0a"``, ``"90a"`` and ``"90"`` (of which only ``90a`` is built) to ``"90a"``.

    Raises:
        ValueError: if ``arch`` does not look like an architecture of compute capability 8.0 or later.
    """
    text = arch.lower().removeprefix("sm_").removeprefix("compute_").replace(".", "")
    digits = text.rstrip("af")
    if not (digits.isascii() and digits.isdigit()) or not 80 <= int(digits) < 1000 or len(text) - len(digits) > 1:
        raise ValueError(f"architecture {arch!r} is not of the form '80', '90a', 'sm_100a' or '12.0a' (8.0 at least)")
    known = {value.rstrip("a"): value for value in _ARCHITECTURES.values()}
    return known.get(text, text)


def source_files(folder: Path) -> list[Path]:
    """Every file of ``folder`` that a build reads (sub-folders hold tests and tools, which it does not)."""
    return sorted(path for path in folder.iterdir() if path.suffix in _SOURCE_SUFFIXES and path.is_file())


def build_key(folder: Path, arch: str) -> str:
    """Hash of the sources, flags, architecture and torch ABI target: the same key, the same library."""
    digest = hashlib.sha256(repr((NVCC_FLAGS, CXX_FLAGS, LINK_FLAGS, arch, TORCH_TARGET)).encode())
    for path in source_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def library_path(arch: str | None = None) -> Path | None:
    """Where the library for ``arch`` (default: the device's) is, or would be built; None where neither is known.

    ``ARFUSION_LIBRARY`` wins over everything, the cache over an installed wheel.
    """
    if explicit := os.environ.get("ARFUSION_LIBRARY"):
        return _path("ARFUSION_LIBRARY", explicit)
    name = library_name(arch)
    if name is None:
        return None
    path = cache_dir() / name
    return path if is_usable(path) else prebuilt.find(name) or path


def library_name(arch: str | None = None) -> str | None:
    """What the library for ``arch`` (default: the device's) is called; None where that, or the sources, are missing."""
    arch = device_arch() if arch is None else normalise_arch(arch)
    folder = source_dir()
    return None if arch is None or folder is None else f"libarfusion-sm{arch}-{build_key(folder, arch)}.so"


def why_not_installed() -> str | None:
    """Why an ``arfusion-pass-kernels`` that is installed does not serve this machine; None where it does, or is not."""
    name = library_name()
    return None if name is None else prebuilt.why_not(name)


def find_nvcc() -> str | None:
    """nvcc: ``ARFUSION_NVCC``, ``CUDA_HOME``, ``CUDA_PATH``, the PATH, /usr/local/cuda, NVIDIA's wheels."""
    if explicit := os.environ.get("ARFUSION_NVCC"):
        return explicit if _is_program(explicit) else None
    candidates = [
        os.path.join(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    candidates.append(shutil.which("nvcc") or "")
    candidates.append("/usr/local/cuda/bin/nvcc")
    site = sysconfig.get_paths()["purelib"]
    candidates += [os.path.join(site, "nvidia", part, "bin", "nvcc") for part in ("cu13", "cuda_nvcc")]
    return next(filter(_is_program, candidates), None)


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def find_cxx() -> str | None:
    """The C++ compiler: ``CXX`` (one program, no arguments), else g++, c++ or clang++ on the PATH."""
    if explicit := os.environ.get("CXX"):
        return shutil.which(explicit)
    return next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)


def find_toolchain(note: str | None = None) -> Toolchain:
    """The compilers, or a :class:`BuildError` that says which is missing and what to do about it, with ``note``."""
    nvcc, cxx = find_nvcc(), find_cxx()
    wanted = (("nvcc (CUDA 12.8 or later)", nvcc, "ARFUSION_NVCC"), ("a C++17 compiler", cxx, "CXX"))
    missing = [
        f"{name} (by {variable}={os.environ[variable]})" if os.environ.get(variable) else name
        for name, path, variable in wanted
        if path is None
    ]
    if nvcc is None or cxx is None:
        raise BuildError(
            f"{' and '.join(missing)} not found, so the arfusion kernels cannot be compiled here. Install the CUDA "
            "toolkit (or set CUDA_HOME / ARFUSION_NVCC / CXX), or build the library on another machine: "
            "`arfusion build --wheel DIR` makes a wheel to install here, `arfusion build --arch ARCH` a file that "
            f"ARFUSION_LIBRARY names.{f' {note}' if note else ''}"
        )
    return Toolchain(nvcc, cxx)


def is_built(arch: str | None = None) -> bool:
    """Whether :func:`build` would find the library rather than compile it."""
    path = library_path(arch)
    return path is not None and is_usable(path)


def is_usable(path: Path) -> bool:
    """Whether the library at ``path`` is there, whole, and nobody else's."""
    return os.path.isfile(path) and files.is_whole_library(path) and distrust(path) is None


def build(
    arch: str | None = None,
    *,
    force: bool = False,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[CompileEvent], None] | None = None,
    verbose: bool = False,
) -> Path:
    """Build the library unless it is in the cache, and return its path.

    Several processes that ask at once build it once: the others wait for the first (at most half an hour).

    Args:
        arch: architecture, such as ``"90a"``; default: ``ARFUSION_ARCH``, else the current device's.
        force: compile even if it is there.
        output: copy the library to this path too (for a container image; set ``ARFUSION_LIBRARY`` to it there).
        progress: called after each step, from the calling thread; default: a progress bar, or lines on stderr.
        verbose: print every command.

    Raises:
        BuildError: no sources, no compiler, no architecture, a folder of another user's, or the compiler failed (its
            output is in the message).
    """
    explicit = os.environ.get("ARFUSION_LIBRARY")
    if explicit and not force and output is None:
        path = _path("ARFUSION_LIBRARY", explicit)
        if not os.path.isfile(path):
            raise BuildError(f"ARFUSION_LIBRARY is set to {explicit!r}, which is no file. Correct or unset it.")
        if not files.is_whole_library(path):
            raise BuildError(
                f"ARFUSION_LIBRARY is set to {explicit!r}, which is no library, or one that was cut short. Copy it "
                "anew, or unset it."
            )
        return path
    arch = device_arch() if arch is None else normalise_arch(arch)
    if arch is None:
        raise BuildError("no CUDA device is visible, so the architecture must be given: `arfusion build --arch 90a`.")
    folder = source_dir()
    if folder is None:
        raise BuildError("this installation holds no kernel sources (neither arfusion_pass/_kernels nor kernels/).")
    name = f"libarfusion-sm{arch}-{build_key(folder, arch)}.so"
    path = cache_dir() / name
    if not force and not is_usable(path) and (installed := prebuilt.find(name)) and is_usable(installed):
        path = installed
    try:
        if force or not is_usable(path):
            _make_cache_folder(path.parent)
            with files.locked(path.with_suffix(".lock")):
                if force or not is_usable(path):
                    _compile(folder, arch, path, progress, verbose)
        if output is not None:
            target = Path(output)
            target.parent.mkdir(parents=True, exist_ok=True)
            files.replace_by_copy(path, target)
    except files.LockError as error:
        raise BuildError(str(error)) from None
    except OSError as error:
        raise BuildError(f"cannot write the library: {error}. Set ARFUSION_CACHE_DIR, or another output.") from error
    return path


def _make_cache_folder(folder: Path) -> None:
    """The cache folder, the user's alone unless the user named it."""
    try:
        if is_named():
            folder.mkdir(parents=True, exist_ok=True)
        else:
            files.private_folder(folder)
    except OSError as error:
        raise BuildError(f"cannot create the cache folder {folder}: {error}. Set ARFUSION_CACHE_DIR.") from error
    if not is_named() and (why := files.distrust(folder)):
        raise BuildError(f"{why}, so no library is built there. Remove it, or set ARFUSION_CACHE_DIR.")


def _compile(
    folder: Path, arch: str, path: Path, progress: Callable[[CompileEvent], None] | None, verbose: bool
) -> None:
    """Compile every translation unit of ``folder`` in parallel, link, and rename the result to ``path``."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise BuildError(
            f"the op library needs torch 2.11 or later (its stable ABI); this is torch {torch.__version__}."
        )
    tools = find_toolchain(prebuilt.why_not(path.name))
    units = sorted(
        (unit for unit in source_files(folder) if unit.suffix in (".cu", ".cpp")),
        key=lambda unit: unit.stat().st_size,
        reverse=True,
    )
    jobs_at_once = max_jobs()
    prefix = f"build-{path.stem}-"
    for left_over in path.parent.glob(f"{prefix}*"):  # of a build that was killed: this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(_default_progress(arch, len(units) + 1))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent)))
        stop = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=jobs_at_once))
        jobs = {
            pool.submit(_run, _compile_command(tools, unit, work / f"{unit.name}.o", arch), stop, verbose): unit
            for unit in units
        }
        total, failure = len(units) + 1, None
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                try:
                    progress(CompileEvent(jobs[job].name, job.result(), done, total))
                except BuildError as error:
                    stop.set()  # the other compilers are stopped, not waited for
                    failure = failure or error
        except BaseException:  # Ctrl-C: no further compiler is started
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        if failure is not None:
            raise failure
        linked = work / path.name
        seconds = _run(_link_command(tools, [work / f"{unit.name}.o" for unit in units], linked), stop, verbose)
        os.chmod(linked, linked.stat().st_mode & ~0o022)  # a umask of 002 would have the next process distrust it
        os.replace(linked, path)
        progress(CompileEvent("link", seconds, total, total))


def max_jobs() -> int:
    """How many compilers run at once: ``MAX_JOBS``, or as many as this process may use cores.

    Raises:
        BuildError: the variable holds no positive integer.
    """
    if explicit := os.environ.get("MAX_JOBS"):
        if not explicit.isdecimal() or int(explicit) < 1:
            raise BuildError(f"MAX_JOBS must be a positive integer, got {explicit!r}. Correct or unset it.")
        return int(explicit)
    return max(1, len(os.sched_getaffinity(0)))


def torch_include_dir() -> Path:
    """torch's C++ headers."""
    return Path(torch.__file__).parent / "include"


def _compile_command(tools: Toolchain, unit: Path, target: Path, arch: str) -> list[str]:
    if unit.suffix == ".cu":
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        return [tools.nvcc, "-c", str(unit), "-o", str(target), *NVCC_FLAGS, code, "-ccbin", tools.cxx]
    includes = ["-isystem", str(torch_include_dir())]
    if (tools.cuda_root / "include").is_dir():
        includes += ["-isystem", str(tools.cuda_root / "include")]
    return [tools.cxx, "-c", str(unit), "-o", str(target), *CXX_FLAGS, *includes]


def _link_command(tools: Toolchain, objects: list[Path], target: Path) -> list[str]:
    # nvcc links, because it knows where its own static runtime lies.
    library = Path(torch.__file__).parent / "lib"
    flags = [*LINK_FLAGS, f"-L{library}", "-ltorch_cpu", "-ldl", "-lrt", "-lpthread"]
    return [
        tools.nvcc,
        "-shared",
        "-cudart",
        "static",
        "-ccbin",
        tools.cxx,
        "-o",
        str(target),
        *map(str, objects),
        *flags,
    ]


def _run(command: list[str], stop: threading.Event, verbose: bool) -> float:
    """Run one compiler and return its seconds; :class:`BuildError` with its output if it fails."""
    if stop.is_set():
        raise BuildError("stopped: another translation unit failed")
    if verbose:
        print("+", " ".join(command), file=sys.stderr)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while (code := process.poll()) is None:
                if stop.is_set() or time.monotonic() - start > _COMPILER_TIMEOUT:
                    break
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # nvcc's own children too
                process.wait()
        seconds = time.monotonic() - start
        if code == 0:
            return seconds
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if code is None:
        why = "stopped: another translation unit failed" if stop.is_set() else f"no end after {seconds:.0f} s"
    else:
        why = f"exit status {code}"
    lines = text.splitlines()
    if len(lines) > 120:
        lines = [*lines[:60], f"... {len(lines) - 120} lines left out ...", *lines[-60:]]
    raise BuildError(f"compiling the arfusion kernels failed ({why}):\n+ {' '.join(command)}\n" + "\n".join(lines))


@contextlib.contextmanager
def _default_progress(arch: str, total: int) -> Iterator[Callable[[CompileEvent], None]]:
    """A progress bar on a terminal; elsewhere (logs) one line at the start and one at the end."""
    start = time.monotonic()
    title = f"arfusion: compiling the CUDA kernels for sm_{arch}"
    if not sys.stderr.isatty():
        print(f"{title} ({total} steps, once; cached in {cache_dir()})", file=sys.stderr, flush=True)
        yield lambda event: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[unit]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total, unit="")
            yield lambda event: bar.update(task, completed=event.done, unit=event.name)
    print(f"arfusion: kernels ready after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
