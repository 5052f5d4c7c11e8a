"""The kernels' sources for a C++ compiler, and the library that it makes of them: all of it but torch's binding, on an
emulated GPU (``emulator.cpp``). Nothing is rewritten but what a C++ compiler cannot read: CUDA's keywords, arrays in
shared memory, the table of kernels, and each asm statement, which becomes a call of the function that does the same."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fcf-protection=none", "-w")

# What each asm statement's text does, by the name of the function in ptx.h.
INSTRUCTIONS = {
    "": "",  # an empty statement only hides a value from the compiler
    "mov.u32 %0, %clusterid.x;": "clusterid",
    "mov.u32 %0, %nclusterid.x;": "nclusterid",
    "mov.u32 %0, %cluster_ctarank;": "cluster_ctarank",
    "st.shared.u32 [%0], %1;": "st_shared",
    "ld.shared.u32 %0, [%1];": "ld_shared",
    "ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];": "ld_shared_4",
    "mbarrier.init.shared::cta.b64 [%0], 1;": "mbarrier_init",
    "fence.mbarrier_init.release.cluster;": "nothing",
    "barrier.cluster.arrive.relaxed.aligned;": "cluster_arrive",
    "barrier.cluster.wait.acquire.aligned;": "cluster_wait",
    "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }": "mbarrier_arrive_expect",
    "mapa.shared::cluster.u32 %0, %1, %2;": "mapa",
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];": "st_async",
    "{ .reg .pred done; again_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; "
    "@!done bra again_%=; }": "mbarrier_await",
    "cp.async.cg.shared.global [%0], [%1], 16;": "cp_async",
    "cp.async.wait_all;": "cp_async_wait",
    "st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};": "st_volatile_4",
    "st.volatile.global.v2.u32 [%0], {%1, %2};": "st_volatile_2",
    "st.volatile.global.u32 [%0], %1;": "st_volatile_1",
    "ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];": "ld_volatile_4",
    "ld.volatile.global.v2.u32 {%0, %1}, [%2];": "ld_volatile_2",
    "ld.volatile.global.u32 %0, [%1];": "ld_volatile_1",
    "ld.global.v4.u32 {%0, %1, %2, %3}, [%4];": "ld_4",
    "ld.global.v2.u32 {%0, %1}, [%2];": "ld_2",
    "ld.global.u32 %0, [%1];": "ld_1",
    "ld.global.u8 %0, [%1];": "ld_byte",
    "st.global.L2::cache_hint.u32 [%0], %1, %2;": "st_hint_1",
    "st.global.L2::cache_hint.v4.u32 [%0], {%1, %1, %1, %1}, %2;": "st_hint_4",
    "st.global.u8 [%0], %1;": "st_byte",
    "st.global.f32 [%0], %1;": "st_float",
    "createpolicy.fractional.L2::evict_last.b64 %0, 1.0;": "evict",
    "createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;": "evict",
    "prefetch.global.L2 [%0];": "prefetch",
    "griddepcontrol.wait;": "griddep_wait",
    "griddepcontrol.launch_dependents;": "griddep_launch",
    "mov.u64 %0, %globaltimer;": "globaltimer",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": "cvt_bf16x2",
    "cvt.rn.f16x2.f32 %0, %1, %2;": "cvt_f16x2",
    "{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }": "cvt_from_f16x2",
    "mul.rn.bf16x2 %0, %1, %2;": "mul_bf16x2",
    "mul.rn.f16x2 %0, %1, %2;": "mul_f16x2",
    "add.rn.bf16x2 %0, %1, %2;": "add_bf16x2",
    "add.rn.f16x2 %0, %1, %2;": "add_f16x2",
    "max.NaN.f32 %0, %1, %2;": "max_nan",
    "min.NaN.f32 %0, %1, %2;": "min_nan",
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": "cvt_e4m3x2",
    "cvt.rn.f16x2.e4m3x2 %0, %1;": "cvt_from_e4m3x2",
    "lop3.b32 %0, %1, %2, 0x80000000, 0xD8;": "lop3_sign",
    "rcp.approx.ftz.f32 %0, %1;": "rcp_approx",
    # Not compiled for the architecture that is emulated.
    "{ .reg .b8 b; cvt.rn.satfinite.e2m1x2.f32 b, %1, %2; cvt.u32.u8 %0, b; }": "not_emulated",
    "cvt.rp.satfinite.ue8m0x2.f32 %0, %1, %2;": "not_emulated",
    "mov.u64 %0, %clock64;": "not_emulated",
}
KEYWORDS = {
    "__device__": "",
    "__host__": "",
    "__global__": "",
    "__grid_constant__": "",
    "__forceinline__": "inline",
    "__noinline__": "__attribute__((noinline)) inline",
}


def closing(text: str, at: int) -> int:
    """Where the bracket at ``at`` closes; strings are skipped."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"a bracket that does not close: {text[at : at + 60]}")


def split(text: str, separator: str) -> list[str]:
    """``text`` at a separator outside strings and brackets (``::`` is no ``:``)."""
    parts, start, i, depth, quoted = [], 0, 0, 0, False
    while i < len(text):
        if text[i] == '"':
            quoted = not quoted
        elif not quoted:
            depth += (text[i] in "([{") - (text[i] in ")]}")
            if depth == 0 and text[i] == separator:
                parts.append(text[start:i])
                start = i + 1
        i += 1
    return [*parts, text[start:]]


def call_of(statement: str) -> str:
    """The call that an asm statement's inside, its comments gone, stands for."""
    template, *operands = split(statement, ":")
    instruction = " ".join("".join(re.findall(r'"([^"]*)"', template)).replace("\\n\\t", " ").split())
    if instruction not in INSTRUCTIONS:
        raise ValueError(f"teach kernels/tests/emulated this instruction: {instruction}")
    if not instruction:
        return ""
    arguments = []
    for constrained in operands[:2]:  # outputs and inputs; the rest are clobbers
        for operand in split(constrained, ","):
            if operand.strip():
                opened = operand.index("(")
                arguments.append(operand[opened + 1 : closing(operand, opened)])
    return f"::emulated::ptx::{INSTRUCTIONS[instruction]}({', '.join(arguments)})"


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)


def translate(text: str) -> str:
    """One source, line for line."""
    text = without_comments(text)
    while found := re.search(r"\basm\s*(volatile)?\s*\(", text):
        end = closing(text, found.end() - 1)
        inside = text[found.end() : end]
        text = text[: found.start()] + call_of(inside) + "\n" * inside.count("\n") + text[end + 1 :]
    text = re.sub(r"extern __shared__ uint4 (\w+)\[\];",
                  r"#define \1 static_cast<uint4*>(::emulated::dynamic_shared_memory())", text)  # fmt: skip
    text = re.sub(r"__shared__ (\w+) (\w+)\[(\w+)\];", r"auto& \2 = ::emulated::shared<\1[\3]>(__LINE__);", text)
    text = re.sub(r"__shared__ (\w+) (\w+);", r"\1& \2 = ::emulated::shared<\1>(__LINE__);", text)
    text = re.sub(r"__launch_bounds__\([^)]*\)", "", text)
    text = re.sub(r"reinterpret_cast<const void\*>\((&arf::\w+<)", r"::emulated::kernel(\1", text)
    for keyword, meaning in KEYWORDS.items():
        text = re.sub(rf"\b{keyword}\b", meaning, text)
    return text


def build(
    folder: Path, units: tuple[str, ...], faults: dict[str, tuple[str, str]] | None = None, jobs: int = 2
) -> Path:
    """``libemulated.so`` in ``folder``: the host code, and the kernels of ``units`` (``bf16_simulated``, ...).

    A call that needs another unit's kernels ends the process: a launch of no kernel. ``faults``: by source, what stands
    there and a mistake in its place, for tests of what the emulated GPU sees.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path for path in KERNELS.iterdir() if path.suffix in (".cu", ".cuh", ".h")}
    for name, path in sources.items():
        right, wrong = (faults or {}).get(name, ("", ""))
        text = path.read_text()
        if right and text.count(right) != 1:
            raise ValueError(f"{name} has this {text.count(right)} times: {right}")
        translated = translate(text.replace(right, wrong, 1) if right else text)
        (folder / f"{path.stem}.cpp" if path.suffix == ".cu" else folder / name).write_text(translated)
    every = [path.stem for path in KERNELS.glob("kernels_*.cu")]
    absent = [f"const void* {name}(int, int) {{ return nullptr; }}" for name in every if name[8:] not in units]
    (folder / "absent.cpp").write_text("namespace arf {\n" + "\n".join(absent) + "\n}\n")
    host = ("listing", "payload", "plan", "library", "absent")
    device = tuple(f"kernels_{unit}" for unit in units)

    def compile_one(name: str) -> Path:
        source, target = folder / f"{name}.cpp", folder / f"{name}.o"
        source = HERE / "emulator.cpp" if name == "emulator" else source
        defines = ("-D__CUDA_ARCH__=900",) if name in device else ()
        prefix = ("-include", "ptx.h")
        command = ["g++", *FLAGS, *defines, f"-I{folder}", f"-I{HERE}", *prefix, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, (*device, *host, "emulator")))
    library = folder / "libemulated.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library
