"""Sequence parallelism on two real ranks: DTensor's ``SequenceParallel`` model and vLLM-like graphs, fused and unfused.

Inductor's graphs, run eagerly (:mod:`tests.post_grad`): the fused one has every bit of the unfused one, because its op
makes the same collectives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import arfusion_pass as arf
from arfusion_pass.demo.model import Decoder, ModelConfig, initialise, parallelize_sequence
from arfusion_pass.inspection import replay
from tests import post_grad
from tests.helpers import run_ranks
from tests.models import Tensor, llama
from tests.sequence_parallel import block, vllm_like

ON = arf.FusionConfig(raise_errors=True)
ADD, PLAIN = "ReduceScatterFusedAddRMSNormAllGather", "ReduceScatterRMSNormAllGather"
PATTERNS = {
    "dtensor": [PLAIN, ADD, ADD],
    "dtensor, two sequences": [PLAIN, ADD, ADD],
    "vllm": [PLAIN, ADD.replace("AllGather", "StaticQuantFP8AllGather"), ADD],
    "functional": [ADD],
}


@dataclasses.dataclass
class Result:
    """What one graph gave on one rank: of each call what differs from its subgraph, of each output from the unfused."""

    patterns: list[str | None]
    missed: list[str | None]
    problems: list[str]
    differing: list[int]


def _models(rank: int, world: int) -> dict[str, tuple[Callable[..., Any], list[tuple[Tensor, ...]]]]:
    """Name to model and the inputs of its calls."""
    from tests.dialects.engine_ops import register_vllm

    register_vllm()
    assert dist.group.WORLD is not None
    arf.register_group("tp", dist.group.WORLD)
    mesh = init_device_mesh("cpu", (world,))
    config = ModelConfig(layers=1, hidden=32, heads=2, head_dim=16, vocab=32, intermediate=32)
    decoder = Decoder(config).bfloat16()
    initialise(decoder, seed=0)
    parallelize_sequence(decoder, mesh).requires_grad_(False)
    own, same = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(9)

    def values(*shape: int, generator: torch.Generator = own) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    def ids(*shape: int) -> tuple[Tensor, ...]:
        return (torch.randint(config.vocab, shape, generator=same),)

    def uneven(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        """Tokens in the second dimension, as DTensor shares them out."""
        total = DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Shard(1)])
        total = total + DTensor.from_local(r, mesh, [Replicate()]).redistribute(placements=[Shard(1)])
        return llama(total, DTensor.from_local(w, mesh, [Replicate()]), 1e-6).full_tensor()

    w = (1 + 0.2 * values(32, generator=same).float()).bfloat16()
    rest = (w, torch.tensor([0.05]), values(32, 32), values(32, 32))
    return {
        "dtensor": (decoder, [ids(1, 8)]),
        "dtensor, two sequences": (decoder, [ids(2, 6)]),
        "vllm": (vllm_like(world), [(values(tokens, 32), *rest) for tokens in (8, 4)]),
        "functional": (
            lambda x, r, w: block(x, r, w, world, llama, 1),
            [(values(3, 4, 32), values(3, 2, 32), w)],
        ),
        "seven tokens": (uneven, [(values(1, 7, 32), values(1, 7, 32, generator=same), w)]),
        "one token": (uneven, [(values(1, 1, 32), values(1, 1, 32, generator=same), w)]),
    }


def _run(rank: int, world: int) -> dict[str, Result]:
    results = {}
    for name, (model, inputs) in _models(rank, world).items():
        torch._dynamo.reset()
        unfused = post_grad.compiled(model, arf.AllReduceFusionPass(dataclasses.replace(ON, sequence_parallel=False)))
        wanted = [unfused(*given) for given in inputs]
        torch._dynamo.reset()
        with replay.recording() as recorder:
            fused = post_grad.compiled(model, arf.AllReduceFusionPass(ON))
            got = [fused(*given) for given in inputs]
        pairs = zip(_tensors(wanted), _tensors(got), strict=True)
        results[name] = Result(
            patterns=[site.pattern for report in recorder.reports for site in report.fused],
            missed=[site.reason for report in recorder.reports for site in report.missed],
            problems=[f"{check.site.name}: {check.detail}" for check in recorder.checks() if not check.ok],
            differing=[int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs],
        )
    return results


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.contiguous()]
    return [tensor for each in value for tensor in _tensors(each)]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Result]]:
    return run_ranks(2, _run, timeout=600)


@pytest.mark.parametrize("name", PATTERNS)
def test_model(name: str, results: list[dict[str, Result]]) -> None:
    """Every site fuses, on both ranks; each call agrees with its subgraph, and the model has the unfused one's bits."""
    for rank in results:
        result = rank[name]
        assert result.missed == []
        assert result.patterns[: len(PATTERNS[name])] == PATTERNS[name]
        assert result.problems == []
        assert result.differing and not any(result.differing)


@pytest.mark.parametrize("name", ["seven tokens", "one token"])
def test_tokens_that_ranks_share_unevenly(name: str, results: list[dict[str, Result]]) -> None:
    """Each rank has a graph of its own, one with all rows of its share and one with less: neither fuses."""
    for rank in results:
        result = rank[name]
        assert result.patterns == []
        assert result.differing and not any(result.differing)
    if name == "seven tokens":  # a single one DTensor may bring about otherwise
        assert "share the tokens unevenly" in str(results[0][name].missed[0])
