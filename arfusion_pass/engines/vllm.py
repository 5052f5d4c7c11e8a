"""vLLM plug-in: with this package installed, vLLM fuses with our pass; nothing else to do.

Entry point ``arfusion`` of the group ``vllm.general_plugins``, called in every process. :func:`register` wraps
``PostGradPassManager.configure``, so that each pass manager gets our pass in front of vLLM's own fusions: behind the
passes that only canonicalise, before ``AllReduceFusionPass`` and ``RMSNormQuantFusionPass``, and so before vLLM lowers
its IR. vLLM builds a pass manager in every process, cached compilation or not: that is also where the groups are
registered, by which a cached graph finds them.

Off: ``ARFUSION_VLLM=0``, or a ``VLLM_PLUGINS`` that does not name ``arfusion``. vLLM's own all-reduce fusion finds
nothing left to fuse, but allocates its workspace; ``--compilation-config '{"pass_config": {"fuse_allreduce_rms":
false}}'`` saves that.

Tested with vLLM 0.32 on CPU: the plug-in, the pass manager, its IR ops and its all-reduce on gloo. Not tested: a whole
engine, and any GPU.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from torch import fx

from arfusion_pass.config import FusionConfig
from arfusion_pass.engines.groups import register_coordinators
from arfusion_pass.fusion_pass import AllReduceFusionPass

CANONICALISING = ("NoOpEliminationPass", "AddRMSNormFusionPass")
"""vLLM's passes that run before ours: they make graphs easier to read and fuse no collective."""


def register() -> None:
    """Let every pass manager that vLLM makes from now on run our pass. Calling it again changes nothing."""
    if os.environ.get("ARFUSION_VLLM", "1") == "0":
        return
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    configure = PostGradPassManager.configure
    if getattr(configure, "arfusion", False):
        return

    @functools.wraps(configure)
    def configure_with_arfusion(self: Any, config: Any) -> None:
        configure(self, config)
        install(self)

    configure_with_arfusion.arfusion = True  # type: ignore[attr-defined]
    PostGradPassManager.configure = configure_with_arfusion


def install(manager: Any, config: FusionConfig | None = None) -> AllReduceFusionPass:
    """Put our pass into one ``PostGradPassManager``, and register vLLM's groups; gives the pass, for its reports."""
    register_groups()
    adapter = _adapter(config)
    passes = manager.passes
    passes[:] = [
        existing for existing in passes if not isinstance(getattr(existing, "fusion", None), AllReduceFusionPass)
    ]
    first = next((i for i, each in enumerate(passes) if type(each).__name__ not in CANONICALISING), len(passes))
    passes.insert(first, adapter)
    return adapter.fusion


def register_groups() -> list[str]:
    """Register vLLM's groups under vLLM's names; gives the names."""
    from vllm.distributed import parallel_state

    return register_coordinators(parallel_state)


def _adapter(config: FusionConfig | None) -> Any:
    """Our pass as one of vLLM's ``InductorPass``: it runs for every compile range."""
    from vllm.compilation.passes.inductor_pass import InductorPass

    class ArFusionPass(InductorPass):  # type: ignore[misc]
        fusion = AllReduceFusionPass(config)

        def __call__(self, graph: fx.Graph) -> None:
            register_groups()
            self.fusion(graph)

        def uuid(self) -> Any:
            register_groups()  # their sizes are part of the key
            return self.fusion.uuid()

        def is_applicable_for_range(self, compile_range: Any) -> bool:
            return True

    return ArFusionPass()
