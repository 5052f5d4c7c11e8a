"""Against the real vLLM wheel: its op schemas, its pass manager with our plug-in, its IR ops and its all-reduce on two
gloo ranks. Skipped where vLLM is not installed (``python -m venv; pip install vllm pytest``, on CPU too)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import logging
import pathlib
import re
import shutil
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from arfusion_pass.dialects import vllm as dialect
from tests.dialects.cases import COLLECTIVE, EPSILON, standard
from tests.helpers import run_ranks

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)


def cpu_config() -> Any:
    from vllm.config import DeviceConfig, VllmConfig

    return VllmConfig(device_config=DeviceConfig(device="cpu"))


def binary_schemas() -> dict[str, str]:
    """Schemas by name from the strings of vLLM's op library: it needs CUDA to load, not to be read."""
    distribution = importlib.metadata.distribution("vllm")
    library = pathlib.Path(str(distribution.locate_file("vllm/_C_stable_libtorch.abi3.so")))
    text = re.findall(rb"[\x20-\x7e]{20,}", library.read_bytes())
    found = (re.match(r"([a-z0-9_.]+)\((.*)\) -> ", each.decode()) for each in text)
    return {f"_C::{match[1]}": match[2] for match in found if match}


def argument_names(entry: Any) -> set[str]:
    """The arguments that a table entry names."""
    names = [entry.x]
    names += [getattr(entry, field, None) for field in ("weight", "epsilon", "residual", "total", "norm")]
    for quant in (entry, getattr(entry, "quant", None)):
        names += [getattr(quant, field, None) for field in ("codes", "scales", "scale")]
    return {name for name in names if isinstance(name, str)}


@pytest.mark.parametrize("name", sorted(n for n in (*dialect.NORMS, *dialect.QUANTISERS) if n.startswith("_C::")))
def test_binary_ops_have_the_arguments_that_the_tables_name(name: str) -> None:
    """Every ``_C`` op of the tables is in the wheel, with each argument that its entry reads or writes."""
    schemas = binary_schemas()
    assert name in schemas, sorted(schemas)
    entry = dialect.NORMS.get(name) or dialect.QUANTISERS[name]
    for argument in argument_names(entry):
        assert re.search(rf"\b{argument}\b(=|,|$)", schemas[name]), (argument, schemas[name])


def test_binary_norms_take_an_optional_weight() -> None:
    """The generation of kernels that the rounding of ``_C``'s norms was read from: ``Tensor? weight``."""
    schemas = binary_schemas()
    assert "Tensor? weight" in schemas["_C::rms_norm"]
    assert "Tensor? weight" in schemas["_C::fused_add_rms_norm"]


def test_plugin_is_idempotent_and_first() -> None:
    """Registered twice, a new pass manager holds our pass once, behind nothing but passes that canonicalise; the entry
    point names the function that does it."""
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    from arfusion_pass.engines import vllm as plugin

    plugin.register()
    plugin.register()
    manager = PostGradPassManager()
    manager.configure(cpu_config())
    names = [type(each).__name__ for each in manager.passes]
    assert names.count("ArFusionPass") == 1
    assert set(names[: names.index("ArFusionPass")]) <= set(plugin.BEFORE_OURS)
    plugin.install(manager)
    assert [type(each).__name__ for each in manager.passes] == names


FRONT_END = """
import importlib, json, sys
import torch
from tests.engines import vllm_models

vllm_models.pretend(9)
import vllm.engine.arg_utils
asked = []
for name in ("_lazy_init", "get_device_capability"):
    original = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *args, original=original: asked.append(1) or original(*args))
from arfusion_pass.engines import vllm as plugin

before = set(sys.modules)
plugin.register()
new, cuda = {name for name in set(sys.modules) - before if name.startswith(("vllm", "flashinfer"))}, len(asked)
owners = {
    "vllm.config": "VllmConfig.compute_hash",
    "vllm.compilation.caching": "VllmSerializableFunction.serialize_compile_artifacts",
    "vllm.compilation.backends": "VllmBackend.__init__",
    "vllm.compilation.passes.pass_manager": "PostGradPassManager.configure",
}
wrapped = {}
for module, name in owners.items():
    owner, attribute = name.split(".")
    wrapped[name] = hasattr(getattr(getattr(importlib.import_module(module), owner), attribute), "arfusion")
print(json.dumps({"new": sorted(new), "cuda": cuda, "wrapped": wrapped}))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to make an empty libcuda with")
def test_registering_imports_nothing() -> None:
    """As on a GPU, in a process that has loaded what vLLM's front-end has: no module of vLLM's compiler, none of
    FlashInfer's, and CUDA is not asked for; what vLLM then imports is wrapped."""
    ended = subprocess.run([sys.executable, "-c", FRONT_END], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["new"], found["cuda"]) == ([], 0)
    assert all(found["wrapped"].values()), found["wrapped"]


def test_sequence_parallelism_comes_first() -> None:
    """Where the user has switched on vLLM's sequence parallelism (until 0.31), its passes see the all-reduces before
    ours: vLLM reads what it hands to the next pipeline stage as sharded."""
    from arfusion_pass.engines import vllm as plugin

    def named(name: str) -> Any:
        return type(name, (), {})()

    theirs = [named(name) for name in (*plugin.BEFORE_OURS, "AllReduceFusionPass", "RMSNormQuantFusionPass")]
    manager = types.SimpleNamespace(passes=list(theirs))
    plugin.install(manager)
    assert [type(each).__name__ for each in manager.passes[4:6]] == ["ArFusionPass", "AllReduceFusionPass"]


def test_a_start_without_graphs_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration of more than one rank that compiles nothing: one line where the engine's configuration is made,
    from vLLM's own fields; what the line says in which case: ``test_starting.py``."""
    from vllm.config import CompilationMode, ParallelConfig, VllmConfig

    from arfusion_pass.engines import vllm as plugin

    plugin.register()
    assert hasattr(VllmConfig.__post_init__, "__wrapped__")
    log = logging.getLogger("arfusion_pass")
    monkeypatch.setattr(log, "parent", logging.getLogger())
    monkeypatch.setattr(log, "level", logging.INFO)
    config = cpu_config()
    config.model_config = types.SimpleNamespace(enforce_eager=True)
    config.parallel_config = ParallelConfig(tensor_parallel_size=2)
    plugin._say.cache_clear()
    config.compilation_config.backend = "inductor"
    for mode in (CompilationMode.NONE, CompilationMode.NONE, CompilationMode.VLLM_COMPILE):
        config.compilation_config.mode = mode
        plugin._tell_of_no_graph(config)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "arfusion_pass"]
    assert said.endswith("this is NONE (--enforce-eager)")


def test_vllm_switches_to_breakable_graphs_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that the line above is read from is vLLM's, which sets the mode by it."""
    from vllm import envs

    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    monkeypatch.setattr(envs, "__getattr__", inspect.unwrap(envs.__getattr__))
    config = cpu_config()
    config._maybe_enable_breakable_cudagraph()
    assert config.compilation_config.mode.name == "NONE"


def test_ray_actors_get_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM copies to the engines and workers that it starts as actors of Ray's holds our switch, also where the
    plug-in is off; its key is its own then."""
    from vllm.ray import ray_env

    from arfusion_pass.engines import vllm as plugin

    monkeypatch.setattr(ray_env, "DEFAULT_ENV_VAR_PREFIXES", ray_env.DEFAULT_ENV_VAR_PREFIXES - {"ARFUSION_"})
    before = cpu_config().compute_hash()
    monkeypatch.setenv("ARFUSION_VLLM", "0")
    assert "ARFUSION_VLLM" not in ray_env.get_env_vars_to_copy()
    plugin.register()
    assert "ARFUSION_VLLM" in ray_env.get_env_vars_to_copy()
    assert cpu_config().compute_hash() == before


def test_pass_manager_key_follows_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's cache key changes when our pass's does, so that a stale graph is never taken from its cache."""
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config.utils import Range

    from arfusion_pass import cache_key
    from arfusion_pass.engines import vllm as plugin

    manager = PostGradPassManager()
    manager.configure(cpu_config())
    plugin.install(manager)
    with pass_context(Range(1, 8)):
        before = manager.uuid()
        assert manager.uuid() == before
        monkeypatch.setattr(cache_key, "source_hash", lambda: "other sources")
        assert manager.uuid() != before


def test_the_key_of_every_cache_follows_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """``VllmConfig.compute_hash``, which names all of vLLM's cache folders: its own while the plug-in is off, another
    with it, another again with other sources; and a folder that the user names is divided likewise."""
    from vllm.compilation.backends import VllmBackend
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config import VllmConfig

    from arfusion_pass import cache_key
    from arfusion_pass.engines import vllm as plugin

    monkeypatch.setattr(VllmConfig, "compute_hash", inspect.unwrap(VllmConfig.compute_hash))
    for wrapped, name in ((PostGradPassManager, "configure"), (VllmBackend, "__init__"), (VllmConfig, "__post_init__")):
        monkeypatch.setattr(wrapped, name, inspect.unwrap(getattr(wrapped, name)))
    config = cpu_config()
    theirs = config.compute_hash()
    monkeypatch.setenv("ARFUSION_VLLM", "0")
    plugin.register()
    assert config.compute_hash() == theirs
    monkeypatch.setenv("ARFUSION_VLLM", "1")
    plugin.register()
    plugin.register()
    keys = [theirs, config.compute_hash()]
    assert keys[-1] == config.compute_hash() == plugin.keyed(theirs)
    assert len(keys[-1]) == len(theirs)
    monkeypatch.setattr(cache_key, "source_hash", lambda: "other sources")
    keys.append(config.compute_hash())
    assert len(set(keys)) == 3, keys

    config.compilation_config.cache_dir = str(tmp_path)
    for _ in range(2):
        VllmBackend(config)
        folder = pathlib.Path(config.compilation_config.cache_dir)
        assert folder.parent == tmp_path
        assert folder.name.startswith("arfusion-")


def _layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    """The all-reduce and norms of a decoder layer, called as vLLM's models call them."""
    from vllm import ir
    from vllm.distributed import tensor_model_parallel_all_reduce

    def reduce(y: torch.Tensor) -> torch.Tensor:  # what the last call is on a GPU; on CPU vLLM traces into it
        return torch.ops.vllm.all_reduce(y, group_name="tp:0")

    norm, residual = ir.ops.fused_add_rms_norm(reduce(x), residual, weight, EPSILON)
    norm2, residual = ir.ops.fused_add_rms_norm(reduce(norm), residual, weight, 1e-5)
    last = ir.ops.rms_norm(tensor_model_parallel_all_reduce(norm2), weight.float() + 1.0, EPSILON)
    return last, residual


def _rank(rank: int, world: int) -> dict[str, Any]:
    from torch._inductor import config as inductor_config
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config import set_current_vllm_config
    from vllm.config.utils import Range
    from vllm.distributed import parallel_state

    from arfusion_pass.engines import vllm as plugin
    from arfusion_pass.inspection import replay

    plugin.register()
    config = cpu_config()
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(world, rank, local_rank=rank, backend="gloo")
        parallel_state.initialize_model_parallel(world, backend="gloo")
        torch.manual_seed(rank)
        inputs = standard()
        expected = _layer(*(value.clone() for value in inputs))  # on CPU vLLM reduces in place
        manager = PostGradPassManager()
        manager.configure(config)
        manager.fix_functionalization = lambda graph: None  # it names ops of the CUDA library, and rewrites only those
        patch = {
            "post_grad_custom_post_pass": manager,
            "enable_auto_functionalized_v2": False,
            "fx_graph_cache": False,
        }
        with inductor_config.patch(patch), pass_context(Range(1, 8)), replay.recording() as recorder, torch.no_grad():
            actual = torch.compile(_layer, fullgraph=True)(*inputs)
        report = recorder.reports[0]
        return {
            "patterns": [site.pattern for site in report.fused],
            "missed": [site.reason for site in report.missed],
            "groups": [site.group for site in report.sites],
            "problems": [check.detail for check in recorder.checks() if not check.ok],
            "after": report.after,
            "error": max((a.float() - b.float()).abs().max().item() for a, b in zip(actual, expected, strict=True)),
        }


def test_two_ranks_through_vllm() -> None:
    """vLLM's own ops on its own groups, compiled through its pass manager: every site fuses, its all-reduce op under
    vLLM's group name, no all-reduce is left, and each site is within the contract of the ops that it replaced."""
    outcome = run_ranks(2, _rank, timeout=300.0)[0]
    add = "AllReduceFusedAddRMSNorm"
    assert outcome["patterns"] == [add, add, "AllReduceGemmaRMSNorm"], outcome
    assert not outcome["missed"]
    assert outcome["groups"][:2] == ["tp:0", "tp:0"], outcome["groups"]
    assert not COLLECTIVE.findall(outcome["after"]), outcome["after"]
    assert not outcome["problems"], (outcome["problems"], outcome["after"])
    assert outcome["error"] < 0.2, outcome["error"]
