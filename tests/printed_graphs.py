"""Reads printed post-grad graphs (``tests/graphs``) back into FX graphs with fake tensors.

A line is ``%name [op] target(args, kwargs)  -> dtype[shape]  users=N``; sizes such as ``s27`` become symbols.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

_LINE = re.compile(r"\s*%(\w+) \[(\w+)\] ([\w.]+)\((.*)\)  -> (.*)  users=\d+$")
_NAMED = re.compile(r"(\w+)=(.*)$")
HINT = 8
"""What symbolic sizes stand for."""


class PrintedGraph:
    """One printed graph."""

    def __init__(self, text: str) -> None:
        self.shape_env = ShapeEnv()
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env)
        self.symbols: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        for line in text.splitlines():
            if line.strip().startswith("return "):
                returned = line.strip().removeprefix("return ").strip()
                inner = returned[1:-1] if returned.startswith("(") else returned
                self.graph.output(tuple(self._argument(argument) for argument in _split(inner)))
            elif match := _LINE.match(line):
                self._add(*match.groups())

    def module(self) -> fx.GraphModule:
        """The graph under a module."""
        self.graph.lint()
        return fx.GraphModule(torch.nn.Module(), self.graph)

    def _add(self, name: str, op: str, target: str, arguments: str, value: str) -> None:
        if op in ("placehold", "get_attr"):
            node = self.graph.placeholder(name)
        else:
            args: list[Any] = []
            kwargs: dict[str, Any] = {}
            for index, argument in enumerate(_split(arguments)):
                if named := _NAMED.match(argument):
                    kwargs[named[1]] = named[2] if _is_string(target, named[1]) else self._argument(named[2])
                elif target.startswith("auto_functionalized") and index == 0:
                    args.append(_overload(argument))
                else:
                    args.append(argument if _is_string(target, index) else self._argument(argument))
            node = self.graph.create_node("call_function", _target(target), tuple(args), kwargs, name=name)
        node.meta["val"] = self._value(value.strip())
        self.nodes[name] = node

    def _argument(self, text: str) -> Any:
        if text in self.nodes:
            return self.nodes[text]
        if text.startswith("["):
            return [self._argument(inner) for inner in _split(text[1:-1])]
        if text.startswith("("):
            return tuple(self._argument(inner) for inner in _split(text[1:-1]))
        if text.startswith("torch."):
            return getattr(torch, text.removeprefix("torch."))
        if text in ("True", "False", "None"):
            return {"True": True, "False": False, "None": None}[text]
        if text == "cpu":
            return torch.device("cpu")
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
        return text

    def _value(self, text: str) -> Any:
        if text.startswith("("):
            return tuple(None if inner == "None" else self._value(inner) for inner in _split(text[1:-1]))
        if text.startswith("SymInt:"):
            return self._size(text.removeprefix("SymInt:"))
        if match := re.match(r"(\w+)\[(.*)\]$", text):
            shape = [self._size(size) for size in _split(match[2])]
            with self.fake_mode:
                return torch.empty(shape, dtype=getattr(torch, match[1]))
        return None

    def _size(self, text: str) -> Any:
        if text.isdigit():
            return int(text)
        for name in re.findall(r"s\d+", text):
            if name not in self.symbols:
                source = ConstantSource(name)
                symbol = self.shape_env.create_symbol(HINT, source=source, dynamic_dim=DimDynamic.DYNAMIC)
                self.symbols[name] = self.shape_env.create_symintnode(symbol, hint=HINT, source=source)
        return eval(text, {"__builtins__": {}}, self.symbols)


def _split(text: str) -> list[str]:
    """``text`` at its top-level commas."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _overload(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _is_string(target: str, argument: int | str) -> bool:
    """Whether an op's argument, by position or name, is a string: a group's name may look like a number."""
    schema = getattr(_target(target), "_schema", None)
    parameters = () if schema is None else schema.arguments
    text = ("reduce_op", "group_name")  # torch 2.13 takes a ProcessGroup, too: their type says nothing
    return any(argument in (index, each.name) and each.name in text for index, each in enumerate(parameters))


def _target(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    if name.startswith("auto_functionalized"):
        return getattr(torch.ops.higher_order, name)
    return _overload(name) if "." in name else getattr(operator, name)
