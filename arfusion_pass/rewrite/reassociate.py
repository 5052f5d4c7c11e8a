"""Opt-in (``FusionConfig(reassociate=True)``): the linear steps between an all-reduce and its norm go out of the way.

    residual + c * all_reduce(x)                -> residual + all_reduce(c * x)     Granite, MiniCPM, layer scale
    residual + all_reduce(x).sum(0)             -> residual + all_reduce(x.sum(0))  Llama 4's experts
    residual + (all_reduce(a) + all_reduce(b))  -> residual + all_reduce(a + b)     routed and shared experts
    residual + ((all_reduce(x) + a) + b)        -> residual + (all_reduce(x) + (b + a))
    c * (all_reduce(x) + bias)                  -> c * all_reduce(x) + c * bias     and on, as above
    addmm(all_reduce(x), a, b), r - c * y, ...  -> the same in mul, mm and add      and on, as above

One tensor beside the residual is exact as it stands, and stays: an addend of the fused call. A factor of one element or
of one for each row would be exact as well; it goes before the all-reduce all the same, where two of these may then
become one, and stays where it cannot go.

``c`` is a number, a one-element tensor, a learned ``[H]`` vector, or one element a row, such as a shared expert's gate
``sigmoid(norm(h) @ w)``; a step may be taken in fp32 on a 16-bit sum. Equal in exact arithmetic, rounded elsewhere:
each rank rounds its share of the product or sum before the all-reduce, not the result after it. The ranks are taken to
run one graph with the same weights and the same residual stream, as tensor parallelism requires anyway
(:mod:`arfusion_pass.rewrite.replicated`); ``bias`` may be each rank's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from arfusion_pass.config import FusionConfig
from arfusion_pass.dialects import Reduced
from arfusion_pass.dialects.reading.operands import is_row
from arfusion_pass.graph import (
    VIEWS,
    aten,
    constant,
    describe,
    dtype_of,
    is_cast,
    is_written,
    known_contiguous,
    last_dim,
    mutated_arguments,
    other_operand,
    owners,
    path,
    peel,
    prims,
    same_shape,
    statically_equal,
    tensor_of,
    widens,
)
from arfusion_pass.ops.layouts import token_count
from arfusion_pass.rewrite.buffers import SizeSource
from arfusion_pass.rewrite.edits import Edits, meta_of
from arfusion_pass.rewrite.hindrances import (
    Hindrance,
    Kind,
    following,
    linear,
    mergeable,
    narrowed,
    needed_before,
)
from arfusion_pass.rewrite.planning import planned
from arfusion_pass.rewrite.raising import find_hindrance, find_sites, open_site
from arfusion_pass.rewrite.replicated import Reductions, is_row_factor


@dataclasses.dataclass(frozen=True)
class Merged:
    """An all-reduce that went into another one.

    Attributes:
        name, group, dtype: its own.
    """

    name: str
    group: str
    dtype: str


@dataclasses.dataclass
class Moves:
    """What was moved.

    Attributes:
        steps: for each all-reduce, in words.
        merged: for each all-reduce, those that went into it.
        origins: the words for nodes that now stand for a step of the user's graph.
        idle: the all-reduces whose steps stay, as they would not fuse without them either, and why not.
    """

    steps: dict[fx.Node, list[str]] = dataclasses.field(default_factory=dict)
    merged: dict[fx.Node, list[Merged]] = dataclasses.field(default_factory=dict)
    origins: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    idle: dict[fx.Node, str] = dataclasses.field(default_factory=dict)

    def describe(self, step: fx.Node) -> str:
        """A step as the user's graph calls it."""
        return self.origins.get(step, describe(step))

    def add(self, reduced: Reduced, step: fx.Node, kind: Kind) -> None:
        """Note one step of an all-reduce."""
        place = "into what is added next" if kind == Kind.ADDEND else "before the all-reduce"
        self.note(reduced, step, place)

    def note(self, reduced: Reduced, step: fx.Node, place: str) -> None:
        """The same with the place in words; once for each step and place."""
        steps, words = self.steps.setdefault(reduced.node, []), f"{self.describe(step)} {place}"
        if words not in steps:
            steps.append(words)


ROUNDS = 64
"""How often every all-reduce is looked at, and how many steps of one are moved at a time, at most. Models need two and
three."""


def reassociate(edits: Edits, config: FusionConfig) -> Moves:
    """Move every step that hinders an all-reduce of a graph (:class:`arfusion_pass.rewrite.hindrances.Hindrance`) and
    can be moved, and then what stood behind it: of those all-reduces alone that fuse afterwards. What was moved for one
    that does not is taken back, and the others are moved anew without it."""
    allowed, idle = set(edits.graph.nodes), dict[fx.Node, str]()
    while _Mover(edits, config, Moves(), allowed).hindered():
        before = edits.mark()
        moves = _cleared(edits, config, allowed)
        missed = {node: reason for node, reason in _missed(edits.graph, config).items() if node in moves.steps}
        if moves.steps and not missed:
            return dataclasses.replace(moves, idle=idle)
        edits.restore(before)
        if not moves.steps:
            break
        idle |= {node: reason for node, reason in missed.items() if node in allowed}
        allowed -= idle.keys()
    return Moves(idle=idle)


def _missed(graph: fx.Graph, config: FusionConfig) -> dict[fx.Node, str]:
    """The all-reduces of a graph that do not fuse, each with its reason."""
    sites = find_sites(graph, config)
    planned(graph, sites, config)
    return {site.node: site.reason for site in sites if site.reason is not None}


def _cleared(edits: Edits, config: FusionConfig, allowed: set[fx.Node]) -> Moves:
    """Move what hinders those all-reduces of a graph that are ``allowed`` to."""
    moves = Moves()
    for _ in range(ROUNDS):
        if not _Mover(edits, config, moves, allowed).clear():
            break
    return moves


class _Mover:
    """Moves what hinders the ``allowed`` ones of a graph's all-reduces, one after the other."""

    def __init__(self, edits: Edits, config: FusionConfig, moves: Moves, allowed: set[fx.Node]) -> None:
        self.edits, self.config, self.moves = edits, config, moves
        self.reductions = Reductions(filter(None, map(self._reduced, edits.graph.nodes)))
        self.collectives = [node for node in self.reductions.nodes if node in allowed]
        self.waiting: list[fx.Node] = []

    def hindered(self) -> bool:
        """Whether anything hinders any of them."""
        reduced = filter(None, map(self._reduced, self.collectives))
        return any(find_hindrance(each, self.reductions, self.config) is not None for each in reduced)

    def clear(self) -> bool:
        """Move what hinders them; whether anything did. Sums with anything else wait until nothing else moves: by then
        those all-reduces that can be one are one."""
        if sum(self._clear(node, joins=False) for node in self.collectives):
            return True
        return sum(self._clear(node, joins=True) for node in self.waiting) > 0

    def _reduced(self, node: fx.Node) -> Reduced | None:
        """The all-reduce that ``node`` is by now, if it is one that can be fused."""
        site = open_site(node, self.config)
        return None if site is None or site.scatters or site.reason is not None else site.reduced

    def _clear(self, node: fx.Node, joins: bool) -> int:
        """Move what hinders one all-reduce, step after step, sums with what is no all-reduce only if it ``joins``; how
        many steps."""
        reduced, steps = self._reduced(node), 0
        while reduced is not None and steps < ROUNDS:
            hindrance = find_hindrance(reduced, self.reductions, self.config)
            if hindrance is not None and hindrance.kind == Kind.ADDEND and not joins:
                self.waiting.append(node)
                break
            if hindrance is None or not self._move(reduced, hindrance):
                break
            self.reductions.remove(reduced)
            reduced, steps = self._reduced(node), steps + 1
            if reduced is not None:
                self.reductions.add(reduced)
        return steps

    def _move(self, reduced: Reduced, hindrance: Hindrance) -> bool:
        """Move what hinders an all-reduce; whether it could be."""
        if hindrance.kind == Kind.COMPOSITE:
            return self._take_apart(reduced, hindrance.step)
        if hindrance.kind == Kind.ADDEND:
            return self._narrow(reduced, hindrance) or self._join(reduced, hindrance)
        if hindrance.kind == Kind.SUM:
            return self._sum(reduced, hindrance)
        if hindrance.kind == Kind.SCALE:
            return self._scale(reduced, hindrance)
        assert hindrance.other is not None
        first = self._reduced(hindrance.other[0].node)
        if first is None or reduced.node < first.node or _written_between(first, reduced.node):
            return False  # the sum is seen from both: from the later one both inputs exist
        return self._merge(reduced, hindrance, first)

    def _scale(self, reduced: Reduced, hindrance: Hindrance) -> bool:
        """``c * all_reduce(x)`` to ``all_reduce(c * x)``, and so on with the factors behind it."""
        step, operand, x, done = hindrance.step, hindrance.operand, reduced.x, False
        while True:
            factor = other_operand(step, operand)
            if isinstance(factor, fx.Node) and (factor := self._beside(factor, reduced, operand)) is None:
                return done
            if dtype_of(operand) != dtype_of(x):
                x = self._cast(reduced, x, dtype_of(operand))
            args = (factor, x) if step.args[1] is operand else (x, factor)
            scaled = self._cast(reduced, _insert(self.edits, reduced, step.target, args), dtype_of(reduced.x))
            self.edits.replace_input(reduced.node, next(iter(reduced.node.all_input_nodes)), scaled)
            wide = dtype_of(step) != dtype_of(reduced.x)
            self._replace(reduced, step, operand, Kind.SCALE)
            done, behind = True, following(operand)
            if wide or behind is None or linear(*behind, reduced.group, self.reductions) != Kind.SCALE:
                return True
            x, (step, operand) = scaled, behind

    def _cast(self, reduced: Reduced, value: fx.Node, dtype: Any) -> fx.Node:
        """``value`` in a dtype, in front of an all-reduce."""
        if dtype_of(value) == dtype:
            return value
        return _insert(self.edits, reduced, prims.convert_element_type.default, (value, dtype))

    def _beside(self, factor: fx.Node, reduced: Reduced, operand: fx.Node) -> fx.Node | None:
        """A factor of ``operand`` as one of what is reduced, in front of the all-reduce; None where that has other
        rows, or where the factor cannot exist there."""
        x = tensor_of(reduced.x)
        needed = needed_before(factor, operand, reduced)
        if needed is None or x is None:
            return None
        given = tensor_of(factor)
        assert given is not None
        for node in needed:
            self.edits.move_before(reduced.node, node)
        if given.numel() == 1 or not is_row_factor(factor, operand):
            spreads = given.dim() > x.dim()
            return _insert(self.edits, reduced, aten.reshape.default, (factor, [-1])) if spreads else factor
        if same_shape(reduced.x, operand):
            return factor
        return _viewed(self.edits, factor, (*x.shape[:-1], 1), reduced)

    def _sum(self, reduced: Reduced, hindrance: Hindrance) -> bool:
        """``all_reduce(x).view(E, -1, H).sum(0)`` to ``all_reduce(x.view(E, -1, H).sum(0))``."""
        step, operand, x = hindrance.step, hindrance.operand, reduced.x
        between = _between(reduced.value, operand)
        given = [node for each in (*between, step) for node in each.all_input_nodes if node not in between]
        late = any(not node < reduced.node for node in given if node is not reduced.value)
        if late or not same_shape(reduced.value, x):
            return False
        value = x
        for each in (*between, step):
            value = _insert(self.edits, reduced, each.target, (value, *each.args[1:]))
        self.edits.replace_input(reduced.node, x, self._cast(reduced, value, dtype_of(x)))
        for node in reduced.nodes:
            self.edits.set_value(node, step.meta["val"].to(dtype_of(x)))
        self._replace(reduced, step, reduced.value, Kind.SUM)
        for each in reversed(between):
            self.edits.erase(each)
        return True

    def _take_apart(self, reduced: Reduced, step: fx.Node) -> bool:
        """One op for several linear steps to one op for each."""
        self.moves.note(reduced, step, "into its single steps")
        first, *others = step.args

        def emit(target: Any, *args: Any) -> fx.Node:
            node = _insert_before(self.edits, step, target, args, step)
            self.moves.origins[node] = self.moves.describe(step)
            return node

        if step.target is aten.neg.default:
            result = emit(aten.mul.Tensor, first, -1)
        else:
            product, factor = others[0], step.kwargs.get("alpha", step.kwargs.get("value", 1))
            if step.target is aten.addcmul.default:
                product = emit(aten.mul.Tensor, *others)
            elif step.target in (aten.addmm.default, aten.baddbmm.default):
                product = emit(aten.mm.default if step.target is aten.addmm.default else aten.bmm.default, *others)
            elif step.target is aten.sub.Tensor:
                factor = -constant(factor)  # type: ignore[operator,arg-type]
            result = emit(aten.add.Tensor, first, product if factor == 1 else emit(aten.mul.Tensor, product, factor))
        self.edits.replace(step, result)
        self.edits.erase(step)
        return True

    def _narrow(self, reduced: Reduced, hindrance: Hindrance) -> bool:
        """``(all_reduce(x).float() + t).to(bf16)`` to ``all_reduce(x) + t.to(bf16)``."""
        step, value = hindrance.step, peel(hindrance.operand)
        addend, cast = other_operand(step, hindrance.operand), narrowed(step)
        if cast is None or dtype_of(cast) != dtype_of(value) or is_written(addend):
            return False
        wide = addend
        if dtype_of(addend) != dtype_of(value):
            arguments = (addend, dtype_of(value))
            given = self._unwidened(addend, step, dtype_of(value))
            addend = given or _insert_before(self.edits, step, prims.convert_element_type.default, arguments, step)
        total = _insert_before(self.edits, step, aten.add.Tensor, (value, addend), step)
        self.moves.note(reduced, step, f"in {dtype_of(value)}")
        self.moves.origins[total] = self.moves.describe(step)
        self.edits.replace(cast, total)
        for node in (cast, step, *_casts(value, hindrance.operand)):
            if not node.users:
                self.edits.erase(node)
        while not wide.users and (widens(wide) or wide.target in VIEWS):
            unread, wide = wide, wide.args[0]
            self.edits.erase(unread)
        return True

    def _unwidened(self, node: fx.Node, place: fx.Node, dtype: Any) -> fx.Node | None:
        """What ``node`` is the lossless cast of, over views of it, in ``node``'s shape; None if it is none."""
        views: list[fx.Node] = []
        while dtype_of(node) != dtype:
            if not widens(node) and node.target not in VIEWS:
                return None
            views += [] if widens(node) else [node]
            node = node.args[0]  # type: ignore[assignment]
        for view in reversed(views):
            node = _insert_before(self.edits, place, view.target, (node, *view.args[1:]), view)
        return node

    def _merge(self, reduced: Reduced, hindrance: Hindrance, first: Reduced) -> bool:
        """``all_reduce(a) + all_reduce(b)`` to ``all_reduce(a + b)`` in the place of the second."""
        assert hindrance.other is not None
        if not same_shape(hindrance.operand, hindrance.step):
            return False
        a = _shaped_like(self.edits, first, reduced)
        if a is None:
            return False
        total = _insert(self.edits, reduced, aten.add.Tensor, (a, reduced.x))
        self.edits.replace_input(reduced.node, reduced.x, total)
        self._replace(reduced, hindrance.step, hindrance.operand, Kind.MERGE)
        dtype = str(dtype_of(first.x)).removeprefix("torch.")
        gone = [*self.moves.merged.pop(first.node, []), Merged(first.node.name, first.group, dtype)]
        self.moves.merged.setdefault(reduced.node, []).extend(gone)
        earlier = self.moves.steps.pop(first.node, [])
        self.moves.steps[reduced.node] = earlier + self.moves.steps[reduced.node]
        for node in (*reversed(path(first.value, hindrance.other[1])), *reversed(first.nodes)):
            self.edits.erase(node)
        self.reductions.remove(first)
        return True

    def _join(self, reduced: Reduced, hindrance: Hindrance) -> bool:
        """Take ``all_reduce(x) + t`` apart where something linear follows: ``t`` goes behind it."""
        step, operand = hindrance.step, hindrance.operand
        addend, behind = other_operand(step, operand), following(step)
        if behind is None or not same_shape(step, operand) or is_written(addend):
            return False
        reader, view = behind
        kind = linear(reader, view, reduced.group, self.reductions)
        if kind == Kind.COMPOSITE:
            return self._take_apart(reduced, reader)
        if kind is None or reader < addend:
            return False
        if kind == Kind.MERGE and not mergeable(reader, view, self.reductions):
            kind = Kind.ADDEND  # the other all-reduce is the residual
        views = path(step, view)
        if same_shape(addend, step):
            for each in views:
                addend = _insert_before(self.edits, reader, each.target, (addend, *each.args[1:]), each)
        else:
            row = last_dim(step) == last_dim(view) and is_row(addend, last_dim(step))
            spreads = not views and same_shape(reader, step)
            if kind == Kind.SUM or not (row or spreads):
                return False
        if kind in (Kind.SCALE, Kind.SUM):
            args = tuple(addend if each is view else each for each in reader.args)
            moved = _insert_before(self.edits, reader, reader.target, args, reader)
            meta = {**meta_of(reader), "val": reader.meta["val"]}
            total = self.edits.insert_after(reader, aten.add.Tensor, (reader, moved), meta)
            self.edits.replace(reader, total, among=lambda user: user is not total)
            self.moves.note(reduced, step, f"behind {self.moves.describe(reader)}")
            self.moves.origins[total] = self.moves.describe(step)
            self.edits.replace(step, operand)
            self.edits.erase(step)
            return True
        other = other_operand(reader, view)
        if kind == Kind.MERGE:  # the other all-reduce first
            inner = _insert_before(self.edits, reader, aten.add.Tensor, (view, other), reader)
            if not same_shape(inner, reader):
                self.edits.erase(inner)
                return False
            self.edits.set_inputs(reader, (inner, addend), reader.kwargs)
            self.moves.note(reduced, step, f"behind {self.moves.describe(reader)}")
            names = self.moves.describe(reader), self.moves.describe(step)
            self.moves.origins[inner], self.moves.origins[reader] = names
            self.edits.replace(step, operand)
            self.edits.erase(step)
            return True
        joined = _insert_before(self.edits, reader, aten.add.Tensor, (other, addend), reader)
        self.edits.set_inputs(reader, (joined, view), reader.kwargs)
        self._replace(reduced, step, operand, Kind.ADDEND)
        return True

    def _replace(self, reduced: Reduced, step: fx.Node, operand: fx.Node, kind: Kind) -> None:
        """Let the readers of a step read its operand, in the step's dtype."""
        self.moves.add(reduced, step, kind)
        value = operand
        if dtype_of(step) != dtype_of(operand):
            arguments = (operand, dtype_of(step))
            value = _insert_before(self.edits, step, prims.convert_element_type.default, arguments, step)
        self.edits.replace(step, value)
        self.edits.erase(step)
        if widens(value):  # and rounded again
            for cast in [user for user in value.users if is_cast(user, dtype_of(value.args[0]))]:
                self.edits.replace(cast, value.args[0])  # type: ignore[arg-type]
                self.edits.erase(cast)
            if not value.users:
                self.edits.erase(value)


def _between(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The views and lossless casts from ``start`` to ``end``, ``end`` included."""
    nodes: list[fx.Node] = []
    while end is not start:
        nodes.append(end)
        end = end.args[0]  # type: ignore[assignment]
    return tuple(reversed(nodes))


def _casts(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The casts from ``start`` to ``end``, the last one first."""
    return tuple(reversed(_between(start, end)))


def _written_between(first: Reduced, second: fx.Node) -> bool:
    """Whether anybody writes, between two all-reduces, to what the first one reads."""
    read = owners(first.x)
    node = first.node
    while node is not second:
        if any(not read.isdisjoint(owners(written)) for written in mutated_arguments(node)):
            return True
        node = node.next
    return False


def _shaped_like(edits: Edits, first: Reduced, second: Reduced) -> fx.Node | None:
    """The first all-reduce's input as a tensor of the second's shape, in front of the second; None where their rows
    are not the same for sure."""
    if same_shape(first.x, second.x):
        return first.x
    a, b = tensor_of(first.x), tensor_of(second.x)
    if a is None or b is None or not known_contiguous(a) or last_dim(first.x) != last_dim(second.x):
        return None
    if not statically_equal(token_count(a.shape), token_count(b.shape)):
        return None
    return _viewed(edits, first.x, b.shape, second)


def _viewed(edits: Edits, node: fx.Node, shape: Sequence[Any], reduced: Reduced) -> fx.Node | None:
    """``node``, which is contiguous, in a shape with the sizes of what is reduced, in front of the all-reduce; None
    where one of them cannot be read there."""
    order = list(edits.graph.nodes)
    position = {each: index for index, each in enumerate(order)}
    source = SizeSource(order)
    sizes = [source.find(size, position, position[reduced.node] - 1, [reduced.x]) for size in shape]
    if any(size is None for size in sizes):
        return None

    def insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, val: Any = None) -> fx.Node:
        return _insert(edits, reduced, target, args, val)

    emitted = [size.emit(insert) for size in sizes if size is not None]
    return _insert(edits, reduced, aten.reshape.default, (node, emitted), node.meta["val"].reshape(shape))


def _insert(edits: Edits, reduced: Reduced, target: Any, args: tuple[Any, ...], val: Any = None) -> fx.Node:
    """A node in front of an all-reduce, with its metadata; the value by the op itself where it is not given."""
    return _insert_before(edits, reduced.node, target, args, reduced.node, val)


def _insert_before(
    edits: Edits, place: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node, val: Any = None
) -> fx.Node:
    value = val if val is not None else target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
    return edits.insert_before(place, target, args, {**meta_of(like), "val": value})
