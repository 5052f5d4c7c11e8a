"""What torch is compiling right now: its name, where its graph ends, and a key for the same graph in a later process.

The one file that asks Dynamo's private state. Whatever a torch version does not tell is None; nothing here raises.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
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


def inference_leaf() -> str | None:
    """An input of the graph that Dynamo is compiling that was made under ``torch.inference_mode()``, where the graph is
    not compiled under it: its path (``"norm.weight"``), or None."""
    return known(_inference_leaf) if compile_id() is not None else None


def breaks_at_collectives() -> list[str]:
    """What this process' compilations met at collectives, in Dynamo's words: where the graph that it is compiling goes
    on after a graph break, the breaks; else what it raised there, for which it left whole functions to Python."""
    resumes = known(_resumes)
    counted = known(lambda: list(torch._dynamo.utils.counters["graph_break" if resumes else "unimplemented"])) or []
    reasons = counted if resumes else [found[1] for reason in counted if (found := _RAISED.search(reason))]
    return [*dict.fromkeys(reason.strip().splitlines()[0] for reason in reasons if _COLLECTIVE.search(reason))]


_COLLECTIVE = re.compile(
    r"collective|all_?reduce|reduce_?scatter|all_?gather|process_?group|c10d|async_op|torch\.distributed", re.I
)
_RAISED = re.compile(r"raised exception \w+\(['\"](.*)['\"]\)")


def graph_key(*parts: Any) -> str | None:
    """A hash of the graph that Dynamo is compiling and of ``parts``: the same in every process that compiles the same.

    None outside of Dynamo (vLLM loads its graphs without it).
    """
    return known(lambda: _graph_key(parts)) if compile_id() is not None else None


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


def _graph_key(parts: tuple[Any, ...]) -> str:
    digest = hashlib.sha256(repr((parts, torch.__version__, torch.is_grad_enabled())).encode())
    for node in _output().graph.nodes:
        value = node.meta.get("example_value")
        tensor = isinstance(value, torch.Tensor)
        shape = (value.dtype, value.shape, value.requires_grad, value.device) if tensor else value  # type: ignore[union-attr]
        line = f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {shape}"
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", line).encode())
    return digest.hexdigest()
