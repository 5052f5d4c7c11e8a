"""The graph's difference for every pattern class with a quantiser, kept in ``tests/golden`` as ``q_*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as fc

from tests import quant_cases as q
from tests.quant_cases import Tensor
from tests.simulate import captured, check_same, fused_copy
from tests.test_golden import Golden, check_golden

pytestmark = pytest.mark.usefixtures("world")


def q_static(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.site(q.static_div)(y, r, w, s)


def q_static_router(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.with_router(y, r, w, s)


def q_token_gemma_dead(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.site(q.token, q.gemma, "dead")(y, r, w, s)


def q_token_none(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.site(q.token_vllm, q.llama, "none")(y, r, w, s)


def q_group_column(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.site(q.group_column)(y, r, w, s)


def q_group_tma(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.site(q.group_tma_strided)(y, r, w, s)


def q_group_indexer(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.with_indexer(y, r, w, s)


def q_int8_token(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.site(q.int8_token)(y, r, w, s)


def q_twins(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return q.twins_token(y, r, w, s)


MODELS = {
    q_static: "AllReduceFusedAddRMSNormStaticQuantFP8",
    q_static_router: "AllReduceFusedAddRMSNormStaticQuantFP8",
    q_token_gemma_dead: "AllReduceFusedAddGemmaRMSNormTokenQuantFP8",
    q_token_none: "AllReduceRMSNormTokenQuantFP8",
    q_group_column: "AllReduceFusedAddRMSNormGroupQuantFP8",
    q_group_tma: "AllReduceFusedAddRMSNormGroupQuantFP8",
    q_group_indexer: "AllReduceFusedAddRMSNormGroupQuantFP8WithIndexer",
    q_int8_token: "AllReduceFusedAddRMSNormTokenQuantINT8",
    q_twins: "AllReduceFusedAddRMSNormTokenQuantFP8",
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_golden(model: Callable[..., Any], golden: Golden) -> None:
    """Torch 2.13's graph turns into exactly this one; on any torch it fuses under this name to the same bits."""

    def whole(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
        return model(fc.all_reduce(x, "sum", "0"), r, w, s)

    dynamic = None if model is q_group_tma else 8  # torch guards on the padded count there
    rows = [torch.empty(dynamic or 6, q.HIDDEN, dtype=torch.bfloat16) for _ in range(2)]
    arguments = [*rows, torch.empty(q.HIDDEN, dtype=torch.bfloat16), torch.empty(1)]
    module = captured(whole, arguments, dynamic=dynamic)
    fused, report = fused_copy(module)
    assert [site.pattern for site in report.sites] == [MODELS[model]], str(report)
    for tokens in (5, 8) if dynamic else (6,):
        check_same(module, fused, tokens=tokens)
    if torch.__version__.startswith("2.13."):
        check_golden(model.__name__, module, fused, golden)
