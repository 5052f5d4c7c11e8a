"""vLLM's own calls of FlashInfer's fused all-reduce on our API, on two gloo ranks as on a GPU (``vllm_models.py``): its
helpers for models that it does not compile, such a model, its all-reduce, and what becomes of workspaces. Skipped
without vLLM; written for 0.33."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import pathlib
import shutil
import sys
import tempfile
import types
from typing import Any
from unittest import mock

import pytest
import torch

from tests.helpers import run_ranks

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if shutil.which("gcc") is None:
    pytest.skip("there is no gcc to make an empty libcuda with", allow_module_level=True)

FUSION = "vllm.compilation.passes.fusion.allreduce_rms_fusion"
COMMUNICATOR = "vllm.distributed.device_communicators.flashinfer_all_reduce"
HELPER = "vllm.model_executor.layers.fused_allreduce_gemma_rms_norm"
COMMON = "vllm.models.common.ops.fused_allreduce_rms_norm"
HIDDEN, TOKENS = 512, 5


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    """What each rank saw in each of the functions below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARFUSION_VLLM_COMM", "1")
        return run_ranks(2, _rank, timeout=500.0)


def _rank(rank: int, world: int) -> dict[str, Any]:
    from tests.engines import vllm_models

    vllm_models.pretend(9)
    importlib.import_module("arfusion_pass.engines.vllm").register()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    fusion = importlib.import_module(FUSION)
    library = torch.library.Library("vllm", "IMPL")  # both ops are registered for CUDA alone
    library.impl("flashinfer_trtllm_fused_allreduce_norm", fusion.call_trtllm_fused_allreduce_norm, "CPU")
    library.impl("all_reduce", parallel_state.all_reduce, "CPU")
    torch.Tensor.is_cuda = property(  # type: ignore[assignment, misc]  # whether to make a call is asked of its tensor
        lambda self: sys._getframe(1).f_globals["__name__"] in (HELPER, COMMUNICATOR)
    )
    parallel_state._node_count = lambda group: 1
    with tempfile.TemporaryDirectory() as folder:
        config = vllm_models.engine_config("deepseek_v32", pathlib.Path(folder))
    with set_current_vllm_config(config), torch.no_grad():
        parallel_state.init_distributed_environment(world, rank, local_rank=rank, backend="gloo")
        parallel_state.initialize_model_parallel(world, backend="gloo")
        parts = (norms, latent, static_fp8, sizes, standalone, suspended, deepseek, minimax, engines, refused)
        return {part.__name__: part(rank) for part in parts}


def calls() -> Any:
    """What reaches our API meanwhile."""
    from arfusion_pass import comm

    return mock.patch.object(comm, "allreduce_fusion", wraps=comm.allreduce_fusion)


def unfused() -> Any:
    """vLLM's own way around the call."""
    helpers = importlib.import_module(HELPER), importlib.import_module(COMMON)
    stack = contextlib.ExitStack()
    for each in helpers:
        stack.enter_context(mock.patch.object(each, "_can_use_flashinfer", return_value=(False, 0)))
    return stack


def rows(rank: int, tokens: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A rank's share, and a residual that all ranks share."""
    x, residual = (torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(n)) for n in (rank, 9))
    return x.to(dtype), residual.to(dtype)


def plain_norm(hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16, kind: str = "RMSNorm") -> Any:
    layers = importlib.import_module("vllm.model_executor.layers.layernorm")
    norm = getattr(layers, kind)(hidden, eps=1e-5).to(dtype)
    norm.weight.copy_(torch.rand(hidden, generator=torch.Generator().manual_seed(3)))
    return norm


def helper(x: torch.Tensor, residual: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = importlib.import_module(COMMON).fused_allreduce_rms_norm(
        x, residual, norm
    )
    return result


def reduced(x: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import tensor_model_parallel_all_reduce

    result: torch.Tensor = tensor_model_parallel_all_reduce(x.clone())
    return result


def normed(total: torch.Tensor, norm: Any, bias: float = 0.0) -> torch.Tensor:
    """The API's meaning: of the rounded sum, in fp32, rounded once."""
    scale = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return (total.float() * scale * (norm.weight.float() + bias)).to(total.dtype)


def apart(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """By how many values two 16-bit tensors differ at most, and in which share of their elements."""
    steps = (a.contiguous().view(torch.int16).int() - b.contiguous().view(torch.int16).int()).abs()
    return int(steps.max()), float((steps > 0).float().mean())


def norms(rank: int) -> list[dict[str, Any]]:
    gemma = importlib.import_module(HELPER).fused_allreduce_gemma_rms_norm
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        for call, kind, bias in ((helper, "RMSNorm", 0.0), (gemma, "GemmaRMSNorm", 1.0)):
            for tokens in (1, TOKENS, 40):
                norm = plain_norm(HIDDEN, dtype, kind)
                x, residual = rows(rank, tokens, HIDDEN, dtype)
                kept, wanted = residual.clone(), reduced(x)
                theirs, their_total = norm(wanted.clone(), residual.clone())
                with calls() as fused:
                    out, total = call(x, residual, norm)
                found.append(
                    {
                        "call": (fused.call_count, fused.call_args.kwargs["use_oneshot"]),
                        "workspace": repr(fused.call_args.kwargs["workspace"]),
                        "residual untouched": torch.equal(residual, kept),
                        "total": torch.equal(total, their_total) and torch.equal(total, wanted + kept),
                        "norm": apart(out, normed(total, norm, bias)),
                        "theirs": ((out.float() - theirs.float()).abs() / theirs.float().abs().clamp(min=1.0))
                        .max()
                        .item(),
                    }
                )
    return found


def latent(rank: int) -> dict[str, Any]:
    """Kimi K3's latent experts: another hidden size on the same workspace, a residual of zeros."""
    runner = importlib.import_module("vllm.models.kimi_k3.nvidia.latent_moe_runner").LatentMoERunner
    this = types.SimpleNamespace(moe_config=types.SimpleNamespace(tp_size=2))
    this._get_zero_residual = types.MethodType(runner._get_zero_residual, this)
    norm = plain_norm(HIDDEN // 4)
    x, _ = rows(rank, TOKENS, HIDDEN // 4)
    total = reduced(x)
    with calls() as fused:
        out = runner.allreduce_norm_latent_out(this, x, norm)
    return {"calls": fused.call_count, "norm": apart(out, normed(total, norm))}


def static_fp8(rank: int) -> dict[str, Any]:
    """What vLLM's graph pass leaves in graphs that ours has not seen; it has a workspace of its own."""
    from arfusion_pass import comm

    x, residual = rows(rank, TOKENS)
    norm, scale = plain_norm(), torch.tensor(0.25)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    total = reduced(x) + residual
    with calls() as fused:
        torch.ops.vllm.flashinfer_trtllm_fused_allreduce_norm(
            allreduce_in=x,
            residual=residual,
            rms_gamma=norm.weight,
            rms_eps=norm.variance_epsilon,
            world_size=2,
            launch_with_pdl=True,
            fp32_acc=True,
            max_token_num=64,
            pattern_code=comm.AllReduceFusionPattern.kARResidualRMSNormFP8Quant,
            norm_out=None,
            quant_out=codes,
            scale_factor=scale,
        )
    wanted = (normed(total, norm).float() * 4.0).to(codes.dtype)
    differing = (codes.view(torch.uint8) != wanted.view(torch.uint8)).float().mean().item()
    return {"calls": fused.call_count, "total": torch.equal(residual, total), "differing": differing}


def sizes(rank: int) -> list[tuple[int, int, int, bool]]:
    """(tokens, hidden, calls, right) in a workspace of 16 tokens, and beyond vLLM's own limit."""
    communicator, fusion = importlib.import_module(COMMUNICATOR), importlib.import_module(FUSION)
    found = []
    for limit, shapes in ((1 / 64, ((16, HIDDEN), (17, HIDDEN))), (64, ((17, HIDDEN), (32, HIDDEN // 2)))):
        if limit < 1:
            communicator.destroy_fi_ar_workspace()
        with mock.patch.dict(fusion.FI_ALLREDUCE_FUSION_MAX_SIZE_MB, {90: {2: limit}}):
            for tokens, hidden in shapes:
                x, residual = rows(rank, tokens, hidden)
                norm, wanted = plain_norm(hidden), reduced(x) + residual
                with calls() as fused:
                    out, total = helper(x, residual, norm)
                close = (out.float() - normed(wanted, norm).float()).abs().max().item() < 0.05
                found.append((tokens, hidden, fused.call_count, torch.equal(total, wanted) and close))
    return found


def standalone(rank: int) -> dict[str, Any]:
    """``VLLM_ALLREDUCE_USE_FLASHINFER=1``: its all-reduce alone."""
    from vllm.distributed.parallel_state import get_tp_group

    communicator = importlib.import_module(COMMUNICATOR).FlashInferAllReduce(get_tp_group().cpu_group, "cpu")
    x, _ = rows(rank, TOKENS)
    with calls() as fused:
        used = communicator.should_use_fi_ar(x)
        out = communicator.all_reduce(x)
    return {"calls": fused.call_count, "used": used, "equal": torch.equal(out, reduced(x))}


def suspended(rank: int) -> int:
    """vLLM's sleep with ``--enable-nccl-comm-suspend``: how often the call is made behind it."""
    from vllm.distributed.parallel_state import get_tp_group

    communicator = importlib.import_module(COMMUNICATOR)
    helper(*rows(rank, TOKENS), plain_norm())
    communicator.checkpoint_prepare_fi_ar_workspaces(get_tp_group().cpu_group, skip_unsupported=True)
    communicator.checkpoint_restore_fi_ar_workspaces(get_tp_group().cpu_group, skip_unsupported=True)
    with calls() as fused:
        helper(*rows(rank, TOKENS), plain_norm())
    count: int = fused.call_count
    return count


def deepseek(rank: int) -> dict[str, Any]:
    """DeepSeek V3.2's class and GLM-5's, with dense layers."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    made = importlib.import_module("vllm.models.deepseek_v32.nvidia.model").DeepseekV32Model
    return _compared(rank, made, config, config.model_config.hf_config.hidden_size)


def minimax(rank: int) -> dict[str, Any]:
    """MiniMax M3's class, with dense layers; FlashInfer's norms, which it calls itself, in torch."""
    from vllm.config import get_current_vllm_config
    from vllm.transformers_utils.configs.minimax_m3 import MiniMaxM3TextConfig

    flashinfer = importlib.import_module("flashinfer.norm")

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return normed(x, types.SimpleNamespace(weight=weight, variance_epsilon=eps), 1.0)

    def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        residual += x
        x.copy_(norm(residual, weight, eps))

    small = MiniMaxM3TextConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        dense_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_layer_freq=[0, 0, 0],
    )
    config = copy.copy(get_current_vllm_config())
    config.model_config = copy.copy(config.model_config)
    config.model_config.hf_text_config = small
    made = importlib.import_module("vllm.models.minimax_m3.nvidia.model").MiniMaxM3Model
    with mock.patch.multiple(flashinfer, gemma_rmsnorm=norm, gemma_fused_add_rmsnorm=add_norm):
        return _compared(rank, made, config, HIDDEN)


def _compared(rank: int, kind: Any, config: Any, hidden: int) -> dict[str, Any]:
    """A model with our calls and without; of its attention only the ``o_proj`` is run."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.bfloat16):
        made = kind(vllm_config=config)
    config.compilation_config.static_forward_context.clear()
    for name, parameter in made.named_parameters():
        seed = sum(map(ord, name)) + (0 if "norm" in name else rank)
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)

    def attention(this: Any) -> Any:
        width = this.o_proj.input_size_per_partition
        return lambda positions, hidden_states: this.o_proj(hidden_states.repeat(1, 8)[:, :width].contiguous())[0]

    for layer in made.layers:
        layer.self_attn.forward = attention(layer.self_attn)
    embeddings, positions = rows(rank, TOKENS, hidden)[1], torch.arange(TOKENS)
    with calls() as fused:
        out = made(None, positions, None, inputs_embeds=embeddings.clone())
    with unfused(), calls() as none:
        wanted = made(None, positions, None, inputs_embeds=embeddings.clone())
    return {
        "layers": len(made.layers),
        "calls": (fused.call_count, none.call_count),
        "error": (out.float() - wanted.float()).abs().max().item(),
        "size": wanted.float().abs().max().item(),
    }


def engines(rank: int) -> list[dict[str, Any]]:
    """Two engines in one process: vLLM makes its groups anew, and keeps what it knows of workspaces."""
    from vllm.distributed import parallel_state

    communicator = importlib.import_module(COMMUNICATOR)
    found = []
    for _ in range(2):
        x, residual = rows(rank, TOKENS)
        wanted = reduced(x) + residual
        with calls() as fused:
            _, total = helper(x, residual, plain_norm())
        workspace = fused.call_args.kwargs["workspace"]
        own = workspace.group is parallel_state.get_tp_group().device_group
        parallel_state.destroy_model_parallel()
        left = communicator._fi_ar_workspace is not None
        ended = not workspace.is_buffer_size_sufficient(2, 1, 1, torch.bfloat16)
        found.append({"right": torch.equal(total, wanted), "own group": own, "left": left, "ended": ended})
        parallel_state.initialize_model_parallel(2, backend="gloo")
    return found


def refused(rank: int) -> dict[str, Any]:
    """A workspace that cannot be made, as while a CUDA graph is captured."""
    from arfusion_pass import comm

    x, residual = rows(rank, TOKENS)
    wanted = reduced(x) + residual
    failing = mock.patch.object(comm, "create_allreduce_fusion_workspace", side_effect=RuntimeError("captured"))
    with failing, calls() as fused:
        _, total = helper(x, residual, plain_norm())
    return {"calls": fused.call_count, "total": torch.equal(total, wanted)}


def test_helpers(outcomes: list[dict[str, Any]]) -> None:
    """Both helpers, RMSNorm and Gemma's, in bf16 and fp16: one call of our API that chooses its own strategy, on the
    group of GPUs and not on that of CPUs; the sum to the bit that of vLLM's unfused path, the norm within the contract
    of the API's own roundings, and close to vLLM's."""
    for each in (each for outcome in outcomes for each in outcome["norms"]):
        assert each["call"] == (1, None)
        assert "reference" in each["workspace"]
        assert each["residual untouched"]
        assert each["total"]
        steps, share = each["norm"]
        assert (steps, share) <= (1, 0.001), each
        assert each["theirs"] < 2**-6, each


def test_another_hidden_size(outcomes: list[dict[str, Any]]) -> None:
    """Kimi K3's latent experts share the workspace."""
    for outcome in outcomes:
        assert outcome["latent"]["calls"] == 1
        assert outcome["latent"]["norm"] <= (1, 0.001), outcome["latent"]


def test_quantised_pattern(outcomes: list[dict[str, Any]]) -> None:
    """Static FP8, which vLLM's op has for its graph pass."""
    for outcome in outcomes:
        assert outcome["static_fp8"]["calls"] == 1
        assert outcome["static_fp8"]["total"]
        assert outcome["static_fp8"]["differing"] < 0.005, outcome["static_fp8"]


def test_sizes_are_vllms_decision(outcomes: list[dict[str, Any]]) -> None:
    """More tokens than its limit, or more bytes than the workspace, stay vLLM's own; as many bytes do not."""
    for outcome in outcomes:
        wanted = [(16, HIDDEN, 1, True), (17, HIDDEN, 0, True), (17, HIDDEN, 0, True), (32, HIDDEN // 2, 1, True)]
        assert outcome["sizes"] == wanted


def test_its_all_reduce(outcomes: list[dict[str, Any]]) -> None:
    """``VLLM_ALLREDUCE_USE_FLASHINFER=1`` shares the workspace, and so runs here too."""
    for outcome in outcomes:
        assert outcome["standalone"] == {"calls": 1, "used": True, "equal": True}


def test_sleep_leaves_the_workspace(outcomes: list[dict[str, Any]]) -> None:
    """vLLM asks each workspace to let go of its memory, and takes ours' refusal as it takes FlashInfer's."""
    assert [outcome["suspended"] for outcome in outcomes] == [1, 1]


@pytest.mark.parametrize("name", ["deepseek", "minimax"])
def test_a_model_that_vllm_does_not_compile(name: str, outcomes: list[dict[str, Any]]) -> None:
    """Every norm behind an all-reduce is one call, 2n for n layers (not the embedding's), and the model's outputs are
    those of vLLM's unfused path but for roundings."""
    for outcome in outcomes:
        found = outcome[name]
        assert found["calls"] == (2 * found["layers"], 0)
        assert found["error"] < 0.02 * found["size"], found


def test_engines_one_after_the_other(outcomes: list[dict[str, Any]]) -> None:
    """A workspace ends with its group, and the next engine's is on its own."""
    for outcome in outcomes:
        assert outcome["engines"] == [{"right": True, "own group": True, "left": False, "ended": True}] * 2


def test_a_workspace_that_cannot_be_made(outcomes: list[dict[str, Any]]) -> None:
    """vLLM goes its own way, as where FlashInfer's cannot."""
    for outcome in outcomes:
        assert outcome["refused"] == {"calls": 0, "total": True}
