"""Without a library: the reason is kept and told once, the reference runs; the fallback ops over gloo."""

import datetime
import logging

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import arfusion_pass.ops
from arfusion_pass.ops import record, reference
from arfusion_pass.ops.schema import SCHEMAS
from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec
from arfusion_pass.runtime import dispatch, fallback, native

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(native, "_failure", None)
    monkeypatch.delenv("ARFUSION_LIBRARY", raising=False)


def test_a_recorded_call_is_handed_to_its_observer():
    """Contract: the library hands a call with Flags.RECORD back to Python, where its recorder sees inputs and outputs
    and the call runs as without the flag."""
    fallback.register()
    seen = []

    def observer(arguments, run):
        run(arguments)
        seen.append((arguments["flags"], arguments["x"].clone(), arguments["norm_out"].clone()))

    flags = record.observed(int(Flags.ROUND_BEFORE_WEIGHT), observer)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    weight = torch.randn(64, dtype=torch.bfloat16)
    norm, plain = torch.empty_like(x), torch.empty_like(x)
    torch.ops.arfusion._python_allreduce_rms_norm(x, None, weight, None, "", flags=flags, norm_out=norm)
    torch.ops.arfusion.allreduce_rms_norm(
        x, None, weight, None, "", flags=int(Flags.ROUND_BEFORE_WEIGHT), norm_out=plain
    )
    assert torch.equal(norm, plain)
    assert [call[0] for call in seen] == [int(Flags.ROUND_BEFORE_WEIGHT)]
    assert torch.equal(seen[0][1], x)
    assert torch.equal(seen[0][2], norm)


@without_gpu
def test_the_reason_is_kept_and_told_once(unloaded, caplog):
    caplog.set_level(logging.WARNING)
    assert native.try_load() is None
    assert native.try_load() is None
    assert native.failure() == "no CUDA device is visible"
    assert len(caplog.records) == 1
    with pytest.raises(native.NativeUnavailableError, match="no CUDA device"):
        native.load()


def test_a_missing_prebuilt_library(unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setenv("ARFUSION_LIBRARY", str(tmp_path / "libarfusion.so"))
    with pytest.raises(native.NativeUnavailableError, match="ARFUSION_LIBRARY"):
        native.load()


def test_a_file_that_is_no_library(unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_library", None)
    (tmp_path / "libarfusion.so").write_text("not a library")
    monkeypatch.setenv("ARFUSION_LIBRARY", str(tmp_path / "libarfusion.so"))
    with pytest.raises(native.NativeUnavailableError, match="libarfusion"):
        native.load()


def test_first_use_may_be_forbidden_to_build(unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ARFUSION_ARCH", "90a")
    monkeypatch.setenv("ARFUSION_BUILD", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(native.NativeUnavailableError, match="arfusion build"):
        native.load()


@without_gpu
def test_dispatch_leaves_the_reference_to_run(unloaded):
    arguments = {"x": torch.ones(1, 8), "group_name": "", "flags": 0}
    assert dispatch.dispatch("allreduce_rms_norm", arguments) is False
    assert dispatch.dispatch("allreduce_rms_norm", {**arguments, "flags": int(Flags.REFERENCE)}) is False


def test_fallback_ops_have_the_ops_schemas():
    fallback.register()
    fallback.register()
    for op in SCHEMAS:
        want = getattr(torch.ops.arfusion, op).default._schema
        got = getattr(torch.ops.arfusion, fallback.fallback_name(op)).default._schema
        assert str(got).replace("_fallback_", "") == str(want)


def _inputs(rank: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    bf16 = torch.bfloat16
    return {
        "x": torch.randn(5, 256, generator=g).to(bf16),
        "experts": torch.randn(4, 5, 256, generator=g).to(bf16),
        "scale": torch.rand(4, 5, generator=g),
        "rows": torch.randn(9, 256, generator=g).to(bf16),
        "index": torch.randint(-1, 9, (5, 3), generator=g, dtype=torch.int32),
        "weights": torch.rand(5, 3, generator=g),
    }


def _fallback_ranks(rank: int, world: int, file: str) -> None:
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timeout)
    fallback.register()
    name = dist.group.WORLD.group_name
    ops, mine, all_ranks = torch.ops.arfusion, _inputs(rank), [_inputs(r) for r in range(world)]
    residual, weight = torch.ones(5, 256, dtype=torch.bfloat16), torch.full((256,), 0.5, dtype=torch.bfloat16)
    spec = QuantSpec(QuantFormat.FP8, 128)
    prologues = {
        "allreduce_rms_norm": ((mine["x"],), lambda r: r["x"]),
        "moe_reduce_allreduce_rms_norm": (
            (mine["experts"], mine["scale"], None),
            lambda r: reference.moe_reduce(r["experts"], r["scale"], None, 0),
        ),
        "moe_finalize_allreduce_rms_norm": (
            (mine["rows"], mine["index"], mine["weights"], None, 2.0),
            lambda r: reference.moe_finalize(r["rows"], r["index"], r["weights"], None, 2.0, 0),
        ),
    }
    for op, (arguments, prologue) in prologues.items():
        # Two ranks' sum is exact before its one rounding, so gloo's order is ours.
        total = reference.sum_in_rank_order(torch.stack([prologue(r) for r in all_ranks]))
        want = reference.epilogue(total, residual, weight, None, spec=spec)
        for with_reduced in (True, False):
            out = {n: torch.empty(5, 256, dtype=torch.bfloat16) for n in ("residual_out", "norm_out")}
            out["quant_out"], out["scale_out"] = torch.empty(5, 256, dtype=torch.float8_e4m3fn), torch.empty(5, 2)
            if with_reduced:
                out["allreduce_out"] = torch.empty(5, 256, dtype=torch.bfloat16)
            before = [t.clone() for t in arguments if isinstance(t, torch.Tensor)]
            call = getattr(ops, fallback.fallback_name(op))
            call(*arguments, residual, weight, None, name, quant=spec.pack(), **out)
            after = [t for t in arguments if isinstance(t, torch.Tensor)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written"
            assert torch.equal(out["residual_out"], want.total.bfloat16())
            assert torch.equal(out["norm_out"], want.norm.bfloat16())
            assert torch.equal(out["quant_out"].view(torch.uint8), want.codes.view(torch.uint8))
            assert torch.equal(out["scale_out"], want.scales)
            if with_reduced:
                assert torch.equal(out["allreduce_out"], total)
        rare = {"addend": weight, "epsilon_tensor": torch.tensor(0.25, dtype=torch.float64), "factor_value": 0.3}
        flags = int(Flags.ADDEND_SCALED | Flags.DIVIDE_BY_ROOT)
        options = {"addend": weight, "epsilon": rare["epsilon_tensor"], "flags": flags, "factor_value": 0.3}
        other = reference.epilogue(total, residual, weight, None, **options)
        norm = torch.empty(5, 256, dtype=torch.bfloat16)
        call(*arguments, residual, weight, None, name, flags=flags, **rare, norm_out=norm)
        assert torch.equal(norm, other.norm.bfloat16())
        lying = residual.clone()  # an all-reduce's output may lie on the residual, which is still to be read
        norm = torch.empty(5, 256, dtype=torch.bfloat16)
        call(*arguments, lying, weight, None, name, allreduce_out=lying, norm_out=norm)
        assert torch.equal(norm, want.norm.bfloat16())
        assert torch.equal(lying, total)
        only = torch.empty(5, 256, dtype=torch.bfloat16)
        getattr(ops, fallback.fallback_name(op))(*arguments, None, None, None, name, allreduce_out=only)
        assert torch.equal(only, total)
    dist.barrier()
    dist.destroy_process_group()


def test_fallback_over_gloo(tmp_path):
    assert arfusion_pass.ops is not None
    mp.spawn(_fallback_ranks, args=(2, str(tmp_path / "store")), nprocs=2)
