"""Ways to switch the pass on for ``torch.compile``: an options dict, or a context."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Iterator
from typing import Any

import torch._inductor
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from arfusion_pass.config import FusionConfig
from arfusion_pass.fusion_pass import AllReduceFusionPass, given_config

try:
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass
except ImportError:

    class CustomInferenceAwareGraphPass(CustomGraphPass):  # type: ignore[no-redef]
        """Torch 2.11 has no such kind of pass: nobody's is one."""


HOOK = "post_grad_custom_post_pass"


class PassChain(CustomGraphPass):
    """Runs several graph passes in order; torch 2.11 takes no list of them.

    Its ``uuid`` is that of all members, or None (no caching) if one of them has none.
    """

    def __init__(self, *passes: Callable[..., None]) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for member in self.passes:
            member(graph)

    def uuid(self) -> Any:
        keys = [member.uuid() if isinstance(member, CustomGraphPass) else None for member in self.passes]
        return tuple(keys) if all(keys) else None


class InferenceAwarePassChain(PassChain, CustomInferenceAwareGraphPass):
    """The same with members that want to know whether the graph is for inference: torch tells this chain, as one of
    their kind, and the chain tells them."""

    def __call__(self, graph: fx.Graph, is_inference: bool = True) -> None:
        for member in self.passes:
            if isinstance(member, CustomInferenceAwareGraphPass):
                member(graph, is_inference=is_inference)  # by keyword, as torch calls it
            else:
                member(graph)


def chained(existing: Any, fusion: AllReduceFusionPass) -> Any:
    """``fusion`` behind whatever is installed already: nothing, a pass of any of torch's kinds, a callable, a list."""
    members = list(existing) if isinstance(existing, (list, tuple)) else [existing]
    flat = [inner for member in members for inner in (member.passes if isinstance(member, PassChain) else (member,))]
    flat = [member for member in flat if member is not None and not isinstance(member, AllReduceFusionPass)]
    if not flat:
        return fusion
    aware = any(isinstance(member, CustomInferenceAwareGraphPass) for member in flat)
    return (InferenceAwarePassChain if aware else PassChain)(*flat, fusion)


def inductor_options(config: FusionConfig | None = None, *, mode: str | None = None, **options: Any) -> dict[str, Any]:
    """Options for ``torch.compile(model, options=...)`` that switch the pass on.

    Args:
        config: settings of the pass; the defaults if None.
        mode: one of torch.compile's modes, expanded here because torch takes no ``mode`` beside ``options``.
        **options: further Inductor options. A pass given here, or installed globally, keeps running, before ours.

    Raises:
        ValueError: on an unknown mode, an option that Inductor does not have, or a ``config`` that is no FusionConfig.
    """
    if isinstance(config, str):
        raise ValueError(
            f"inductor_options: expected a FusionConfig, got {config!r}; a mode is given as mode={config!r}"
        )
    _check_options(options)
    fusion = AllReduceFusionPass(given_config("inductor_options", config))
    expanded: dict[str, Any] = {}
    if mode is not None and mode != "default":
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise ValueError(f"inductor_options: unknown mode {mode!r}; torch.compile knows {sorted(modes)}")
        expanded.update(modes[mode])
    expanded.update(options)
    existing = expanded.get(HOOK, getattr(inductor_config, HOOK))
    expanded[HOOK] = chained(existing, fusion)
    return expanded


def _check_options(options: dict[str, Any]) -> None:
    """Torch answers an unknown option with a list of all 600; a FusionConfig field among them is the likely mistake."""
    fields = {field.name for field in dataclasses.fields(FusionConfig)}
    known = torch._inductor.list_options()
    for name, value in options.items():
        if name in fields:
            raise ValueError(
                f"inductor_options: {name} is a setting of the pass: inductor_options(FusionConfig({name}={value!r}))"
            )
        if name.replace("-", "_") not in known:
            close = difflib.get_close_matches(name, known, 3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise ValueError(f"inductor_options: Inductor has no option {name!r}{hint}")


@contextlib.contextmanager
def enable(config: FusionConfig | None = None) -> Iterator[AllReduceFusionPass]:
    """Everything that Inductor compiles inside the context is fused; a pass installed before keeps running. (One in the
    ``options`` of a ``torch.compile`` replaces what is installed, as torch has it: give that call
    :func:`inductor_options`.)

    ``torch.compile`` compiles at the first call, which must be inside. The context is the own one of the thread and the
    process that enter it: spawned children and worker threads do not see it (they enter one, or take
    :func:`inductor_options`).

    Yields:
        the pass, with its reports.
    """
    fusion = AllReduceFusionPass(given_config("enable", config))
    with inductor_config.patch({HOOK: chained(getattr(inductor_config, HOOK), fusion)}):
        yield fusion
