"""The op library's own checks (``kernels/binding.h``) without a GPU: its ops registered for CPU tensors, in front of a
launch that only counts (``binding_stub.cpp``). What ``ops/checks.py`` refuses it refuses, in the same words, and
launches nothing."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arfusion_pass.runtime import build

ROOT = Path(__file__).parents[2]
# torch 2.15.0 makes a RuntimeError of a std::invalid_argument that a boxed C++ kernel throws, in the same words.
REFUSED = "ValueError" if torch.torch_version.TorchVersion(torch.__version__) < (2, 15) else "RuntimeError"
SOURCES, COMPILER = build.source_dir(), build.find_cxx()
pytestmark = pytest.mark.skipif(
    SOURCES is None or COMPILER is None or not (build.torch_include_dir() / "torch/csrc/stable/c/shim.h").is_file(),
    reason="needs the kernel sources, a C++ compiler and torch's headers",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert SOURCES is not None
    assert COMPILER is not None
    path = tmp_path_factory.mktemp("binding") / "stub.so"
    command = [COMPILER, "-shared", "-o", str(path), "-O1", "-DARF_TEST_ON_CPU", f"-I{SOURCES}"]
    command += [flag for flag in build.CXX_FLAGS if flag != "-O2"] + ["-isystem", str(build.torch_include_dir())]
    command += ["-x", "c++", *(str(SOURCES / name) for name in ("binding.cpp", "plan.cu", "payload.cu"))]
    command += [str(Path(__file__).with_name("binding_stub.cpp"))]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return path


def _in_process(library: Path, mode: str) -> dict[str, list[str]]:
    """Run this file on the library in a process of its own, which the registrations do not outlive."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(library), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_refuses_in_the_words_of_the_checks(library: Path) -> None:
    """2,500 random calls, right and broken ones: both sides take them, or both refuse in the same sentence."""
    results = _in_process(library, "words")
    assert results["problems"] == []
    assert len(results["refused"]) > 1000
    assert len(results["launched"]) > 300


def test_refuses_by_itself_what_varies_from_call_to_call(library: Path) -> None:
    """Python is asked once for each kind of call (dtypes, flags, quantiser): shapes, strides, memory and factors the
    library checks itself, every time."""
    results = _in_process(library, "alone")
    assert results["problems"] == []
    assert len(results["refused"]) > 800


def test_errors_of_python_ops_keep_kind_and_words(library: Path) -> None:
    """A ValueError on the reference, a RuntimeError of the fallback, an unknown group: each as it was raised."""
    name = "arfusion::allreduce_rms_norm"
    assert _in_process(library, "errors") == {
        "reference": [REFUSED, f"{name}: epsilon must be finite in fp32 and not negative, got -1.0"],
        "fallback": ["RuntimeError", "no wire"],
        "group": [REFUSED, f"{name}: no process group is called 'nobody'"],
        "asked": ["2"],
    }


def test_sequence_parallelism(library: Path) -> None:
    """What the kernels have of its op is launched, each rank owning blocks of its own rows; the rest is the group's
    collectives'. Rows that are no rank's share are refused at every call, not at the first alone."""
    results = _in_process(library, "scattering")
    taken = {name: what for name, (what, _) in SCATTERED.items()}
    assert {name: results[name] for name in taken} == taken
    assert results["launch"] == results["wanted"]
    assert results["first sum"] == results["wanted first sum"]


def _words(stub: ctypes.CDLL, alone: bool) -> dict[str, list[str]]:
    from arfusion_pass.runtime import fallback
    from tests.bad_calls import calls

    results: dict[str, list[str]] = {"problems": [], "refused": [], "launched": []}
    if alone:
        fallback.check_call = lambda *_, **__: None  # type: ignore[assignment]
    for call in calls(2500, seed=1):
        wanted, before, found = call.refusal(), stub.stub_launches(), None
        if alone and any(change in call.what for change in ("dtype", "flags", "quant")):
            continue
        try:
            call.run()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        launched = stub.stub_launches() > before
        kind, _, words = (found or "").partition(": ")
        right = kind in ("ValueError", REFUSED) and (alone or words == wanted)
        if launched != (wanted is None) or (wanted is not None and not right):
            results["problems"].append(f"{call.what}: wanted {wanted}, got {found}, launched: {launched}")
        results["launched" if launched else "refused"].append(call.what)
    return results


def _errors(stub: ctypes.CDLL) -> dict[str, list[str]]:
    from arfusion_pass.ops.library import fused_op
    from arfusion_pass.ops.spec import Flags
    from arfusion_pass.runtime import fallback

    op, results, asked = fused_op("allreduce_rms_norm"), {}, []
    x = torch.ones(4, 64)
    check = fallback.check_call

    def counted(*args: object, **kwargs: object) -> None:
        asked.append(args)
        check(*args, **kwargs)  # type: ignore[arg-type]

    def no_wire(*_: object) -> None:
        raise RuntimeError("no wire")

    def run(name: str, group: str = "", state: int = 1, **changes: object) -> None:
        stub.stub_set_state(state)
        try:
            op(x, None, None, None, group, norm_out=torch.empty(4, 64), **changes)
        except Exception as error:
            results[name] = [type(error).__name__, str(error)]

    fallback.check_call = counted  # type: ignore[assignment]
    fallback._all_reduce = no_wire  # type: ignore[assignment]
    run("reference", flags=int(Flags.REFERENCE), epsilon=-1.0)
    run("fallback", group="0", state=2)
    run("group", group="nobody", state=0)
    stub.stub_set_state(1)
    for tokens in range(4):
        op(x[:tokens], None, None, None, "0", norm_out=torch.empty(tokens, 64))
    results["asked"] = [str(len(asked))]
    return results


OWN, WHOLE = torch.empty(4, 64, dtype=torch.bfloat16), torch.empty(8, 64, dtype=torch.bfloat16)
SHARE = "a residual, its sum, an addend or a factor has 2 rows, and 8 tokens are 4 for each of 2 ranks"
SCATTERED: dict[str, tuple[str, dict[str, object]]] = {
    "add": ("launched", {"residual": OWN, "residual_out": OWN.clone()}),
    "first": ("launched", {"allreduce_out": OWN}),
    "one block": ("launched", {"block": 4}),
    "several blocks": ("launched", {"block": 2}),
    "addend": ("launched", {"residual": OWN, "residual_out": OWN.clone(), "addend": OWN.clone()}),
    "factor": ("launched", {"residual_out": OWN.clone(), "factor": OWN[:, :1].float()}),
    "number": ("launched", {"residual_out": OWN.clone(), "factor_value": 0.5}),
    "sum beside a factor": ("collectives", {"factor": OWN[:, :1].clone(), "allreduce_out": OWN.clone()}),
    "sum beside a number": ("collectives", {"factor_value": 0.5, "allreduce_out": OWN.clone()}),
    "factors of no rank's share": (SHARE, {"residual_out": OWN.clone()[:2], "factor": OWN[:2, :1].clone()}),
    "sum beside an addend": ("collectives", {"addend": OWN, "allreduce_out": OWN.clone()}),
    "sum beside the add": ("collectives", {"residual": OWN, "allreduce_out": OWN.clone()}),
    "sums alone": ("collectives", {"norm_out": None, "residual_out": OWN}),
    "no group": ("collectives", {"group_name": "", "residual": WHOLE, "residual_out": WHOLE.clone()}),
    "no tokens": ("collectives", {"x": WHOLE[:0], "norm_out": WHOLE[:0].clone()}),
    "other rows": (
        "residual_out must be [..., 64] with 4 tokens, got [2, 64]",
        {"residual": OWN, "residual_out": OWN[:2].clone()},
    ),
    "no rank's share": (SHARE, {"residual": OWN[:2], "residual_out": OWN[2:].clone()}),
    "no whole blocks": (
        "8 tokens are no whole number of blocks of 3 for each of 2 ranks, in a sharded call",
        {"block": 3},
    ),
}
"""What becomes of a call of sequence parallelism's op, ``[8, 64]`` among two ranks."""


def _scattering(stub: ctypes.CDLL) -> dict[str, object]:
    from arfusion_pass.ops.library import fused_op
    from arfusion_pass.ops.schema import SCATTERING_OP
    from arfusion_pass.ops.spec import BLOCKS, Flags
    from arfusion_pass.runtime import c_api, fallback
    from tests.ops.cases import SPECS

    stub.stub_call.restype = ctypes.POINTER(c_api.Call)
    fallback.check_call = lambda *_, **__: None  # type: ignore[assignment]
    op, took = fused_op(SCATTERING_OP), list[str]()
    fallback.run_reference = lambda *_: took.append("collectives")  # type: ignore[assignment]

    def call(**changes: object) -> c_api.Call:
        given = {"x": WHOLE, "group_name": "0", "norm_out": WHOLE.clone(), **changes}
        before = stub.stub_launches()
        op(**{**dict.fromkeys(("residual", "weight", "scale")), **given})
        took.extend(["launched"] * (stub.stub_launches() - before))
        return stub.stub_call().contents

    results: dict[str, object] = {}
    for name, (_, changes) in SCATTERED.items():
        took.clear()
        try:
            call(**changes)
        except Exception as error:
            took.append(str(error).removeprefix(f"arfusion::{SCATTERING_OP}: "))
        results[name] = ", ".join(took)
    spec = SPECS["group_tma"]
    tensors = {
        "x": torch.zeros(8, 128, dtype=torch.bfloat16)[:, :64],
        "residual": torch.zeros(4, 64),
        "weight": torch.ones(64),
        "residual_out": OWN,
        "quant_out": torch.empty(8, 64, dtype=torch.float8_e4m3fn),
        "scale_out": torch.empty(2, 8),
        "addend": torch.zeros(4, 64, dtype=torch.bfloat16),
    }
    flags = Flags.UNROUNDED_SUM | Flags.TWOSHOT | Flags.NO_PDL
    launch = call(**tensors, norm_out=None, quant=spec.pack(), flags=int(flags), weight_bias=1.0, block=2)
    wanted = {"block": 2, "own_rows": 4, "addend_rows": 1, "x_stride": 128, "residual_fp32": 1, "scale_pad_last": 1}
    wanted["flags"] = int(Flags.UNROUNDED_SUM | Flags.NO_PDL | BLOCKS)
    wanted |= {name: tensor.data_ptr() for name, tensor in tensors.items()}
    results["wanted"], results["launch"] = wanted, {name: getattr(launch, name) for name in wanted}
    first = call(allreduce_out=OWN)
    results["first sum"] = [first.residual_out, first.allreduce_out]
    results["wanted first sum"] = [OWN.data_ptr(), None]
    return results


if __name__ == "__main__":
    from arfusion_pass.runtime import fallback, native

    torch.ops.load_library(sys.argv[1])
    native._library = ctypes.CDLL(sys.argv[1])
    fallback.register(native._tell)
    modes = {"errors": _errors, "scattering": _scattering}
    done = modes.get(sys.argv[2], lambda stub: _words(stub, sys.argv[2] == "alone"))(native._library)
    print(json.dumps(done))
