"""Random graphs of sites, drawn over everything that a site can differ in, with nodes in between that are no site.

:func:`draw_graph` takes any ``pick(options)``, so the same graphs come from hypothesis (which shrinks a failure) and
from a seed (for ranks in other processes). Each all-reduce's input is multiplied by a constant of its own, by which
:func:`numbered` finds the drawn site of an all-reduce whatever order Inductor leaves them in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from tests import models, moe_cases
from tests import quant_cases as q
from tests.dialects import engine_calls, engine_ops
from tests.simulate import ENGINE_COLLECTIVES

Tensor = torch.Tensor
T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]

HIDDEN, TOKENS, BATCH, EXPERTS = q.HIDDEN, 7, 2, 4
GROUP, ENGINE_GROUP = "0", "tp:0"
EPSILONS = (1e-5, 1e-6, 3e-6, 1e-2, 1.1920928955078125e-07)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

STATIC = ("static_div", "static_div_f32", "static_reciprocal", "static_encode", "static_max_first", "static_no_clamp",
          "static_number", "static_number_mul")  # fmt: skip
DYNAMIC = ("token", "token_vllm", "token_torchao", "token_squeezed", "token_low", "token_apart", "group", "group_64",
           "group_32", "group_minus_one", "group_vllm", "group_flat", "group_as_is", "group_column", "group_tma",
           "group_pow2_log2", "int8_token", "int8_token_low", "int8_symmetric", "int8_unclamped", "token_ends",
           "token_aminmax", "token_bounded_twice", "token_bounded_more", "token_max_with_index")  # fmt: skip
UNSOUND_QUANTISERS = ("tensor_dynamic", "token_added", "token_240", "token_upper", "group_96", "group_of_columns",
                      "group_other_scale", "int8_truncated", "group_pow2_bits", "group_pow2_mask",
                      "int8_symmetric_unbounded", "token_compressed", "token_highest", "token_lowest")  # fmt: skip
ENGINE_QUANTISERS = tuple(engine_calls.QUANTISERS)

COLLECTIVES = ("functional", "vllm", "sglang", "symm_mem", "tensorrt_llm")
PROLOGUES = (*moe_cases.FINALIZE, *moe_cases.REDUCE)
NORMS = (*models.NORMS, *models.SPELLINGS, "unrounded", "aten_fused")
HAND_WRITTEN = tuple(name for name in NORMS if name not in ("torch", "aten_fused"))
"""Norms to which an epsilon may be a tensor."""
ENGINE_NORMS = (*engine_calls.NORMS, *engine_calls.ADD_NORMS, *engine_calls.QUANT_NORMS)
ANY_WEIGHT = ("ir", "ir_add", "c", "c_add")
"""Engine norms that take an fp32 weight; the others get one in the dtype of what they normalise."""
RESIDUALS = ("left", "right", "none", "fp32", "late", "widened", "bias", "bias first", "bias last", "rows first",
             "rows last", "bias and fp32")  # fmt: skip
TWO_ADDS = ("bias first", "bias last", "rows first", "rows last", "bias and fp32")
EPSILONS_IN = ("number", "number", "number", "tensor", "fp64", "computed")
AROUND = ("waited twice", "flat", "column", "heads", "cloned", "in fp32")
"""What stands around a functional all-reduce and computes nothing (in fp32: of 16-bit values, rounded again)."""
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
_unsound("epsilon a row", lambda y, r, w, e: (_times(y, _bare(y, r.float().abs().amax(-1, keepdim=True)), w),))
_unsound("broadcast residual", lambda y, r, w, e: (models.llama(y + r.amax(-1, keepdim=True), w, e),))
_unsound("weight a row", lambda y, r, w, e: (models.llama(y, r, e),))
_unsound("scaled by a vector", lambda y, r, w, e: (models.llama(r + y * w.to(y.dtype), w, e),))
_unsound("divided", lambda y, r, w, e: (models.llama(r + y / 3, w, e),))
_unsound("unrounded product", lambda y, r, w, e: (models.llama(torch.add(r, y, alpha=0.22), w, e),))
_unsound("scaled twice", lambda y, r, w, e: (models.llama(r + (y * 0.22) * 3.0, w, e),))
_unsound("relu before", lambda y, r, w, e: (models.llama(y.relu() + r, w, e),))
_unsound("subtracted", lambda y, r, w, e: (models.llama(r - y, w, e),))
_unsound("twice itself", lambda y, r, w, e: (models.llama(y + y, w, e), y))
_unsound("variance_size", lambda y, r, w, e: (torch.ops.vllm_ir.rms_norm(y, w, e, HIDDEN // 4),))
FACTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "number": lambda y, r: 0.22 * y,
    "one": lambda y, r: y * 1.0,
    "power": lambda y, r: y / 4,
    "element": lambda y, r: y * r.amax(),
    "row": lambda y, r: y * torch.sigmoid(r[..., :1]),
    "row in fp32": lambda y, r: (y.float() * torch.sigmoid(r[..., :1].float())).to(y.dtype),
    "before a sum": lambda y, r: 0.22 * (y + torch.tanh(r)),
}
"""What the reduced value is multiplied by before anything else; the last alone adds a tensor before."""
UNSOUND_OPS = ("avg", "max")
IN_PART = ("weight a row",)
"""Of these a sound part may fuse, such as the norm without its weight."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One all-reduce, what is in front of it and what follows; every field is one of the tuples above, or empty."""

    prologue: str
    collective: str
    around: str
    epsilon: float
    norm: str
    gamma: str
    residual: str
    quantiser: str
    scale: int
    fan_out: str
    between: str
    unsound: str
    epsilon_in: str = "number"
    factor: str = ""


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
    family = pick(("none", "static", "dynamic", "engine", "static", "dynamic", "engine", "unsound"))
    quantisers = {"none": ("",), "static": STATIC, "dynamic": DYNAMIC, "engine": ENGINE_QUANTISERS,
                  "unsound": UNSOUND_QUANTISERS}[family]  # fmt: skip
    norm = pick(pick((NORMS, ENGINE_NORMS)))
    return Site(
        prologue=pick(("", "", "moe")) and pick(PROLOGUES),
        collective=(collective := pick(COLLECTIVES)),
        around=pick(("", pick(AROUND))) if collective == "functional" else "",
        epsilon=pick(EPSILONS),
        norm=norm,
        gamma=pick(("same", "same", "fp32")),
        residual=pick(RESIDUALS),
        quantiser="" if norm in engine_calls.QUANT_NORMS else pick(quantisers),
        scale=pick((0, 1, 2)),
        fan_out=pick(FAN_OUTS),
        between=pick(BETWEEN),
        unsound=pick(("", "", "", "", (*UNSOUND, *UNSOUND_OPS))) and pick((*UNSOUND, *UNSOUND_OPS)),
        epsilon_in=pick(EPSILONS_IN) if norm in HAND_WRITTEN else "number",
        factor=pick(("", "", pick(tuple(FACTORS)))),
    )


def register() -> None:
    """The engines' ops, and an opaque one that stands for ``aten._fused_rms_norm`` until :func:`undecompose`."""
    engine_ops.register_vllm()
    engine_ops.register_sglang()
    engine_ops.register_flashinfer()
    engine_ops.register_tensorrt_llm()
    engine_ops.register_symm_mem()
    engine_ops.define(
        "arfusion_test::fused_rms_norm",
        "(Tensor x, int[] normalized_shape, Tensor? weight, float? eps) -> (Tensor, Tensor)",
        torch.ops.aten._fused_rms_norm,
        lambda x, *_: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
    )


def undecompose(graph: fx.Graph) -> None:
    """Give a graph the ``aten._fused_rms_norm`` that Inductor decomposes and other back-ends keep."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.arfusion_test.fused_rms_norm.default):
        node.target = torch.ops.aten._fused_rms_norm.default


def example_inputs(graph: Graph, rank: int = 0, tokens: int = TOKENS) -> list[Tensor]:
    """x (each rank's own), residual, weight, fp32 weight, router's index and weights, three scales, a matrix, a narrow
    matrix."""
    rows = (tokens,) if graph.rank == 2 else (BATCH, tokens)
    own, same = torch.Generator().manual_seed(rank + 1), torch.Generator().manual_seed(100)

    def rand(*sizes: int, generator: torch.Generator = same) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    weight = 1 + 0.3 * rand(HIDDEN)
    return [
        rand(*rows, HIDDEN, generator=own).to(graph.dtype),
        rand(*rows, HIDDEN).to(graph.dtype),
        weight.to(graph.dtype),
        weight + 0.01 * rand(HIDDEN),
        torch.randint(-1, tokens, (*rows, EXPERTS), generator=same),
        torch.rand(*rows, EXPERTS, generator=same).to(graph.dtype),
        torch.tensor(0.37),
        torch.tensor([0.0217]),
        torch.tensor([[0.11]]),
        (rand(HIDDEN, HIDDEN) / 16).to(graph.dtype),
        (rand(HIDDEN, 8) / 16).to(graph.dtype),
    ]


class Program:
    """A graph as a function of :func:`example_inputs`, on ``world`` ranks."""

    def __init__(self, graph: Graph, world: int) -> None:
        self.graph, self.world = graph, world

    def __call__(self, x: Tensor, r: Tensor, w: Tensor, wide: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        index, router, *scales, square, narrow = rest
        outputs: list[Tensor] = []
        for number, site in enumerate(self.graph.sites):
            x = _prologue(site, x * mark(number), r, index, router)
            x = _collective(x, site, self.world)
            weight = wide if site.gamma == "fp32" else w
            if site.unsound in UNSOUND:
                results = UNSOUND[site.unsound](x, r, weight, site.epsilon)
                outputs += results
                x = results[0].to(w.dtype)
                continue
            h, total, codes = _norm(site, x, r, weight, scales)
            outputs += [total] if site.between == "total read" else []
            outputs += codes or _quantised(site, h, scales, narrow)
            r = total.to(w.dtype)
            x = _between(site, h.to(w.dtype), square)
        return (*outputs, x, r)


def mark(number: int) -> float:
    """The constant that site ``number``'s all-reduce is fed with."""
    return 1.0 + (number + 1) / 64


def _prologue(site: Site, x: Tensor, r: Tensor, index: Tensor, router: Tensor) -> Tensor:
    """The MoE combination in front of the all-reduce: ``x`` as the experts' rows."""
    if not site.prologue:
        return x
    rows, index, router = x.reshape(-1, HIDDEN), index.reshape(-1, EXPERTS), router.reshape(-1, EXPERTS)
    if site.prologue in moe_cases.FINALIZE:
        combined = moe_cases.FINALIZE[site.prologue](rows, index, router, r.reshape(-1, HIDDEN))
    else:
        experts = rows * router.t().unsqueeze(-1).cos()
        combined = moe_cases.REDUCE[site.prologue](experts, router.t(), r.reshape(-1, HIDDEN))
    return combined.reshape(x.shape)


def _collective(x: Tensor, site: Site, world: int) -> Tensor:
    if site.unsound in UNSOUND_OPS:
        return models.reduce(x, GROUP, site.unsound)
    if site.collective == "functional":
        return _reduced(site.around, x)
    return engine_calls.all_reduce(site.collective, x, GROUP if site.collective == "symm_mem" else ENGINE_GROUP, world)


def _reduced(around: str, x: Tensor) -> Tensor:
    """An all-reduce with what stands around it."""
    if around == "flat":
        return models.reduce(x.reshape(-1), GROUP).view(x.shape)
    if around == "column":
        return models.reduce(x.unsqueeze(-1), GROUP).squeeze(-1)
    if around == "heads":
        return models.reduce(x.reshape(*x.shape[:-1], 4, HIDDEN // 4), GROUP).reshape(x.shape)
    if around == "in fp32":
        return models.reduce(x.float(), GROUP).to(x.dtype)
    y = models.reduce(x, GROUP)
    if around == "waited twice":
        return torch.ops._c10d_functional.wait_tensor(y)
    return y.clone() if around == "cloned" else y


def _norm(
    site: Site, y: Tensor, r: Tensor, w: Tensor, scales: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """The norm, the residual sum, and what a norm that quantises has written (its norm is then made of that)."""
    eps: Any = {
        "number": lambda: site.epsilon,
        "tensor": lambda: scales[site.scale],
        "fp64": lambda: scales[0].double(),
        "computed": lambda: w[0].float().abs(),
    }[site.epsilon_in]()
    if site.factor and not (site.factor == "before a sum" and site.residual in TWO_ADDS):
        y = FACTORS[site.factor](y, r)
    if site.norm in engine_calls.QUANT_NORMS:
        rows, residual = y.reshape(-1, HIDDEN), r.reshape(-1, HIDDEN)
        scale = scales[site.scale].reshape(1)
        codes, total = engine_calls.QUANT_NORMS[site.norm](rows, residual, w.to(y.dtype), scale, eps)
        return codes[0].to(y.dtype).reshape(y.shape), total.reshape(y.shape), codes
    if site.norm in engine_calls.ADD_NORMS:
        if site.residual == "late":
            r = torch.tanh(r)
        elif site.residual == "fp32" and site.norm == "ir_add":
            r = r.float()
        elif site.residual == "widened" and site.norm in ANY_WEIGHT:
            y, r = y.float(), r.float()
        elif site.residual == "bias first":
            y = y + w.to(y.dtype)
        elif site.residual == "rows first":
            y = torch.tanh(r) + y
        operands = (r, y) if site.norm == "ir_add" and site.residual == "left" else (y, r)
        return *engine_calls.ADD_NORMS[site.norm](*operands, _weight(site, w, y), eps), None
    if site.norm == "unrounded":
        return *models.unrounded_sum(y, r, w, eps, models.fp32_result), None
    total = {
        "left": lambda: r + y,
        "right": lambda: y + r,
        "none": lambda: y,
        "bias": lambda: y + w.to(y.dtype),
        "bias first": lambda: r + (y + w.to(y.dtype)),
        "bias last": lambda: (y + r) + w.to(y.dtype),
        "rows first": lambda: (y + torch.tanh(r)) + r,
        "rows last": lambda: torch.tanh(r) + (r + y),
        "bias and fp32": lambda: (y + w.to(y.dtype)) + r.float(),
        "fp32": lambda: r.float() + y,
        "late": lambda: y + torch.tanh(r),
        "widened": lambda: (r + y).float(),
    }[site.residual]()
    if site.norm in engine_calls.NORMS:
        return engine_calls.NORMS[site.norm](total, _weight(site, w, total), eps), total, None
    if site.norm == "aten_fused":
        return torch.ops.arfusion_test.fused_rms_norm(total, [HIDDEN], w, eps)[0], total, None
    norm = (models.NORMS | models.SPELLINGS)[site.norm]
    same = site.norm == "torch" and site.gamma == "same"
    return norm(total, w.to(total.dtype) if same else w, eps), total, None


def _weight(site: Site, w: Tensor, x: Tensor) -> Tensor:
    """An engine norm's weight, in a dtype that its op takes."""
    return w if site.norm in ANY_WEIGHT and (site.norm[0] != "c" or x.dtype != torch.float32) else w.to(x.dtype)


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
    if name in engine_calls.QUANTISERS:
        return engine_calls.QUANTISERS[name](rows, scale)
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


def all_reduces(graph: fx.Graph) -> list[fx.Node]:
    """The all-reduces of a graph, however they are spelled."""
    return [node for node in graph.nodes if _is_all_reduce(node)]


def _is_all_reduce(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in ("_c10d_functional::all_reduce", *ENGINE_COLLECTIVES)


def numbered(graph: fx.Graph) -> dict[str, int]:
    """The drawn site of every all-reduce in a graph, by the node's name."""
    return {node.name: _number(node) for node in all_reduces(graph)}


def _number(collective: fx.Node) -> int:
    """The mark that an all-reduce's input is made with, looked for back to other all-reduces."""
    waiting, seen = list(collective.all_input_nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or _is_all_reduce(node):
            continue
        seen.add(node)
        constants = [arg for arg in node.args if isinstance(arg, float)]
        if node.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar) and constants:
            number = constants[0] * 64 - 65
            if number in range(8):
                return int(number)
        waiting += node.all_input_nodes
    raise AssertionError("an all-reduce without its mark")
