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

each when vLLM imports it, as :func:`arfusion_pass.engines.starting.after_import` has it; and tells
:mod:`arfusion_pass.groups` where vLLM keeps its groups: a graph from a cache may be the first to need one.

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
import importlib
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
from arfusion_pass.engines.starting import after_import, harmless
from arfusion_pass.engines.vllm_comm import replace_when_imported
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
    known(lambda: after_import("vllm.ray.ray_env", "vLLM", _let_ray_carry_our_variables))
    if not switch("ARFUSION_VLLM", True):
        return
    _guard()(_wrap)
    if switch("ARFUSION_VLLM_COMM", False):
        harmless("vLLM's calls of FlashInfer", replace_when_imported)


def _let_ray_carry_our_variables() -> None:
    """An engine or a worker that vLLM starts as an actor of Ray's, on another host too, gets the variables of vLLM's
    prefixes: without ours among them it would fuse with ``ARFUSION_VLLM=0``, or with the defaults. The set is changed,
    not the variable that adds to it, which is a part of vLLM's key."""

    def change() -> None:
        from vllm.ray.ray_env import DEFAULT_ENV_VAR_PREFIXES

        DEFAULT_ENV_VAR_PREFIXES.add("ARFUSION_")

    known(change)


class _Guard:
    """Calls what wraps and what the wraps do while vLLM runs, until one of it fails: from then on nothing fuses,
    because a graph that was fused without our key, or outside of our folder, could be loaded by a start that must not
    have it; and a run that keyed vLLM's caches as ours and then fused nothing would leave plain graphs for the next."""

    def __init__(self) -> None:
        self.whole = True

    def __call__(self, do: Callable[[], T]) -> T | None:
        out: list[T] = []
        if self.whole and not harmless("vLLM", lambda: out.append(do())):
            self.whole = False
        return out[0] if out and self.whole else None


@functools.cache
def _guard() -> _Guard:
    """The process's."""
    return _Guard()


def _wrap() -> None:
    """Wrap what the module's first lines name, each when vLLM imports it: vLLM's front-end, where plug-ins are loaded
    too, imports nothing of its compiler. Where one of it is missing, nothing that counts is wrapped.

    Whatever keys a graph has imported all of it before (:func:`_wrap_artefacts`): by then the guard knows whether the
    graph will have our pass.
    """
    settings()
    groups.add_source(vllm_groups)
    for module, wrap in (
        ("vllm.compilation.passes.pass_manager", _wrap_pass_manager),
        ("vllm.compilation.backends", _wrap_backend),
        ("vllm.compilation.caching", _wrap_artefacts),
        ("vllm.config", _wrap_config),
    ):
        after_import(module, "vLLM", wrap)


def _guarded(wrap: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(wrap)
    def guarded() -> None:
        _guard()(wrap)

    return guarded


@_guarded
def _wrap_pass_manager() -> None:
    """What the wrap needs later is tried here, on a manager of our own."""
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    configure, guard = PostGradPassManager.configure, _guard()
    if hasattr(configure, "arfusion"):
        return
    install(PostGradPassManager())

    @functools.wraps(configure)
    def configure_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> None:
        configure(self, *args, **kwargs)
        guard(lambda: install(self))

    configure_with_arfusion.arfusion = True  # type: ignore[attr-defined]
    PostGradPassManager.configure = configure_with_arfusion


@_guarded
def _wrap_backend() -> None:
    from vllm.compilation.backends import CompilerManager, VllmBackend

    backend, guard = VllmBackend.__init__, _guard()
    if hasattr(backend, "arfusion"):
        return
    _must_take(VllmBackend, "vllm_config")
    vllm_reports.keep_beside_graphs(CompilerManager)  # without our pass it keeps nothing
    signature = inspect.signature(backend)

    @functools.wraps(backend)
    def backend_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> None:
        guard(lambda: _own_folder(signature.bind(self, *args, **kwargs).arguments["vllm_config"].compilation_config))
        backend(self, *args, **kwargs)

    backend_with_arfusion.arfusion = True  # type: ignore[attr-defined]
    VllmBackend.__init__ = backend_with_arfusion


@_guarded
def _wrap_artefacts() -> None:
    """AOT artefacts are keyed from their module, before vLLM imports the backend."""
    importlib.import_module("vllm.compilation.backends")
    from vllm.compilation.caching import VllmSerializableFunction

    vllm_reports.keep_in_artefact(VllmSerializableFunction)  # without our pass it keeps nothing


@_guarded
def _wrap_config() -> None:
    from vllm.config import CompilationConfig, VllmConfig

    compute_hash, made, guard = VllmConfig.compute_hash, VllmConfig.__post_init__, _guard()
    if hasattr(compute_hash, "arfusion"):
        return
    _must_take(VllmConfig, "compilation_config")
    _must_take(CompilationConfig, "cache_dir")

    @functools.wraps(compute_hash)
    def compute_hash_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> str:
        theirs: str = compute_hash(self, *args, **kwargs)
        return guard(lambda: keyed(theirs)) or theirs

    @functools.wraps(made)
    def made_with_arfusion(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        known(lambda: _tell_of_no_graph(self))

    compute_hash_with_arfusion.arfusion = True  # type: ignore[attr-defined]
    VllmConfig.compute_hash = compute_hash_with_arfusion
    VllmConfig.__post_init__ = made_with_arfusion


def _must_take(owner: type, name: str) -> None:
    if name not in inspect.signature(owner).parameters:
        raise AttributeError(f"this vLLM's {owner.__name__} takes no {name}")


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
