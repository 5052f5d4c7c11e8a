"""FlashInfer's fused all-reduce from its pip wheel, compiled ahead of time for a GPU machine without a network.

    python -m benchmarks.flashinfer_kit OUT            # OUT/flashinfer_kit.tar.xz, 8 MB, five minutes on two cores
    arfusion bench --world 2 --kit flashinfer_kit      # where it is unpacked

Where FlashInfer itself is installed no kit is needed: the benchmarks take what ``import flashinfer`` finds. The kit is
the wheel's ``flashinfer.comm`` with what that imports, under package files that import nothing else, and the shared
objects of its kernels, which its loader looks for before it would compile. Needs pip, nvcc and a Linux x86-64 host.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VERSION, TVM_FFI = "0.7.2.post1", "0.1.15.post2"
PYTHON = "3.12"
SOURCES = {
    "vllm_comm": ("vllm_custom_all_reduce.cu",),
    "trtllm_comm": ("trtllm_allreduce.cu", "trtllm_allreduce_fusion.cu", "trtllm_moe_allreduce_fusion.cu"),
}
"""FlashInfer's name of a module: its translation units (a workspace is emptied by the first of the second)."""
LEFT_OUT = ("comm/nvshmem", "comm/trtllm_alltoall", "comm/trtllm_moe_alltoall", "comm/dcp", "trace/templates/")
HEADERS = ("data/include/", "data/csrc/tvm_ffi_utils.h", "data/spdlog/include/", "data/cccl/libcudacxx/include/")
CHECKED_FOLDERS = (
    "cccl/libcudacxx/include",
    "cccl/cub",
    "cccl/thrust",
    "cutlass/include",
    "cutlass/tools/util/include",
)
"""Under ``data/``: FlashInfer's loader wants them to exist, empty or not."""

COMM = """
from .allreduce import allreduce_fusion, create_allreduce_fusion_workspace
from .cuda_ipc import create_shared_buffer, free_shared_buffer
from .trtllm_ar import AllReduceFusionPattern, QuantizationSFLayout
from .trtllm_ar import trtllm_moe_allreduce_fusion, trtllm_moe_finalize_allreduce_fusion
from .vllm_ar import all_reduce as vllm_all_reduce
from .vllm_ar import get_graph_buffer_ipc_meta as vllm_get_graph_buffer_ipc_meta
from .vllm_ar import init_custom_ar as vllm_init_custom_ar
from .vllm_ar import meta_size as vllm_meta_size
from .vllm_ar import register_buffer as vllm_register_buffer
from .vllm_ar import register_graph_buffers as vllm_register_graph_buffers
"""
JIT = """
from . import env
from .comm import gen_trtllm_comm_module, gen_trtllm_mnnvl_comm_module, gen_vllm_comm_module
from .core import JitSpec, current_compilation_context, gen_jit_spec
"""
PACKAGE_FILES = {
    "__init__.py": "from .version import __version__\n",
    "comm/__init__.py": COMM.lstrip(),
    "jit/__init__.py": JIT.lstrip(),
    "trace/templates/__init__.py": "",
    # Only a size helper of it is read, and it imports the whole library.
    "fp4_quantization.py": (
        "def _compute_swizzled_layout_sf_size(rows, columns, row_size=128):\n"
        "    return -(-rows // row_size) * row_size * (-(-columns // 4) * 4)\n"
    ),
}
NVCC = ["nvcc", "-w", "-std=c++17", "-O3", "-DNDEBUG", "-use_fast_math", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
NVCC += [f"-DFLASHINFER_ENABLE_{name}" for name in ("F16", "BF16", "FP8_E4M3", "FP8_E5M2", "FP8_E8M0", "FP4_E2M1")]
"""FlashInfer's own flags."""


def run(*command: str) -> None:
    print("+", " ".join(command)[:160], flush=True)
    subprocess.run(command, check=True)


def download(folder: Path, requirement: str) -> Path:
    """The wheel of ``requirement`` for the GPU machine's Python."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 24, 17)]
    run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--python-version", PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder), requirement),
    )
    return next(folder.glob(requirement.split("=")[0].replace("-", "_") + "-*.whl"))


def wanted(name: str) -> bool:
    """Whether the kit holds this file of the wheel."""
    path = name.removeprefix("flashinfer/")
    if path == name or path in PACKAGE_FILES or path.startswith(LEFT_OUT):
        return path == "trace/templates/comm.py"
    units = {f"data/csrc/{unit}" for sources in SOURCES.values() for unit in sources}
    python = path.endswith(".py") and (path.count("/") == 0 or path.startswith(("comm/", "jit/", "trace/")))
    return python or path in units or path.startswith(HEADERS)


def unpack(kit: Path, wheels: Path, version: str, tvm_ffi: str) -> None:
    """What is kept of the two wheels, and the package files."""
    with zipfile.ZipFile(download(wheels, f"flashinfer-python=={version}")) as wheel:
        wheel.extractall(kit, filter(wanted, wheel.namelist()))
    with zipfile.ZipFile(download(wheels, f"apache-tvm-ffi=={tvm_ffi}")) as wheel:
        wheel.extractall(kit)
    for name, text in PACKAGE_FILES.items():
        path = kit / "flashinfer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in CHECKED_FOLDERS:
        (kit / "flashinfer" / "data" / folder).mkdir(parents=True, exist_ok=True)


def compile_module(kit: Path, work: Path, name: str, architecture: str) -> None:
    """``data/aot/NAME/NAME.so``, its translation units side by side."""
    data, ffi = kit / "flashinfer" / "data", kit / "tvm_ffi"
    target = data / "aot" / name
    target.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{data / path}" for path in ("include", "csrc", *CHECKED_FOLDERS[:1], "spdlog/include")]
    flags = [*NVCC, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", *includes, f"-I{ffi / 'include'}"]
    objects = [str(work / f"{unit}.o") for unit in SOURCES[name]]
    jobs = [
        subprocess.Popen([*flags, "-c", str(data / "csrc" / unit), "-o", made])
        for unit, made in zip(SOURCES[name], objects, strict=True)
    ]
    statuses = [job.wait() for job in jobs]
    if any(statuses):
        sys.exit(f"compiling {name} failed")
    # The driver's library is not on a machine without a GPU: linked by name only.
    (work / "empty.c").write_text("")
    run("gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(work / "libcuda.so"), str(work / "empty.c"))
    run(
        *("nvcc", "-shared", "-cudart", "shared", "-o", str(target / f"{name}.so"), *objects),
        *(f"-L{ffi / 'lib'}", "-ltvm_ffi", f"-L{work}", "-Xlinker=--no-as-needed", "-lcuda"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--version", default=VERSION, help="of flashinfer-python")
    parser.add_argument("--tvm-ffi", default=TVM_FFI, help="of apache-tvm-ffi")
    parser.add_argument("--arch", default="90a", help="the GPU's architecture")
    arguments = parser.parse_args()
    kit = arguments.out.resolve() / "flashinfer_kit"
    shutil.rmtree(kit, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        unpack(kit, work / "wheels", arguments.version, arguments.tvm_ffi)
        for name in SOURCES:
            compile_module(kit, work, name, arguments.arch)
    headers = kit / "flashinfer" / "data" / CHECKED_FOLDERS[0]  # most of the size, and of no more use
    shutil.rmtree(headers)
    headers.mkdir()
    archive = kit.with_suffix(".tar.xz")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(kit, kit.name)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
