"""The FlashInfer backend without FlashInfer: what it refuses and why, what it would call, how it falls back to ours."""

from __future__ import annotations

import dataclasses
import logging
import threading
import types
from typing import Any

import pytest
import torch

from arfusion_pass import comm
from arfusion_pass.ops.checks import FusedCall
from arfusion_pass.ops.flashinfer_specs import STATIC_FP8, TOKEN_FP8, nvfp4, packed_group_fp8
from arfusion_pass.ops.library import fused_op
from arfusion_pass.ops.spec import NO_QUANT, Apply, Flags, QuantFormat, QuantSpec, ScaleLayout
from arfusion_pass.runtime import flashinfer
from tests.ops.cases import arguments as epilogue_arguments
from tests.ops.cases import outputs

BF16 = torch.bfloat16
SM90, SM100 = (9, 0), (10, 0)
T, H = 6, 256
OP = "allreduce_rms_norm"


def arguments(
    spec: QuantSpec = NO_QUANT, names: tuple[str, ...] = ("residual_out", "norm_out"), **changes: Any
) -> dict:
    """A call of the op with all its arguments by name, its outputs those of ``names``."""
    torch.manual_seed(3)
    given = outputs((T, H), BF16, spec)
    if spec.format != QuantFormat.NONE:
        names = (*names, "quant_out", "scale_out")
    return {
        **epilogue_arguments(spec),
        "x": torch.randn(T, H).to(BF16),
        "residual": torch.randn(T, H).to(BF16),
        "weight": torch.randn(H).to(BF16),
        "epsilon": 1e-5,
        "weight_bias": 0.0,
        "flags": int(Flags.FLASHINFER),
        "scale_value": 0.5,
        "addend": None,
        "epsilon_tensor": None,
        "factor": None,
        "factor_value": 1.0,
        **{name: given.get(name) if name in names else None for name in flashinfer_outputs},
        **changes,
    }


flashinfer_outputs = ("allreduce_out", "residual_out", "norm_out", "quant_out", "scale_out")


def call(*args: Any, op: str = OP, **changes: Any) -> FusedCall:
    given = arguments(*args, **changes)
    schema = [argument.name for argument in fused_op(op)._schema.arguments]
    return FusedCall.bind(op, {name: given[name] for name in schema})


FP32 = torch.float32
UE8M0 = packed_group_fp8(128)
REFUSED: list[tuple[dict[str, Any], int, tuple[int, int], str]] = [
    ({}, 3, SM90, "groups of 2, 4, 8 ranks, this one has 3"),
    ({}, 16, SM90, "this one has 16"),
    ({"flags": int(Flags.TWOSHOT)}, 8, SM90, "two-shot kernel needs more tokens than ranks, got 6 and 8"),
    ({"weight": None}, 4, SM90, "no norm without a weight"),
    ({"weight": torch.ones(H)}, 4, SM90, "reads a float32 weight as bfloat16"),
    ({"residual": torch.ones(T, H), "flags": int(Flags.UNROUNDED_SUM)}, 4, SM90, "takes residual in bfloat16 only"),
    ({"norm_out": torch.ones(T, H)}, 4, SM90, "takes norm_out in bfloat16 only"),
    ({"flags": int(Flags.ROUND_BEFORE_WEIGHT)}, 4, SM90, "other rounding points"),
    ({"flags": int(Flags.UNROUNDED_SUM)}, 4, SM90, "other rounding points"),
    ({"allreduce_out": torch.ones(T, H, dtype=BF16)}, 4, SM90, "all-reduce's result beside the residual"),
    ({"addend": torch.ones(H, dtype=BF16)}, 4, SM90, "adds a residual, and nothing beside it"),
    ({"epsilon_tensor": torch.ones(1)}, 4, SM90, "takes epsilon as a number"),
    ({"factor": torch.ones(1)}, 4, SM90, "multiplies the all-reduce's result by nothing"),
    ({"factor_value": 0.5}, 4, SM90, "multiplies the all-reduce's result by nothing"),
    ({"norm_out": None}, 4, SM90, "adds a residual only in front of a norm"),
    ({"spec": nvfp4(0, "")}, 4, SM90, "NVFP4 conversion writes zeros before sm_100, this is sm_90"),
    ({"spec": nvfp4(1, "")}, 4, SM100, "scales of layout 8x4 unwritten"),
    ({"spec": dataclasses.replace(STATIC_FP8, apply=Apply.DIVIDE)}, 4, SM90, "no such quantiser"),
    ({"spec": dataclasses.replace(STATIC_FP8, clamp=False)}, 4, SM90, "no such quantiser"),
    ({"spec": dataclasses.replace(TOKEN_FP8, bound=1e-5)}, 4, SM90, "no such quantiser"),
    ({"spec": dataclasses.replace(UE8M0, layout=ScaleLayout.COLUMN_TMA)}, 4, SM90, "no such quantiser"),
    ({"spec": QuantSpec(QuantFormat.INT8, -1)}, 4, SM90, "no such quantiser"),
    ({"x": torch.zeros(0, H, dtype=BF16), "residual": None}, 4, SM90, "no tokens"),
    ({"x": torch.zeros(T, 260, dtype=BF16)}, 4, SM90, "hidden size of 260"),
]


@pytest.mark.parametrize(("changes", "world", "capability", "reason"), REFUSED, ids=lambda value: None)
def test_refused(changes: dict[str, Any], world: int, capability: tuple[int, int], reason: str) -> None:
    """What FlashInfer gets wrong is refused with a reason; without the change it is not."""
    assert flashinfer.refusal(call(), 4, capability) is None
    assert reason in (flashinfer.refusal(call(**changes), world, capability) or "")


def test_refuses_misaligned() -> None:
    """FlashInfer does not check that tensors start at 16 bytes."""
    storage = torch.zeros(T * H + 1, dtype=BF16)
    assert "norm_out does not start at" in flashinfer.refusal(call(norm_out=storage[1:].view(T, H)), 4, SM90)


def test_refuses_moe() -> None:
    """The MoE kernels are refused as a whole."""
    moe = dataclasses.replace(call(), op="moe_reduce_allreduce_rms_norm")
    assert "MoE kernels round at every step" in flashinfer.refusal(moe, 4, SM90)


TAKEN: dict[str, dict[str, Any]] = {
    "norm": {},
    "norm alone": {"names": ("norm_out",)},
    "all-reduce": {"names": ("allreduce_out",), "residual": None, "weight": None},
    "no residual": {"names": ("norm_out", "allreduce_out"), "residual": None},
    "no residual, residual_out": {"names": ("norm_out", "residual_out"), "residual": None},
    "gemma": {"weight_bias": 1.0},
    "static": {"spec": STATIC_FP8},
    "static, no norm": {"spec": STATIC_FP8, "names": ("residual_out",)},
    "static, tensor": {"spec": STATIC_FP8, "scale": torch.tensor(0.25, dtype=BF16)},
    "token": {"spec": TOKEN_FP8, "names": ()},
    "group": {"spec": packed_group_fp8(32)},
    "group, no norm": {"spec": UE8M0, "names": ()},
    "nvfp4": {"spec": nvfp4(0, "")},
    "nvfp4 linear": {"spec": nvfp4(2, ""), "names": ()},
}


@pytest.mark.parametrize("name", TAKEN)
def test_call_computes_the_same(name: str) -> None:
    """The call that FlashInfer would get, made on our API of its shape, writes exactly what the op writes."""
    bound = call(**TAKEN[name])
    assert flashinfer.refusal(bound, 4, SM100) is None
    with comm.create_allreduce_fusion_workspace(
        world_size=1, max_token_num=T, hidden_dim=H, dtype=BF16, device="cpu"
    ) as workspace:
        kwargs = flashinfer.call_arguments(bound, workspace, 4, SM100)
        assert kwargs["fp32_acc"] is True
        for scale in (kwargs.get("scale_factor"),):
            assert scale is None or (scale.dtype == FP32 and scale.shape == (1,))
        if kwargs["pattern"] > 0:
            assert kwargs["residual_in"] is not None
            assert kwargs["residual_out"] is not None
        comm.allreduce_fusion(**kwargs)
    expected = arguments(**TAKEN[name])
    expected["flags"] = 0
    fused_op(OP)(**expected)
    for output, tensor in bound.outputs.items():
        assert torch.equal(tensor.view(torch.uint8), expected[output].view(torch.uint8)), output


@pytest.mark.parametrize(
    ("tokens", "flags", "world", "capability", "choice"),
    [
        (4, 0, 4, SM90, True),
        (5, 0, 8, SM100, True),
        (6, 0, 4, SM90, True),
        (4097, 0, 4, SM90, False),
        (4097, 0, 4, SM100, None),
        (4097, 0, 2, SM90, None),
        (6, Flags.ONESHOT, 4, SM90, True),
        (6, Flags.TWOSHOT, 4, SM90, False),
    ],
)
def test_strategy(tokens: int, flags: int, world: int, capability: tuple[int, int], choice: bool | None) -> None:
    """One-shot for T <= N, up to 2 MiB on 4 ranks of sm_90, what is asked for; elsewhere FlashInfer's choice."""
    x = torch.zeros(tokens, H, dtype=BF16)
    assert flashinfer.use_oneshot(call(x=x, flags=int(flags)), world, capability) is choice


def test_falls_back_to_ours(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused call runs on ours, without the flag, and says why once."""
    monkeypatch.setattr(flashinfer, "_told", set())
    given, plain = arguments(), arguments()
    plain["flags"] = 0
    fused_op(OP)(**plain)
    with caplog.at_level(logging.WARNING, "arfusion_pass"):
        flashinfer.run(OP, given)
        flashinfer.run(OP, arguments())
    assert torch.equal(given["norm_out"], plain["norm_out"])
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [f"arfusion::{OP} runs on our kernels instead of FlashInfer's: the tensors are not on a GPU"]


def test_runs_on_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that fits reaches FlashInfer's own function, in a workspace of its backend trtllm, made once, aside from
    the thread that may be warming up a CUDA graph in the graph's own memory."""
    seen: dict[str, list[dict[str, Any]]] = {"create": [], "call": []}
    threads: list[threading.Thread] = []

    class Workspace:
        def is_buffer_size_sufficient(self, world: int, tokens: int, hidden: int, dtype: torch.dtype) -> bool:
            return tokens <= 65536

        def destroy(self) -> None:
            seen["destroyed"] = []

    def create(**kwargs: Any) -> Workspace:
        seen["create"].append(kwargs)
        threads.append(threading.current_thread())
        return Workspace()

    fake = types.SimpleNamespace(
        create_allreduce_fusion_workspace=create, allreduce_fusion=lambda **kwargs: seen["call"].append(kwargs)
    )
    group = types.SimpleNamespace(size=lambda: 4, rank=lambda: 1)
    monkeypatch.setattr(flashinfer, "_module", lambda: fake)
    monkeypatch.setattr(flashinfer, "_workspaces", {})
    monkeypatch.setattr(flashinfer, "resolve_group", lambda name: group)
    monkeypatch.setattr(flashinfer, "exchange", lambda group, tag, payload: [payload] * 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: SM90)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    bound = call(group_name="tp")
    x = bound.x
    on_gpu = types.SimpleNamespace(
        is_cuda=True, device=types.SimpleNamespace(index=0, type="cuda"), dtype=x.dtype, shape=x.shape,
        itemsize=x.itemsize, view=x.view, data_ptr=x.data_ptr,
    )  # fmt: skip
    bound.inputs["x"] = on_gpu  # type: ignore[assignment]
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    assert flashinfer._try(bound) is None
    assert flashinfer._try(bound) is None
    assert len(seen["create"]) == 1
    assert threads[0] is not threading.current_thread()
    assert devices == [0]
    assert len(seen["call"]) == 2
    assert seen["create"][0]["backend"] == "trtllm"
    assert seen["create"][0]["group"] is group
    assert (seen["create"][0]["world_size"], seen["create"][0]["rank"]) == (4, 1)
    flashinfer.release("tp")
    assert "destroyed" in seen
    assert flashinfer._workspaces == {}


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one rank cannot import FlashInfer, all of them run on ours, and the reason names the rank."""
    group = types.SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    monkeypatch.setattr(flashinfer, "_workspaces", {})
    monkeypatch.setattr(flashinfer, "resolve_group", lambda name: group)
    monkeypatch.setattr(flashinfer, "_module", lambda: (_ for _ in ()).throw(ImportError("nothing there")))
    monkeypatch.setattr(flashinfer, "exchange", lambda group, tag, payload: [None, payload])
    reason = flashinfer.prepare("tp", torch.device("cuda", 0), 8, H, BF16)
    assert reason is not None
    assert reason.startswith("rank 1: flashinfer.comm cannot be imported (ImportError: nothing there)")


def test_import_needs_no_flashinfer() -> None:
    """Importing the backend imports no FlashInfer."""
    import sys

    assert not any(name.split(".")[0] == "flashinfer" for name in sys.modules)


def test_graph_op_on_cpu() -> None:
    """The op that ``FusionConfig(backend="flashinfer")`` writes into a graph runs on the reference where there is no
    GPU."""
    flagged, plain = arguments(), arguments(flags=0)
    fused_op(OP)(**flagged)
    fused_op(OP)(**plain)
    assert torch.equal(flagged["norm_out"], plain["norm_out"])


def test_zeroes_padding_first() -> None:
    """FlashInfer leaves NVFP4's padding as it is, so it is zeroed before the call; a linear layout has none."""
    swizzled, linear = call(spec=nvfp4(0, "")), call(spec=nvfp4(2, ""))
    for bound in (swizzled, linear):
        flashinfer.call_arguments(bound, None, 4, SM100)
    assert not swizzled.outputs["scale_out"].view(torch.uint8).any()
    assert (linear.outputs["scale_out"].view(torch.uint8) == 0x5A).all()
