"""The ctypes structures against ``kernels/api.h``, by compiling it: sizes, offsets, constants, exported names."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from arfusion_pass.runtime import build, c_api

HEADER = build.source_dir() / "api.h" if build.source_dir() else None
pytestmark = pytest.mark.skipif(
    HEADER is None or shutil.which("gcc") is None, reason="needs the kernel sources and a C compiler"
)

STRUCTURES = {
    "arf_error_record": c_api.ErrorRecord,
    "arf_workspace_desc": c_api.WorkspaceDesc,
    "arf_threshold": c_api.Threshold,
    "arf_call": c_api.Call,
    "arf_plan_info": c_api.PlanInfo,
}
CONSTANTS = {
    "ARF_ABI_VERSION": c_api.ABI_VERSION,
    "ARF_MAX_WORLD": c_api.MAX_WORLD,
    "ARF_CONTROL_BYTES": c_api.CONTROL_BYTES,
    **{f"ARF_{status.name}": status.value for status in c_api.Status},
    **{f"ARF_{state.name}": state.value for state in c_api.RecordState},
    **{f"ARF_{strategy.name}": strategy.value for strategy in c_api.Strategy},
}


def test_layout_and_constants(tmp_path: Path) -> None:
    lines = [
        f"#include {str(HEADER)!r}".replace("'", '"'),
        "#include <stddef.h>",
        "#include <stdio.h>",
        "int main(void) {",
    ]
    want = {}
    for name, structure in STRUCTURES.items():
        want[name] = ctypes.sizeof(structure)
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in structure._fields_:
            want[f"{name}.{field}"] = getattr(structure, field).offset
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    for name, value in CONSTANTS.items():
        want[name] = value
        lines.append(f'printf("{name} %d\\n", (int){name});')
    (tmp_path / "layout.c").write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run(["gcc", "layout.c", "-o", "layout"], cwd=tmp_path, check=True)
    output = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    assert {name: int(value) for name, value in map(str.split, output.splitlines())} == want


def test_every_function_is_declared_on_both_sides() -> None:
    assert HEADER is not None
    declared = set(re.findall(r"ARF_API [^;]*?\b(arf_\w+)\(", HEADER.read_text()))
    assert declared == set(c_api._PROTOTYPES)
