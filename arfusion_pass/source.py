"""Where in the user's program a node of a graph comes from: its line of code and its module, as Dynamo recorded them.

A post-grad node carries ``meta["stack_trace"]``, a formatted traceback, innermost frame last::

    File "model.py", line 21, in forward
      x, r = layer(x, r)
    File "model.py", line 10, in forward
      dist.all_reduce(y)
    File ".../torch/distributed/_functional_collectives.py", line 179, in all_reduce
      tensor = torch.ops._c10d_functional.all_reduce(

and ``meta["nn_module_stack"]``, from the outermost module to the innermost: ``{id: ("L['self'].layers.0", class)}``.
A graph that Dynamo did not trace has neither.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sysconfig
from typing import Any

import torch
from torch import fx

CODE_WIDTH = 80
"""A line of code is cut to so many characters where it is quoted in a sentence."""

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>.*))?$')
_PLUMBING = (
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    "/accelerate/hooks.py",
    "/sglang/srt/distributed/",
    "/transformers/integrations/",
    "/typing_extensions.py",
    "/vllm/distributed/",
    "/vllm/ir/",
    "/vllm/model_executor/custom_op.py",
    "/vllm/model_executor/parameter.py",
)
"""Frames of files with one of these in their path carry an all-reduce out for somebody: the caller is what to show."""
_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
"""Python's own files, and below it others' packages."""
_OWN_MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo") + os.sep
"""The one folder of the package that holds a model."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A line of the user's program.

    Attributes:
        file: its path.
        line: its number, from 1.
        code: the line itself without indentation; empty where the file could not be read.
        function: the function that it is in.
    """

    file: str
    line: int
    code: str = ""
    function: str = ""

    def __str__(self) -> str:
        """``model.py:10 "return y + self.bias"``."""
        return f'{self.place} "{_cut(self.code)}"' if self.code else self.place

    @property
    def place(self) -> str:
        """``model.py:10``."""
        return f"{os.path.basename(self.file)}:{self.line}"


def frames(trace: Any) -> list[Source]:
    """The frames of a formatted traceback, outermost first; of anything else, none."""
    found: list[Source] = []
    lines = trace.splitlines() if isinstance(trace, str) else []
    for number, line in enumerate(lines):
        match = _FRAME.match(line)
        if match is not None:
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            code = "" if _FRAME.match(code) else code
            found.append(Source(match["file"], int(match["line"]), code, match["function"] or ""))
    return found


def users_frame(stack: list[Source]) -> Source | None:
    """The innermost frame that is the model's own; the innermost of all where every one is plumbing."""
    own = [frame for frame in stack if not _is_plumbing(frame.file)]
    found = own or stack
    return found[-1] if found else None


def _is_plumbing(file: str) -> bool:
    """Whether what is done there is done for the file that called it: Python's, torch's, this package's."""
    if file.startswith(_OWN_MODELS):
        return False
    python = file.startswith(_LIBRARY) and not {"site-packages", "dist-packages"} & set(file.split(os.sep))
    return python or any(part in file for part in _PLUMBING)


def line_of(node: Any) -> Source | None:
    """The user's line that a node was traced from, or None."""
    return users_frame(frames(node.meta.get("stack_trace"))) if isinstance(node, fx.Node) else None


def module_of(node: Any) -> str | None:
    """The path of the innermost module that a node was traced in, such as ``"layers.0.mlp"``; None outside of any."""
    stack = node.meta.get("nn_module_stack") if isinstance(node, fx.Node) else None
    if not isinstance(stack, dict) or not stack:
        return None
    entry = list(stack.values())[-1]
    return path_of(str(entry[0] if isinstance(entry, (tuple, list)) else entry))


def path_of(name: str) -> str | None:
    """Dynamo's name of a value in a module, ``"L['self']._modules['norm'].weight"``, as ``"norm.weight"``; one that it
    found behind a method, ``"mlp.forward.__self__.down"``, as ``"mlp.down"``."""
    path = re.sub(r"^L\[['\"](?:(?:args|kwargs)['\"]\]\[[^\]]*|\w+['\"])\]", "", name)  # L['self'], L['args'][0]
    path = re.sub(r"(?:\._(?:modules|parameters|buffers))?\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    path = re.sub(r"\.\w+\.__self__", "", path)
    return path.strip(".") or None


def _cut(code: str) -> str:
    return code if len(code) <= CODE_WIDTH else code[: CODE_WIDTH - 3] + "..."
