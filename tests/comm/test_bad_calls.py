"""The eager API's matrix of bad inputs: every parameter of every pattern with everything that it is not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from arfusion_pass import comm

T, H = 4, 64
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def rows(dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.ones(T, H, dtype=torch.float32).to(dtype)


def good(pattern: int) -> dict[str, Any]:
    """A right call of ``pattern``, without its workspace; every output that the pattern takes has memory of its own."""
    call: dict[str, Any] = {"input": rows(), "pattern": pattern, "output": rows()}
    if pattern:
        call.update(residual_in=rows(), rms_gamma=torch.ones(H, dtype=BF16), residual_out=rows(), norm_out=rows())
    if pattern in (2, 3, 4, 5):
        call.update(scale_factor=0.5)
    if pattern in (2, 4, 8, 9, 10, 11):
        call.update(quant_out=rows(FP8))
    if pattern in (3, 5):
        call.update(quant_out=torch.zeros(T, H // 2, dtype=torch.uint8))
        call.update(scale_out=torch.zeros(512, dtype=torch.uint8), layout_code=0)
    if pattern in (8, 9):
        call.update(block_quant_group_size=16, scale_out=torch.empty_strided((T, 1), (1, T), dtype=torch.int32))
    if pattern in (10, 11):
        call.update(scale_out=torch.zeros(T, 1))
    if pattern == 6:
        call.update(
            moe_reduction_device_num_experts=2,
            moe_reduction_scale_input=torch.ones(2, T),
            moe_reduction_active_experts_token_input=torch.ones(2 * T, H, dtype=BF16),
            moe_reduction_token_input=rows(),
        )
    if pattern == 7:
        index = torch.zeros(T, 2, dtype=torch.int32)
        call.update(expanded_idx_to_permuted_idx=index, expert_scale_factor=torch.ones(T, 2))
        call.update(shared_expert_output=rows(), routed_scaling_factor=2.0)
    return call


def bad_values(given: Any) -> Iterator[Any]:
    """What may stand where ``given`` should: no tensor, other tensors, numbers that are none."""
    yield from (None, "x", b"x", 3, -1, 2**70, 1.5, float("nan"), float("inf"), 1e39, True, (), [1.0], {}, object())
    yield from (torch.ones(()), torch.ones(1), torch.ones(0), torch.ones(T, H, device="meta"), 1 + 2j, 10**400)
    if isinstance(given, torch.Tensor):
        yield from (given.to(dtype) for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8))
        yield from (
            given.float().to_sparse(),
            given.unsqueeze(0).expand(2, *given.shape),
            given.transpose(0, -1),
            given[:0],
        )
        yield from (
            given[:1].expand(given.shape),
            given[..., ::2] if given.dim() else given,
            given.new_zeros(T + 1, H),
            given.clone(memory_format=torch.contiguous_format).view(torch.uint8),
        )
        yield from (given.float().requires_grad_(), torch.quantize_per_tensor(given.float(), 1.0, 0, torch.qint8))


def odd_tensors(given: torch.Tensor) -> Iterator[torch.Tensor]:
    """What torch's own ops take and no kernel can: memory that is gone, nested, negated when read, conjugated."""
    freed = given.clone()
    freed.untyped_storage().resize_(0)
    yield from (freed, torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)]))
    yield torch.zeros(given.shape, dtype=torch.complex64).conj()
    if given.dtype in (BF16, torch.float32):
        yield torch._neg_view(given.clone())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", [1, 2, 3, 6, 7, 8, 10])
def test_odd_tensors(pattern: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each place a sentence before the op runs; a negated input is read as what it stands for."""
    from arfusion_pass.ops import library

    ran: list[str] = []
    run = library._run
    monkeypatch.setattr(library, "_run", lambda call: (ran.append(call.op), run(call)))
    with comm.create_allreduce_fusion_workspace(
        world_size=1, rank=0, max_token_num=8, hidden_dim=H, dtype=BF16, device="cpu"
    ) as workspace:
        comm.allreduce_fusion(workspace=workspace, **good(pattern))  # seen to run
        assert ran
        for name in [name for name, value in good(pattern).items() if isinstance(value, torch.Tensor)]:
            for odd in odd_tensors(good(pattern)[name]):
                unread = (pattern == 6 and name == "input") or (pattern == 2 and name == "scale_out")
                if unread or (odd.is_neg() and name != "output" and not name.endswith("_out")):
                    comm.allreduce_fusion(workspace=workspace, **{**good(pattern), name: odd})
                    continue
                ran.clear()
                with pytest.raises((ValueError, TypeError), match=r" must be | reaches beyond its storage"):
                    comm.allreduce_fusion(workspace=workspace, **{**good(pattern), name: odd})
                assert not ran, (name, odd.layout)


def test_an_output_of_inference_mode() -> None:
    """The reference writes it, as a kernel does."""
    with torch.inference_mode():
        output = torch.zeros(T, H, dtype=BF16)
    with comm.create_allreduce_fusion_workspace(
        world_size=1, rank=0, max_token_num=8, hidden_dim=H, dtype=BF16, device="cpu"
    ) as workspace:
        comm.allreduce_fusion(workspace=workspace, **{**good(0), "output": output})
    assert torch.equal(output, rows())


def calls() -> Iterator[tuple[str, dict[str, Any]]]:
    parameters = [name for name in inspect.signature(comm.allreduce_fusion).parameters if name != "workspace"]
    for pattern in range(12):
        for name in parameters:
            for number, _ in enumerate(bad_values(good(pattern).get(name))):
                call = good(pattern)
                value = list(bad_values(call.get(name)))[number]
                yield f"pattern {pattern}, {name}={value!r:.60}", {**call, name: value}
        for one in (name for name, value in good(pattern).items() if isinstance(value, torch.Tensor)):
            for other in (name for name, value in good(pattern).items() if isinstance(value, torch.Tensor)):
                call = good(pattern)
                yield f"pattern {pattern}, {one} is {other}", {**call, one: call[other]}


@pytest.mark.filterwarnings("ignore")
def test_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of more than 2,500 calls runs, or is a ValueError or TypeError with a sentence before the op runs."""
    from arfusion_pass.ops import library

    launched: list[str] = []
    run = library._run

    def counted(call: Any) -> None:
        launched.append(call.op)
        run(call)

    monkeypatch.setattr(library, "_run", counted)
    problems, refused, count = [], 0, 0
    with comm.create_allreduce_fusion_workspace(
        world_size=1, rank=0, max_token_num=8, hidden_dim=H, dtype=BF16, device="cpu"
    ) as workspace:
        for what, arguments in calls():
            count += 1
            launched.clear()
            try:
                comm.allreduce_fusion(workspace=workspace, **arguments)
            except (ValueError, TypeError) as error:
                refused += 1
                if launched or len(str(error)) < 20:
                    problems.append(f"{what}: launched {launched}, {error}")
            except Exception as error:
                problems.append(f"{what}: {type(error).__name__}: {error}")
    assert not problems, f"{len(problems)} of {count}\n" + "\n".join(problems[:40])
    assert count > 2500
    assert refused > 1500
