"""SGLang plug-in: with this package installed, SGLang's compiled graphs fuse with our pass; nothing else to do.

Entry point ``arfusion`` of the group ``sglang.srt.plugins``, called in every process. :func:`register` puts the pass

* into Inductor's global config, behind a pass that is there already: ``--enable-torch-compile``;
* into every ``PostGradPassManager`` that SGLang makes: its piecewise graphs, with the compiler ``inductor`` (0.5.17).

With Triton attention SGLang's own functions break the first's graphs in every layer: no all-reduce meets its norm
(``docs/sglang.md``).

SGLang makes its process groups later: :mod:`arfusion_pass.groups` asks its table whenever a name is looked up. Off:
``ARFUSION_SGLANG=0``, or an ``SGLANG_PLUGINS`` that does not name ``arfusion``.

Both ways SGLang loads compiled graphs from Inductor's cache alone, whose key holds our ``uuid`` (it writes a table of
its own too, ``sglang_compile_cache.py``, and never loads by it): a run with the plug-in and one without share nothing.

Without torch.compile SGLang calls FlashInfer's fused kernel from its norms, with
``--flashinfer-allreduce-fusion-backend auto`` and in models of its choice. :func:`replace_flashinfer`, or
``ARFUSION_SGLANG_COMM=1``, makes those calls run on our kernels.

What is wrapped or replaced is so when SGLang imports it: its processes without a GPU import nothing of it.

Tested with SGLang 0.5.17 and 0.5.23 on CPU: the plug-in, the pass manager, its norms, its all-reduces and its call
of FlashInfer's API on gloo. On two GPUs 0.5.17 has served with :func:`replace_flashinfer`, and compiled with nothing to
fuse (``benchmarks/results/engines.md``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from typing import Any

import torch.distributed as dist
from torch import fx
from torch._inductor import config as inductor_config

from arfusion_pass import groups
from arfusion_pass.config import FusionConfig, switch
from arfusion_pass.engines.groups import coordinators
from arfusion_pass.engines.starting import after_import, harmless
from arfusion_pass.fusion_pass import AllReduceFusionPass
from arfusion_pass.install import HOOK, chained

log = logging.getLogger("arfusion_pass")

MANAGERS = "sglang.srt.compilation.pass_manager"
CALLS = "sglang.srt.layers.flashinfer_comm_fusion"


def register() -> None:
    """What the entry point calls. Calling it again changes nothing that counts."""
    if not switch("ARFUSION_SGLANG", True):
        return
    harmless("SGLang's compiled graphs", enable)
    if switch("ARFUSION_SGLANG_COMM", False):
        engine = "SGLang's calls of FlashInfer"
        harmless(engine, lambda: after_import(CALLS, engine, replace_flashinfer))


def enable(config: FusionConfig | None = None) -> AllReduceFusionPass:
    """Install the pass for everything that this process compiles from now on; a second call replaces the first's."""
    groups.add_source(sglang_groups)
    fusion = AllReduceFusionPass(config)
    setattr(inductor_config, HOOK, chained(getattr(inductor_config, HOOK), fusion))
    with contextlib.suppress(ModuleNotFoundError):  # an SGLang without piecewise graphs, or none
        after_import(MANAGERS, "SGLang's piecewise graphs", lambda: _wrap_pass_managers(fusion))
    return fusion


def _wrap_pass_managers(fusion: AllReduceFusionPass) -> None:
    manager = importlib.import_module(MANAGERS).PostGradPassManager
    init = getattr(manager.__init__, "arfusion", manager.__init__)

    @functools.wraps(init)
    def init_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        harmless("SGLang's piecewise graphs", lambda: install(self, fusion))

    init_with_arfusion.arfusion = init  # type: ignore[attr-defined]
    manager.__init__ = init_with_arfusion


def install(manager: Any, fusion: AllReduceFusionPass) -> None:
    """Put ``fusion`` into one ``PostGradPassManager``, behind what it has."""
    from sglang.srt.compilation.inductor_pass import InductorPass

    class ArFusionPass(InductorPass):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph) -> None:
            fusion(graph)

        def uuid(self) -> Any:
            return fusion.uuid()

    manager.add(ArFusionPass())


def replace_flashinfer() -> None:
    """Let SGLang's calls of FlashInfer's ``allreduce_fusion`` run on our kernels, from its next workspace on.

    Where SGLang makes those calls at all it decides as before. Call it before the first of them.
    """
    from arfusion_pass import comm

    def create_workspace(use_fp32_lamport: bool = False, **arguments: Any) -> comm.AllReduceFusionWorkspace:
        workspace = comm.create_allreduce_fusion_workspace(**arguments)  # 0.5.23 says the other for fp32, to nobody
        level = logging.DEBUG if workspace.rank else logging.INFO
        log.log(level, "arfusion: SGLang's fused all-reduces run here, not in FlashInfer: %r", workspace)
        return workspace

    theirs = importlib.import_module(CALLS)
    replaced = {
        "_flashinfer_comm": comm,
        "_create_allreduce_fusion_workspace": create_workspace,
        "_flashinfer_allreduce_unavailable": False,
        "_flashinfer_create_workspace_supports_group": True,
        "_flashinfer_create_workspace_supports_comm_backend": False,
        "_flashinfer_allreduce_supports_trigger_completion": True,
        "_preflight_check_workspace_memory": lambda **sizes: True,  # probes FlashInfer's allocations; ours are voted on
    }
    missing = [name for name in replaced if not hasattr(theirs, name)]
    if missing:
        raise RuntimeError(
            f"replace_flashinfer: this SGLang has no {', '.join(missing)}: its calls are left to FlashInfer"
        )
    for name, value in replaced.items():
        setattr(theirs, name, value)


def sglang_groups() -> dict[str, dist.ProcessGroup]:
    """SGLang's groups under SGLang's names, those that exist now."""
    return coordinators("sglang.srt.distributed.parallel_state")
