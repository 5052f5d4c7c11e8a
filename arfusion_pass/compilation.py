"""What torch is compiling right now: its name, where its graph ends, and a key for the same graph in a later process.

The one file that asks Dynamo's private state. Whatever a torch version does not tell is None; nothing here raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx
from torch._guards import CompileContext

from arfusion_pass.source import Source, path_of, users_frame

log = logging.getLogger("arfusion_pass")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph before the function ended.

    Attributes:
        reason: its first line in Dynamo's words.
        source: the user's line that could not be traced, or None.
    """

    reason: str
    source: Source | None = None

    def __str__(self) -> str:
        return f"{self.source or 'an unknown line'} ({self.reason})"


def known(find: Callable[[], T | None]) -> T | None:
    """What ``find`` gives, or None where it fails."""
    try:
        return find()
    except Exception:
        log.debug("arfusion: not known", exc_info=True)
        return None


def compile_id() -> str | None:
    """The compilation that torch is in, as its logs call it (``"0/0"``); None outside of one."""
    current = known(CompileContext.current_compile_id)
    return None if current is None else str(current)


def graph_break() -> GraphBreak | None:
    """The graph break at which the graph that Dynamo is compiling ends; None where it ends with its function."""
    return known(_graph_break) if compile_id() is not None else None


def runs_as_part(graph: fx.Graph) -> fx.Node | None:
    """What runs ``graph`` as a part of the graph that Inductor is compiling, as ``torch.cond`` does its branches; None
    for the whole of it."""
    part, node = _part.get()
    return node if part is graph else known(lambda: _runs_as_part(graph))


_part: contextvars.ContextVar[tuple[fx.Graph | None, fx.Node | None]] = contextvars.ContextVar(
    "arfusion_part", default=(None, None)
)


@contextlib.contextmanager
def running_part(graph: fx.Graph, node: fx.Node) -> Iterator[None]:
    """Inside, ``graph`` is known as what ``node`` runs, without Inductor."""
    token = _part.set((graph, node))
    try:
        yield
    finally:
        _part.reset(token)


def inference_leaf() -> str | None:
    """An input of the graph that Dynamo is compiling that was made under ``torch.inference_mode()``, where the graph is
    not compiled under it: its path (``"norm.weight"``), or None."""
    return known(_inference_leaf) if compile_id() is not None else None


def breaks_at_collectives() -> list[str]:
    """Where the graph that Dynamo is compiling goes on after a graph break: this process' breaks at collectives, in its
    words."""
    return _met("graph_break") if known(_resumes) else []


def raised_at_collectives() -> list[str]:
    """While Dynamo compiles: what it raised at collectives in this process, for which it left functions to Python."""
    if compile_id() is None:
        return []
    return [
        found[1].removesuffix(".") for reason in _met("unimplemented", first=False) if (found := _RAISED.search(reason))
    ]


def _met(counter: str, first: bool = True) -> list[str]:
    """Dynamo's reasons that speak of collectives, each whole or its first line."""
    reasons = known(lambda: list(torch._dynamo.utils.counters[counter])) or []
    reasons = [reason.strip().splitlines()[0] if first else reason for reason in reasons if _COLLECTIVE.search(reason)]
    return [*dict.fromkeys(reasons)]


_COLLECTIVE = re.compile(
    r"collective|all_?reduce|reduce_?scatter|all_?gather|process_?group|c10d|async_op|torch\.distributed", re.I
)
_RAISED = re.compile(r"raised exception \w+\(['\"](.*)['\"]\)")


def graph_key(*parts: Any) -> str | None:
    """A hash of the graph that Dynamo is compiling and of ``parts``: the same in every process that compiles the same.

    None outside of Dynamo (vLLM loads its graphs without it).
    """
    if compile_id() is None:
        return None
    return known(lambda: _graph_key(_output().graph, parts, torch.is_grad_enabled()))


def inner_key(*parts: Any) -> str | None:
    """The same for the graph behind AOT autograd that Inductor's cache is asking for, None where it is asking for none:
    different ones of Dynamo's come to an equal one (with and without checkpoints, frozen or under ``no_grad``)."""
    return known(lambda: _inner_key(parts))


def on_compile_end(callback: Callable[[], None]) -> None:
    """Call ``callback`` after every compilation, also one that a cache answered.

    Asking again changes nothing, but after ``torch._dynamo.reset()``, which forgets all callbacks: ask anew in each
    compilation.
    """
    call = _at_end.setdefault(callback, lambda *_: known(callback))

    def register() -> None:
        from torch._dynamo.callback import callback_handler

        if call not in callback_handler.end_callbacks:
            callback_handler.register_end_callback(call)

    known(register)


_at_end: dict[Callable[[], None], Callable[..., Any]] = {}


def _output() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output


def _resumes() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().f_code.co_name.startswith("torch_dynamo_resume_in")


def _graph_break() -> GraphBreak | None:
    reason = _output().compile_subgraph_reason
    if reason is None or not reason.graph_break:
        return None
    stack = [Source(frame.filename, frame.lineno or 0, frame.line or "", frame.name) for frame in reason.user_stack]
    return GraphBreak(reason.reason.strip().splitlines()[0], users_frame(stack))


def _runs_as_part(graph: fx.Graph) -> fx.Node | None:
    # Inductor hands over the parts of a graph before the graph, and nothing in a part leads to what it is a part of.
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        module = frame.f_locals.get("gm") if frame.f_code.co_name == "_recursive_post_grad_passes" else None
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="get_attr"):
                if getattr(getattr(module, node.target, None), "graph", None) is graph:
                    return next(iter(node.users), None)
    return None


def _inference_leaf() -> str | None:
    if torch.is_inference_mode_enabled():
        return None
    for node in _output().graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        example = getattr(argument, "example", None)
        if isinstance(example, torch.Tensor) and example.is_inference():
            name = argument.source.name
            return path_of(name if isinstance(name, str) else name()) or node.name
    return None


def _inner_key(parts: tuple[Any, ...]) -> str | None:
    # The cache asks a pass for its key while it gathers what it hashes, and hands the graph over nowhere.
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name == "__init__" and type(frame.f_locals.get("self")).__name__ == "FxGraphHashDetails":
            module = frame.f_locals["gm"]
            codes = [part.code for part in module.modules() if isinstance(part, fx.GraphModule)]  # with its regions'
            return _graph_key(module.graph, parts, codes)
    return None


def _graph_key(graph: fx.Graph, *parts: Any) -> str:
    digest = hashlib.sha256(repr((parts, torch.__version__)).encode())
    for node in graph.nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        tensor = isinstance(value, torch.Tensor)
        shape = (value.dtype, value.shape, value.requires_grad, value.device) if tensor else value  # type: ignore[union-attr]
        line = f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {shape}"
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", line).encode())
    return digest.hexdigest()
