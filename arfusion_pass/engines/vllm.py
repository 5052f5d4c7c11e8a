"""vLLM plug-in: with this package installed, vLLM fuses with our pass; nothing else to do.

Entry point ``arfusion`` of the group ``vllm.general_plugins``, called in every process. :func:`register` wraps

* ``PostGradPassManager.configure``, so that each pass manager gets our pass in front of vLLM's own fusions: behind the
  passes that only canonicalise and those of sequence parallelism, before ``AllReduceFusionPass`` and
  ``RMSNormQuantFusionPass``, and so before vLLM lowers its IR;
* ``VllmConfig.compute_hash``, the one key of all of vLLM's caches: compiled graphs, AOT and "mega" artefacts, memory
  plans. vLLM loads them by that key and a graph's index, without asking its passes. With our key in it a run with the
  plug-in, one without it and one of another version never see each other's;
* ``VllmBackend``, which takes a cache folder that the user names as it is: there our graphs get one of their own;
* what compiles, writes and loads graphs, so that a start from these caches reports what was fused in them
  (:mod:`arfusion_pass.engines.vllm_reports`);

and tells :mod:`arfusion_pass.groups` where vLLM keeps its groups: a graph from a cache may be the first to need one.

Nothing of this may stop the engine: a vLLM that lacks what is wrapped, or settings that cannot be read, are one line in
its log, and nothing fuses. So is a configuration that compiles nothing.

Off: ``ARFUSION_VLLM=0``, or a ``VLLM_PLUGINS`` that does not name ``arfusion``; vLLM's key is then its own. vLLM's own
all-reduce fusion finds nothing left to fuse, but allocates its workspace; ``--compilation-config '{"pass_config":
{"fuse_allreduce_rms": false}}'`` saves that.

Models that vLLM 0.33 does not compile call FlashInfer's fused kernel from their layers. ``ARFUSION_VLLM_COMM=1``, or
:func:`arfusion_pass.engines.vllm_comm.replace_flashinfer`, makes those calls run on our kernels.

Nothing here depends on vLLM's version from 0.26 to 0.33; what differs between its ops is in
:mod:`arfusion_pass.dialects.vllm`. Tested: 0.26.0 on two H100s, 0.33.0 on CPU
(``benchmarks/results/engines.md``, ``tests/engines``).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import fx

from arfusion_pass import cache_key, groups
from arfusion_pass.compilation import known
from arfusion_pass.config import FusionConfig, switch
from arfusion_pass.engines import vllm_reports
from arfusion_pass.engines.groups import coordinators
from arfusion_pass.engines.starting import harmless
from arfusion_pass.engines.vllm_comm import replace_flashinfer
from arfusion_pass.fusion_pass import AllReduceFusionPass
from arfusion_pass.publishing import speak_through

log = logging.getLogger("arfusion_pass")
T = TypeVar("T")

BEFORE_OURS = ("NoOpEliminationPass", "AddRMSNormFusionPass", "SequenceParallelismPass", "AsyncTPPass")
"""vLLM's passes that run before ours. Two make graphs easier to read and fuse no collective. Two are those of
``enable_sp`` (0.26 has them, 0.32 not): vLLM then takes the residual between two pipeline stages for sharded, which it
is only where its pass has rewritten the all-reduces."""


@functools.cache
def settings() -> FusionConfig:
    """The plug-in's settings: the pass's, and so part of vLLM's key."""
    return FusionConfig.from_env()


def register() -> None:
    """Let every pass manager that vLLM makes from now on run our pass. Calling it again changes nothing."""
    speak_through("vllm")
    known(_let_ray_carry_our_variables)
    if not switch("ARFUSION_VLLM", True):
        return
    harmless("vLLM", _wrap)
    if switch("ARFUSION_VLLM_COMM", False):
        harmless("vLLM's calls of FlashInfer", replace_flashinfer)


def _let_ray_carry_our_variables() -> None:
    """An engine or a worker that vLLM starts as an actor of Ray's, on another host too, gets the variables of vLLM's
    prefixes: without ours among them it would fuse with ``ARFUSION_VLLM=0``, or with the defaults. The set is changed,
    not the variable that adds to it, which is a part of vLLM's key."""
    from vllm.ray.ray_env import DEFAULT_ENV_VAR_PREFIXES

    DEFAULT_ENV_VAR_PREFIXES.add("ARFUSION_")


def _wrap() -> None:
    """Wrap what the module's first lines name; where one of it is missing, nothing that counts.

    What the wraps need later is tried here: a run that keyed vLLM's caches as ours and then fused nothing would leave
    plain graphs for the next one.
    """
    settings()
    from vllm.compilation.backends import CompilerManager, VllmBackend
    from vllm.compilation.caching import VllmSerializableFunction
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config import CompilationConfig, VllmConfig

    groups.add_source(vllm_groups)
    configure, compute_hash = PostGradPassManager.configure, VllmConfig.compute_hash
    backend, made = VllmBackend.__init__, VllmConfig.__post_init__
    if getattr(configure, "arfusion", False):
        return
    install(PostGradPassManager())
    read = {"vllm_config": VllmBackend, "compilation_config": VllmConfig, "cache_dir": CompilationConfig}
    for name, owner in read.items():
        if name not in inspect.signature(owner).parameters:
            raise AttributeError(f"this vLLM's {owner.__name__} takes no {name}")
    signature, guard = inspect.signature(backend), _Guard()
    vllm_reports.keep_beside_graphs(CompilerManager)  # without our pass these keep nothing
    vllm_reports.keep_in_artefact(VllmSerializableFunction)

    @functools.wraps(configure)
    def configure_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> None:
        configure(self, *args, **kwargs)
        guard(lambda: install(self))

    @functools.wraps(backend)
    def backend_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> None:
        guard(lambda: _own_folder(signature.bind(self, *args, **kwargs).arguments["vllm_config"].compilation_config))
        backend(self, *args, **kwargs)

    @functools.wraps(compute_hash)
    def compute_hash_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> str:
        theirs: str = compute_hash(self, *args, **kwargs)
        return guard(lambda: keyed(theirs)) or theirs

    @functools.wraps(made)
    def made_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        known(lambda: _tell_of_no_graph(self))

    configure_with_arfusion.arfusion = True  # type: ignore[attr-defined]
    PostGradPassManager.configure = configure_with_arfusion
    VllmConfig.compute_hash = compute_hash_with_arfusion
    VllmBackend.__init__ = backend_with_arfusion
    VllmConfig.__post_init__ = made_with_arfusion


class _Guard:
    """Calls what the wraps do while vLLM runs, until one of it fails: from then on nothing fuses, because a graph that
    was fused without our key, or outside of our folder, could be loaded by a start that must not have it."""

    def __init__(self) -> None:
        self.whole = True

    def __call__(self, do: Callable[[], T]) -> T | None:
        out: list[T] = []
        self.whole = self.whole and harmless("vLLM", lambda: out.append(do()))
        return out[0] if out else None


def install(manager: Any, config: FusionConfig | None = None) -> AllReduceFusionPass:
    """Put our pass into one ``PostGradPassManager``; gives the pass, for its reports."""
    adapter = _adapter(config or settings())
    passes = manager.passes
    passes[:] = [
        existing for existing in passes if not isinstance(getattr(existing, "fusion", None), AllReduceFusionPass)
    ]
    first = next((i for i, each in enumerate(passes) if type(each).__name__ not in BEFORE_OURS), len(passes))
    passes.insert(first, adapter)
    return adapter.fusion


def keyed(theirs: str) -> str:
    """vLLM's key with ours in it, as long as theirs: sources, settings and the sizes of vLLM's groups."""
    both = f"{theirs} {cache_key.engine_key(settings())}"
    return hashlib.sha256(both.encode()).hexdigest()[: len(theirs)]


def vllm_groups() -> dict[str, dist.ProcessGroup]:
    """vLLM's groups under vLLM's names, those that exist now."""
    return coordinators("vllm.distributed.parallel_state")


def _tell_of_no_graph(config: Any) -> None:
    """Say, where an engine's configuration is made, that it has all-reduces and that our pass will see none of them."""
    if config.model_config is None or config.parallel_config.tensor_parallel_size == 1:
        return
    mode, backend = config.compilation_config.mode.name, config.compilation_config.backend
    if mode != "VLLM_COMPILE":
        cause = f" ({_why_none(config)})" if mode == "NONE" else ""
        _say(f"arfusion: nothing will fuse: vLLM runs its passes in mode VLLM_COMPILE, this is {mode}{cause}")
    elif backend == "eager":
        _say("arfusion: nothing will fuse: vLLM runs its passes with the backend inductor, this is eager")


def _why_none(config: Any) -> str:
    """What has set the mode NONE: the user, or vLLM itself for models that are not written to be compiled (0.33:
    DeepSeek V3.2 and V4, GLM-5, Kimi K3, MiniMax M3 and others), by a variable that it then writes."""
    if config.model_config.enforce_eager:
        return "--enforce-eager"
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE=1"
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") not in ("", "0"):
        own = "run here" if switch("ARFUSION_VLLM_COMM", False) else "can run here, with ARFUSION_VLLM_COMM=1"
        return (
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1, which vLLM sets by itself for models that it does not compile; where they "
            f"call FlashInfer's fused kernel those calls {own}"
        )
    return "asked for, as by -O0"


@functools.cache
def _say(message: str) -> None:
    log.info("%s", message)  # once a process: a draft model's configuration is made from its engine's


def _own_folder(compilation: Any) -> None:
    """A cache folder that the user names has no key in its path: give our graphs a folder of their own in it.

    Before the backend is called, which reads the folder first and configures its passes after that.
    """
    folder = f"arfusion-{cache_key.engine_key(settings())[:10]}"
    if compilation.cache_dir and os.path.basename(compilation.cache_dir) != folder:
        compilation.cache_dir = os.path.join(compilation.cache_dir, folder)


def _adapter(config: FusionConfig) -> Any:
    """Our pass as one of vLLM's ``InductorPass``: it runs for every compile range."""
    from vllm.compilation.passes.inductor_pass import InductorPass

    class ArFusionPass(InductorPass):  # type: ignore[misc]
        fusion = AllReduceFusionPass(config)

        def __call__(self, graph: fx.Graph) -> None:
            self.fusion(graph)

        def uuid(self) -> Any:
            return self.fusion.uuid()

        def is_applicable_for_range(self, compile_range: Any) -> bool:
            return True

    return ArFusionPass()
