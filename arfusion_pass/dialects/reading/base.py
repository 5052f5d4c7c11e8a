"""What a dialect is: recognisers that turn one way of spelling an op into the stages below.

A dialect is one file with one :class:`Dialect` subclass. It names stages; it rewrites nothing, knows no kernel
and imports no engine. ``arfusion_pass.rewrite.raising`` asks every dialect and puts the stages of one site together,
so that an engine's all-reduce may be followed by aten's norm and a custom op's quantiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from arfusion_pass.dialects.reading.operands import Sum
from arfusion_pass.ops.spec import Flags, QuantSpec


@dataclasses.dataclass(frozen=True)
class Reduced:
    """An all-reduce by sum.

    Attributes:
        node: the all-reduce itself, which names the site.
        value: the node whose value is the reduced tensor (its wait, or itself).
        x: what is reduced.
        group: the process group's name.
        nodes: every node that goes when the site is fused, the value included.
        aliases: other nodes that hold the reduced tensor: further waits, or what was reduced in place.
    """

    node: fx.Node
    value: fx.Node
    x: fx.Node
    group: str
    nodes: tuple[fx.Node, ...]
    aliases: tuple[fx.Node, ...] = ()

    @property
    def values(self) -> tuple[fx.Node, ...]:
        """Every node that holds the reduced tensor, ``value`` first."""
        return (self.value, *self.aliases)


@dataclasses.dataclass(frozen=True)
class Rows:
    """One tensor with the rows of all ranks, and who owns which: row ``t`` of its ``T`` rows is rank
    ``t // block % world``'s.

    Attributes:
        node: the tensor, ``[..., H]``.
        block: how many consecutive rows are one rank's; None for ``T / world``, one block a rank. What is scattered
            has a symbolic one as the node that holds it, what is gathered as the size itself.
        nodes: the nodes between the collective's own result and ``node``, ``node`` included; empty where they are one.
    """

    node: fx.Node
    block: int | torch.SymInt | fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scattered(Reduced):
    """A reduce-scatter by sum: ``value`` holds this rank's rows, ``[T / world, H]`` in whatever shape.

    Attributes:
        world: how many ranks the op says that there are.
        rows: what is reduced, best first: before the ``cat`` that puts each rank's rows together, and as the op takes
            it. ``x`` is one of them.
    """

    world: int = 0
    rows: tuple[Rows, ...] = ()


@dataclasses.dataclass(frozen=True)
class Gathered:
    """An all-gather of the ranks' rows.

    Attributes:
        node: the all-gather itself.
        group: the process group's name.
        world: how many ranks the op says that there are.
        rows: its result, best first: behind the ``cat`` that puts the rows in order, and as the op gives it.
        nodes: the all-gather and its waits.
    """

    node: fx.Node
    group: str
    world: int
    rows: tuple[Rows, ...]
    nodes: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Refused:
    """Something that is nearly a stage: ``reason`` is a sentence for the report, ``node`` what stood in the way."""

    reason: str
    node: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """An RMSNorm, with the residual add in front of it where there is one.

    Attributes:
        operand: the node that stands for the reduced value in the add, or that the norm reads: ``Reduced.value``,
            a view of it or a lossless cast of it.
        norm: the node whose value is the norm; its dtype is the dtype of the result. None where one op computes the
            norm and quantises it (``quant``): no node holds the norm then, and its dtype is the reduced tensor's.
        epsilon: as the graph holds it: a number, or the node of one element (or of a SymFloat) whose value it is.
        weight: ``[H]``, or None.
        weight_bias: added to the weight in fp32 (Gemma: 1).
        flags: rounding, see :class:`Flags`.
        residual: the other operand of the add, without lossless casts; None without an add.
        total: the node whose value is the sum that others may read: in the tensor's dtype or in fp32.
        nodes: the nodes between operand and norm, ``total`` and ``norm`` included. None of them may be read by
            others, but for ``total``, ``norm``, casts and views.
        quant: the quantiser inside the same op, or None.
        addend: what is added beside a residual, in the tensor's dtype: of its shape, or one row of it; with
            ``Flags.ADDEND_LAST`` behind the residual.
        factor: what the reduced value is multiplied by before anything is added, with ``Flags.ADDEND_SCALED`` behind
            the addend: a number, or the node of one element or of one for each row. The product is rounded to the
            tensor's dtype.
        epsilon_at: the node that holds epsilon: the sum with it, or the op that takes it; None where there is none.
    """

    operand: fx.Node
    norm: fx.Node | None
    epsilon: float | fx.Node
    nodes: tuple[fx.Node, ...]
    weight: fx.Node | None = None
    weight_bias: float = 0.0
    flags: Flags = Flags.NONE
    residual: fx.Node | None = None
    total: fx.Node | None = None
    quant: Quantised | None = None
    epsilon_at: fx.Node | None = None
    addend: fx.Node | None = None
    factor: float | fx.Node = 1.0

    @property
    def result(self) -> fx.Node:
        """The norm's node, or the codes' where no node holds the norm."""
        node = self.norm if self.norm is not None or self.quant is None else self.quant.codes
        assert node is not None
        return node


@dataclasses.dataclass(frozen=True)
class Prologue:
    """An MoE combination whose result is what an all-reduce reduces.

    Attributes:
        op: ``moe_reduce`` or ``moe_finalize``, the canonical op's name.
        x: the node whose value is reduced.
        inputs: the canonical op's tensor argument names to nodes; optional ones may be missing.
        nodes: the nodes from inputs to ``x``, ``x`` included.
        flags: its ``MOE_ROUND_*`` flags.
        routed_scaling_factor: of ``moe_finalize``.
        wraps: whether a negative index means a row counted from the end, as in torch's indexing, and not "none".
        sentinel: only an index of -1 means "none"; what other negative ones mean ``wraps`` says: a row from the end, or
            else row 0.
    """

    op: str
    x: fx.Node
    inputs: dict[str, fx.Node]
    nodes: tuple[fx.Node, ...]
    flags: Flags = Flags.NONE
    routed_scaling_factor: float = 1.0
    wraps: bool = False
    sentinel: bool = False


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A quantiser that reads a norm.

    Attributes:
        op: name of its canonical op, a key of ``arfusion_pass.ir.QUANTISERS``.
        spec: its steps.
        codes: the node whose value is the quantised tensor.
        nodes: the nodes between norm and outputs, the outputs included.
        scales: the node whose value is the scales; None where the scale is given, or nobody reads it. Its shape,
            strides and dtype may be any view of the op's buffer (:mod:`arfusion_pass.rewrite.output_views`).
        scale: the given scale (static FP8; NVFP4's global scale), one element, or None.
        scale_value: the given scale where it is a number.
        dtype: the 16-bit dtype that the spec's roundings to ``T`` were read from, which must then be the reduced
            tensor's; None where there are none.
        scale_dtype: what the graph rounds the given scale to before it is applied; None: nothing.
    """

    op: str
    spec: QuantSpec
    codes: fx.Node
    nodes: tuple[fx.Node, ...]
    scales: fx.Node | None = None
    scale: fx.Node | None = None
    scale_value: float = 1.0
    dtype: torch.dtype | None = None
    scale_dtype: torch.dtype | None = None


class Dialect:
    """One way of spelling the ops. Every method may be left out; all are called with post-grad nodes.

    Attributes:
        name: for the report.
    """

    name = ""

    def all_reduce(self, node: fx.Node) -> Reduced | Refused | None:
        """The all-reduce that ``node`` is; None if it is none, Refused if it is one that cannot be fused."""
        return None

    def reduce_scatter(self, node: fx.Node) -> Scattered | Refused | None:
        """The reduce-scatter that ``node`` is; None if it is none, Refused if it is one that cannot be fused."""
        return None

    def all_gathers(self, shard: fx.Node) -> Iterable[Gathered]:
        """The all-gathers that read ``shard``, this rank's rows."""
        return ()

    def norms(self, value: fx.Node, candidates: Sequence[Sum]) -> Iterable[Norm | Refused]:
        """The norms, with or without an add, whose operand is ``value`` (a reduced value or a view of it).
        ``candidates`` are what they may read: ``value`` itself first, then its sums with a residual."""
        return ()

    def prologues(self, x: fx.Node) -> Iterable[Prologue | Refused]:
        """The MoE combinations whose result is ``x``, what an all-reduce reduces."""
        return ()

    def quantisers(self, norm: fx.Node) -> Iterable[Quantised | Refused]:
        """The quantisers that read ``norm`` (a norm's value or a view of it)."""
        return ()
