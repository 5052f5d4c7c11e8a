"""Random graphs of sites, drawn over everything that a site can differ in, with nodes in between that are no site.

:func:`draw_graph` takes any ``pick(options)``, so the same graphs come from hypothesis (which shrinks a failure) and
from a seed (for ranks in other processes). Each all-reduce's input is multiplied by a constant of its own, by which
:func:`numbered` finds the drawn site of an all-reduce whatever order Inductor leaves them in.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from tests import models
from tests import quant_cases as q
from tests.dialects import engine_ops

Tensor = torch.Tensor
T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]

HIDDEN, TOKENS, BATCH = q.HIDDEN, 7, 2
GROUP, ENGINE_GROUP = "0", "tp:0"
EPSILONS = (1e-5, 1e-6, 3e-6, 1e-2, 1.1920928955078125e-07)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

STATIC = ("static_div", "static_div_f32", "static_reciprocal", "static_encode", "static_max_first", "static_no_clamp",
          "static_number", "static_number_mul")  # fmt: skip
DYNAMIC = ("token", "token_vllm", "token_torchao", "token_squeezed", "token_low", "token_apart", "group", "group_64",
           "group_32", "group_minus_one", "group_vllm", "group_flat", "group_as_is", "group_column", "group_tma",
           "group_pow2_log2", "group_pow2_bits", "int8_token", "int8_token_low")  # fmt: skip
UNSOUND_QUANTISERS = ("tensor_dynamic", "token_added", "token_240", "token_upper", "group_96", "group_of_columns",
                      "group_other_scale", "int8_truncated")  # fmt: skip
ENGINE_QUANTISERS = ("c_static", "c_token", "c_group")

NORMS = (*models.NORMS, "unrounded", "ir", "ir_add", "c", "c_add")
RESIDUALS = ("left", "right", "none", "fp32", "late")
FAN_OUTS = ("alone", "matmul", "output", "other quantiser", "twin", "relu")
BETWEEN = ("nothing", "tanh", "matmul", "views", "total read", "clone")


def _root(h: Tensor, eps: float, dim: Any = -1) -> Tensor:
    return torch.rsqrt(h.float().pow(2).mean(dim, keepdim=True) + eps)


def _times(x: Tensor, root: Tensor, w: Tensor) -> Tensor:
    return w * (x.float() * root).to(x.dtype)


Form = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]
UNSOUND: dict[str, Form] = {}
"""Each gets (reduced, residual, weight, epsilon) and must stay as it is."""


def _unsound(name: str, form: Form) -> None:
    UNSOUND[name] = form


def _cube(y: Tensor, e: float) -> Tensor:
    return torch.rsqrt(y.float().abs().pow(3).mean(-1, keepdim=True) + e)


def _total(y: Tensor, e: float) -> Tensor:
    return torch.rsqrt(y.float().pow(2).sum(-1, keepdim=True) + e)


def _bare(y: Tensor, e: Any) -> Tensor:
    return torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + e)


def _centred(y: Tensor, e: float) -> Tensor:
    return _root(y - y.mean(-1, keepdim=True), e)


_unsound("mean over the tokens", lambda y, r, w, e: (_times(y + r, _root(y + r, e, -2), w),))
_unsound("mean over everything", lambda y, r, w, e: (_times(y + r, _root(y + r, e, (-2, -1)), w),))
_unsound("root read", lambda y, r, w, e: (_times(y + r, _root(y + r, e), w), _root(y + r, e)))
_unsound("half the variance", lambda y, r, w, e: (_times(y + r, _root((y + r)[..., : HIDDEN // 2], e), w),))
_unsound("layer norm", lambda y, r, w, e: (_times(y + r, _centred(y + r, e), w),))
_unsound("another tensor's root", lambda y, r, w, e: (_times(r, _root(y, e), w),))
_unsound("root before the sum", lambda y, r, w, e: (_times(y + r, _root(y, e), w),))
_unsound("cube", lambda y, r, w, e: (_times(y, _cube(y, e), w),))
_unsound("sum of squares", lambda y, r, w, e: (_times(y, _total(y, e), w),))
_unsound("epsilon outside", lambda y, r, w, e: (_times(y, _bare(y, 0.0) + e, w),))
_unsound("epsilon a tensor", lambda y, r, w, e: (_times(y, _bare(y, w[0].float().abs()), w),))
_unsound("broadcast residual", lambda y, r, w, e: (models.llama(y + r.amax(-2, keepdim=True), w, e),))
_unsound("weight a row", lambda y, r, w, e: (models.llama(y, r, e),))
_unsound("scaled", lambda y, r, w, e: (models.llama(y * r.amax(-1, keepdim=True), w, e),))
_unsound("relu before", lambda y, r, w, e: (models.llama(y.relu() + r, w, e),))
_unsound("subtracted", lambda y, r, w, e: (models.llama(r - y, w, e),))
_unsound("twice itself", lambda y, r, w, e: (models.llama(y + y, w, e), y))
_unsound("variance_size", lambda y, r, w, e: (torch.ops.vllm_ir.rms_norm(y, w, e, HIDDEN // 4),))
UNSOUND_OPS = ("avg", "max")
IN_PART = ("weight a row",)
"""Of these a sound part may fuse, such as the norm without its weight."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One all-reduce and what follows it; every field is one of the tuples above."""

    collective: str
    epsilon: float
    norm: str
    gamma: str
    residual: str
    quantiser: str
    scale: int
    fan_out: str
    between: str
    unsound: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """A whole graph."""

    dtype: torch.dtype
    rank: int
    dynamic: bool
    functionalized_v2: bool
    sites: tuple[Site, ...]


def draw_graph(pick: Pick[Any], most: int = 4) -> Graph:
    """A graph of up to ``most`` sites."""
    count = pick(range(1, most + 1))
    return Graph(
        dtype=pick(DTYPES),
        rank=pick((2, 3)),
        dynamic=pick((False, True)),
        functionalized_v2=pick((True, False)),
        sites=tuple(_draw_site(pick) for _ in range(count)),
    )


def _draw_site(pick: Pick[Any]) -> Site:
    family = pick(("none", "static", "dynamic", "engine", "static", "dynamic", "unsound"))
    quantisers = {"none": ("",), "static": STATIC, "dynamic": DYNAMIC, "engine": ENGINE_QUANTISERS,
                  "unsound": UNSOUND_QUANTISERS}[family]  # fmt: skip
    return Site(
        collective=pick(("functional", "vllm")),
        epsilon=pick(EPSILONS),
        norm=pick(NORMS),
        gamma=pick(("same", "same", "fp32")),
        residual=pick(RESIDUALS),
        quantiser=pick(quantisers),
        scale=pick((0, 1, 2)),
        fan_out=pick(FAN_OUTS),
        between=pick(BETWEEN),
        unsound=pick(("", "", "", "", (*UNSOUND, *UNSOUND_OPS))) and pick((*UNSOUND, *UNSOUND_OPS)),
    )


def register() -> None:
    """The engine's ops."""
    engine_ops.register_vllm()


def example_inputs(graph: Graph, rank: int = 0, tokens: int = TOKENS) -> list[Tensor]:
    """x (each rank's own), residual, weight, fp32 weight, three scales, a matrix, a narrow matrix."""
    rows = (tokens, HIDDEN) if graph.rank == 2 else (BATCH, tokens, HIDDEN)
    own, same = torch.Generator().manual_seed(rank + 1), torch.Generator().manual_seed(100)

    def rand(*sizes: int, generator: torch.Generator = same) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    weight = 1 + 0.3 * rand(HIDDEN)
    return [
        rand(*rows, generator=own).to(graph.dtype),
        rand(*rows).to(graph.dtype),
        weight.to(graph.dtype),
        weight + 0.01 * rand(HIDDEN),
        torch.tensor(0.37),
        torch.tensor([0.0217]),
        torch.tensor([[0.11]]),
        (rand(HIDDEN, HIDDEN) / 16).to(graph.dtype),
        (rand(HIDDEN, 8) / 16).to(graph.dtype),
    ]


class Program:
    """A graph as a function of :func:`example_inputs`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __call__(self, x: Tensor, r: Tensor, w: Tensor, wide: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *scales, square, narrow = rest
        outputs: list[Tensor] = []
        for number, site in enumerate(self.graph.sites):
            x = _collective(x * mark(number), site)
            weight = wide if site.gamma == "fp32" else w
            if site.unsound in UNSOUND:
                results = UNSOUND[site.unsound](x, r, weight, site.epsilon)
                outputs += results
                x = results[0].to(w.dtype)
                continue
            h, total = _norm(site, x, r, weight)
            outputs += [total] if site.between == "total read" else []
            outputs += _quantised(site, h, scales, narrow)
            r = total.to(w.dtype)
            x = _between(site, h.to(w.dtype), square)
        return (*outputs, x, r)


def mark(number: int) -> float:
    """The constant that site ``number``'s all-reduce is fed with."""
    return 1.0 + (number + 1) / 64


def _collective(x: Tensor, site: Site) -> Tensor:
    if site.unsound in UNSOUND_OPS:
        return models.reduce(x, GROUP, site.unsound)
    return torch.ops.vllm.all_reduce(x, ENGINE_GROUP) if site.collective == "vllm" else models.reduce(x, GROUP)


def _norm(site: Site, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The norm and the residual sum."""
    eps = site.epsilon
    if site.norm == "c_add":
        residual = r.clone()
        torch.ops._C.fused_add_rms_norm(y, residual, w, eps)
        return y, residual
    if site.norm == "ir_add":
        return torch.ops.vllm_ir.fused_add_rms_norm(*((r, y) if site.residual == "left" else (y, r)), w, eps)
    if site.norm == "unrounded":
        return models.unrounded_sum(y, r, w, eps, models.fp32_result)
    total = {
        "left": lambda: r + y,
        "right": lambda: y + r,
        "none": lambda: y,
        "fp32": lambda: r.float() + y,
        "late": lambda: y + torch.tanh(r),
    }[site.residual]()
    if site.norm == "ir":
        return torch.ops.vllm_ir.rms_norm(total, w, eps), total
    if site.norm == "c":
        result = torch.empty_like(total)
        torch.ops._C.rms_norm(result, total, w, eps)
        return result, total
    norm = models.NORMS[site.norm]
    return norm(total, w.to(total.dtype) if site.norm == "torch" and site.gamma == "same" else w, eps), total


def _quantised(site: Site, h: Tensor, scales: list[Tensor], narrow: Tensor) -> list[Tensor]:
    """Everything that reads the norm."""
    outputs: list[Tensor] = []
    if site.quantiser:
        outputs += _quantise(site.quantiser, h, scales[site.scale])
        if site.fan_out == "twin":
            outputs += _quantise(site.quantiser, h.clone(), scales[site.scale])
        elif site.fan_out == "other quantiser":
            outputs += _quantise("token" if site.quantiser != "token" else "static_div", h, scales[0])
    if site.fan_out == "matmul":
        outputs.append(h @ narrow.to(h.dtype))
    elif site.fan_out == "output":
        outputs.append(h)
    elif site.fan_out == "relu":
        outputs.append(h.relu())
    return outputs


def _quantise(name: str, h: Tensor, scale: Tensor) -> list[Tensor]:
    if name in STATIC:
        return [getattr(q, name)(h, scale)]
    rows = h.reshape(-1, HIDDEN) if h.dim() != 2 else h
    if name == "c_static":
        codes = torch.empty_like(rows, dtype=q.FP8)
        torch.ops._C.static_scaled_fp8_quant(codes, rows, scale.reshape(1), None)
        return [codes]
    if name == "c_token":
        codes, scales = torch.empty_like(rows, dtype=q.FP8), rows.new_empty(rows.shape[0], 1, dtype=torch.float32)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, rows, scales, None)
        return [codes, scales]
    if name == "c_group":
        codes = torch.empty_like(rows, dtype=q.FP8)
        scales = rows.new_empty(rows.shape[0], HIDDEN // 128, dtype=torch.float32)
        torch.ops._C.per_token_group_fp8_quant(rows, codes, scales, 128, 1e-10, -448.0, 448.0, False, False, False)
        return [codes, scales]
    return list(getattr(q, name)(rows))


def _between(site: Site, h: Tensor, square: Tensor) -> Tensor:
    """What leads from a norm to the next all-reduce."""
    if site.between == "tanh":
        return torch.tanh(h)
    if site.between == "matmul":
        return h @ square
    if site.between == "views":
        return h.reshape(-1, 2, HIDDEN // 2).neg().reshape(h.shape)
    return h.clone() if site.between == "clone" else h


def numbered(graph: fx.Graph) -> dict[str, int]:
    """The drawn site of every all-reduce in a graph, by the node's name."""
    found = {}
    targets = (torch.ops._c10d_functional.all_reduce.default, torch.ops.vllm.all_reduce.default)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in targets:
            found[node.name] = _number(node.args[0])
    return found


def _number(node: Any) -> int:
    while isinstance(node, fx.Node):
        constants = [arg for arg in node.args if isinstance(arg, float)]
        if node.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar, operator.mul) and constants:
            number = constants[0] * 64 - 65
            assert number == int(number)
            return int(number)
        node = node.args[0]
    raise AssertionError("an all-reduce without its mark")
