"""The one undo log: every change of the user's graph is made here, and can be taken back until all are kept.

with Edits(graph) as edits:        # an exception, or no keep(): the graph is node for node as it came
    made = edits.insert_before(place, aten.add.Tensor, (a, b), meta)
    edits.replace(old, made)
    edits.erase(old)
    edits.keep()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

META_KEYS = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "custom", "original_aten", "from_node")
"""What a node has from the user's code: whatever stands for it takes that over."""


def meta_of(node: fx.Node) -> dict[str, Any]:
    """A node's metadata as that of a node that stands for it; the value is not in it."""
    return {key: node.meta[key] for key in META_KEYS if key in node.meta}


_ERASED = "arfusion_erased"  # in a node's metadata: a target costs four times as much to set, and is looked up by


def is_erased(node: fx.Node) -> bool:
    """Whether a node is erased, for good or until that is taken back."""
    return _ERASED in node.meta


class Edits:
    """Changes to one graph, in the order in which they are made.

    A node that is erased stands in its place until :meth:`keep`. It reads nothing, and nobody reads it: who follows
    the graph's values never meets it, and who goes through its nodes asks :func:`is_erased`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._undo: list[tuple[Any, ...]] = []  # what takes a change back, with its arguments
        self._erased: list[fx.Node] = []
        self._ordered: set[fx.Node] = set()

    def __enter__(self) -> Edits:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def insert_before(self, place: fx.Node, target: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> fx.Node:
        """A new call in front of a node."""
        with self.graph.inserting_before(place):
            return self._insert(target, args, meta)

    def insert_after(
        self, place: fx.Node, target: Any, args: tuple[Any, ...], meta: dict[str, Any], kwargs: Any = None
    ) -> fx.Node:
        """A new call behind a node."""
        with self.graph.inserting_after(place):
            return self._insert(target, args, meta, kwargs)

    def _insert(self, target: Any, args: tuple[Any, ...], meta: dict[str, Any], kwargs: Any = None) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        self._undo.append((self.graph.erase_node, node))
        node.meta.update(meta)
        return node

    def set_inputs(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let a node read other inputs."""
        self._remember_inputs(node)
        _set_inputs(node, args, kwargs)

    def replace_input(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one node read ``new`` where it reads ``old``."""
        self._remember_inputs(node)
        node.replace_input_with(old, new)

    def replace(self, old: fx.Node, new: fx.Node, among: Callable[[fx.Node], bool] | None = None) -> None:
        """Let those who read ``old``, or those ``among`` them, read ``new``."""
        self._remember_inputs(*filter(among, old.users))
        old.replace_all_uses_with(new, delete_user_cb=among)

    def move_before(self, place: fx.Node, node: fx.Node) -> None:
        """Put a node in front of another."""
        self._undo.append((node.prev.append, node))
        place.prepend(node)

    def move_after(self, place: fx.Node, node: fx.Node) -> None:
        """Put a node behind another."""
        self._undo.append((node.prev.append, node))
        place.append(node)

    def set_value(self, node: fx.Node, value: Any) -> None:
        """Let a node stand for another value."""
        self._undo.append((node.meta.__setitem__, "val", node.meta["val"]))
        node.meta["val"] = value

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nobody reads."""
        if node.users:
            raise RuntimeError(f"{node} is read by {', '.join(map(str, node.users))}, and would be erased")
        self._remember_orders(node)
        self._undo.append((self._revive, node.args, node.kwargs))
        self._erased.append(node)
        node.meta[_ERASED] = True
        _set_inputs(node, (), {})

    def mark(self) -> int:
        """The place in the log that :meth:`restore` goes back to."""
        self._ordered.clear()
        return len(self._undo)

    def restore(self, mark: int = 0) -> None:
        """Take back all changes since a mark, the last one first: the graph is node for node as it was then."""
        while len(self._undo) > mark:
            undo, *arguments = self._undo.pop()
            undo(*arguments)
        self._ordered.clear()

    def keep(self) -> None:
        """Leave the graph as it now is: nothing can be taken back any more, and what was erased goes."""
        self._undo.clear()
        while self._erased:
            self.graph.erase_node(self._erased.pop())

    def _remember_inputs(self, *nodes: fx.Node) -> None:
        self._remember_orders(*nodes)
        self._undo += [(_set_inputs, node, node.args, node.kwargs) for node in nodes]

    def _remember_orders(self, *nodes: fx.Node) -> None:
        """The order in which others read what ``nodes`` read: a reader that is given back would come last."""
        for node in nodes:
            for read in node.all_input_nodes:
                if len(read.users) > 1 and read not in self._ordered:
                    self._ordered.add(read)
                    self._undo.append((_order_users, read, tuple(read.users)))

    def _revive(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        node = self._erased.pop()
        del node.meta[_ERASED]
        _set_inputs(node, args, kwargs)


def _set_inputs(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    node.args = args
    if node.kwargs != kwargs:  # each costs as much as all the rest of an edit
        node.kwargs = kwargs


def _order_users(node: fx.Node, users: tuple[fx.Node, ...]) -> None:
    node.users.clear()
    node.users.update(dict.fromkeys(users))
