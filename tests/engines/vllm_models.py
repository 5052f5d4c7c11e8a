"""vLLM's own model classes, compiled by its own back-end as on a GPU, without one: what ``test_vllm_models.py`` runs in
a process of its own, ``python -m tests.engines.vllm_models 9 llama qwen3_moe+fp8``.

The platform says that it is CUDA of the compute capability given first, so that vLLM takes the layers, ops, passes and
settings of that GPU. Tensors lie on the CPU, the two ranks are a fake group, and a compilation ends behind our pass:
each graph is run there as it came and as it left, and compared. Ops that have CUDA kernels alone give bits that depend
on every bit of what they read.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tests import simulate
from tests.dialects import engine_ops
from tests.real_models.small import small_config

TOKENS = 16
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 512}
LATENT = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {**HEADS, "intermediate_size": 512}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", HEADS),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM", LATENT),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32ForCausalLM", {**LATENT, "first_k_dense_replace": 2}),
    "gemma": ("gemma", "GemmaForCausalLM", HEADS),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", HEADS),
    "glm4": ("glm4", "Glm4ForCausalLM", HEADS),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", HEADS),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM", HEADS),
    "cohere": ("cohere", "CohereForCausalLM", HEADS),
    "granite": ("granite", "GraniteForCausalLM", {**HEADS, "residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
    "mamba2": ("mamba2", "Mamba2ForCausalLM", {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "expand": 2}),
}
"""By name: transformers' model type, vLLM's class, and sizes that vLLM's layers want. ``tf_`` in front: vLLM's
transformers back-end."""
QUANTISED: dict[str, dict[str, Any]] = {
    "fp8_static": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8_block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
}
"""Checkpoints' quantisations, behind a ``+``."""


def main(capability: int, names: list[str]) -> dict[str, Any]:
    """What became of each model: the patterns of the fused sites, the reasons of the others, and what differs between
    its graphs as they came and as they left."""
    pretend(capability)
    _catch_graphs()
    return {name: _survey(name) for name in names}


# The machine ---------------------------------------------------------------------------------------------------------


def pretend(capability: int) -> None:
    """CUDA's platform and driver, as far as vLLM asks them before it launches anything."""
    os.environ |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_USE_AOT_COMPILE": "0", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_USE_BREAKABLE_CUDAGRAPH": "0", "HF_HUB_OFFLINE": "1"}
    _load_an_empty_driver()
    properties = types.SimpleNamespace(
        name="a GPU",
        major=capability,
        minor=0,
        multi_processor_count=132,
        total_memory=1 << 37,
        warp_size=32,
        L2_cache_size=50 << 20,
        shared_memory_per_block_optin=227 << 10,
        uuid="0",
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        gcnArchName="",
    )
    stand_ins: dict[str, Any] = {
        "is_available": lambda: False,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "get_device_capability": lambda *args: (capability, 0),
        "get_device_properties": lambda *args: properties,
        "current_stream": lambda *args: types.SimpleNamespace(cuda_stream=0),
        "Stream": type("Stream", (), {}),
        "Event": type("Event", (), {}),
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    platforms, cuda = importlib.import_module("vllm.platforms"), importlib.import_module("vllm.platforms.cuda")
    answers = {
        "get_device_capability": cuda.DeviceCapability(capability, 0),
        "get_device_name": "a GPU",
        "get_device_total_memory": 1 << 37,
        "device_count": 8,
        "is_pin_memory_available": False,
        "num_compute_units": 132,
        "get_device_communicator_cls": (
            "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
        ),
    }
    methods = {name: classmethod(lambda *args, answer=answer, **kwargs: answer) for name, answer in answers.items()}
    platforms._current_platform = type("Cuda", (cuda.NonNvmlCudaPlatform,), {**methods, "device_type": "cpu"})()
    registry = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda inspect: inspect()  # type: ignore[attr-defined]


def _catch_graphs() -> None:
    """Fake process groups, and a compilation that ends behind our pass."""
    torch.distributed.new_group = _fake_group  # type: ignore[assignment]
    importlib.import_module("arfusion_pass.engines.vllm").register()
    manager = importlib.import_module("vllm.compilation.passes.pass_manager").PostGradPassManager
    manager.__call__ = _passes
    adaptor = importlib.import_module("vllm.compilation.compiler_interface").InductorStandaloneAdaptor
    adaptor.compile = _compiler(adaptor.compile)
    _give_kernels()


def _load_an_empty_driver() -> None:
    """vLLM's op library names the driver's functions, and calls none of them to register its ops."""
    library = Path(tempfile.mkdtemp()) / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", str(library)]
    subprocess.run(command, check=True)
    sys.setdlopenflags(os.RTLD_LAZY)
    ctypes.CDLL(str(library))


_new_group = torch.distributed.new_group


def _fake_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _new_group(ranks, backend="fake")


class _OnTheCpu(torch.overrides.TorchFunctionMode):
    """What a layer makes on its GPU, or moves there, lies on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_LIBRARIES: dict[str, torch.library.Library] = {}


def _give_kernels() -> None:
    """vLLM's norms and quantisers compute on the CPU what the tests of its dialect say they do."""

    def implement(name: str, schema: str, meaning: Any, fake: Any = None) -> None:
        namespace, op = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), op.partition(".")[0], None)
        if namespace == "_C" and packet is not None:
            library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
            library.impl(op, meaning, "CPU")

    define, engine_ops.define = engine_ops.define, implement
    engine_ops.register_vllm()
    engine_ops.define = define


# A model -------------------------------------------------------------------------------------------------------------


class _Done(BaseException):
    """Ends a compilation, or the first call of what was compiled."""


_graphs: list[tuple[fx.GraphModule, fx.GraphModule, Any]] = []


def _passes(self: Any, graph: fx.Graph) -> None:
    """vLLM's pass manager up to ours."""
    import arfusion_pass as arf
    from arfusion_pass.graph import put_in_order

    ours = next(index for index, each in enumerate(self.passes) if type(each).__name__ == "ArFusionPass")
    for each in self.passes[:ours]:
        each(graph)
    put_in_order(graph)  # a graph that is not can be copied by nobody
    before = copy_of(graph)
    self.passes[ours](graph)
    _graphs.append((before, copy_of(graph), arf.reports()[-1]))
    raise _Done


def copy_of(graph: fx.Graph) -> fx.GraphModule:
    return simulate.copied(fx.GraphModule(graph.owning_module, graph))


def _compiler(compile_graph: Any) -> Any:
    def compile_until_ours(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(_Done), torch._inductor.config.patch(force_disable_caches=True):
            compile_graph(*args, **kwargs)

        def run(*inputs: Any) -> Any:
            raise _Done

        return run, None

    return compile_until_ours


def _survey(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = engine_config(name, Path(folder))
    _graphs.clear()
    _call(config)
    config.compilation_config.static_forward_context.clear()
    torch._dynamo.reset()
    sites = [site for _, _, report in _graphs for site in report.sites]
    fused = [(before, after) for before, after, report in _graphs if report.matched_count]
    return {
        "patterns": [site.pattern for site in sites if site.fused],
        "missed": [site.reason for site in sites if not site.fused],
        "differing": [difference for pair in fused for difference in _differences(*pair)],
    }


def engine_config(name: str, folder: Path) -> Any:
    """vLLM's whole configuration of a model that only exists as its ``config.json``."""
    from vllm.engine.arg_utils import EngineArgs

    base, _, quantised = name.removeprefix("tf_").partition("+")
    model_type, architecture, sizes = MODELS[base]
    written = {**small_config(model_type, **sizes).to_dict(), "architectures": [architecture]}
    written |= {"quantization_config": QUANTISED[quantised]} if quantised else {}
    (folder / "config.json").write_text(json.dumps(written))
    config = EngineArgs(
        model=str(folder),
        dtype="bfloat16",
        tensor_parallel_size=2,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=128,
        max_num_batched_tokens=256,
        model_impl="transformers" if name.startswith("tf_") else "vllm",
    ).create_engine_config()
    config.compilation_config.cudagraph_mode = type(config.compilation_config.cudagraph_mode).NONE  # once all is set
    return config


def _call(config: Any) -> None:
    """Build the model as vLLM's worker does, and call it until it was compiled."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), torch.no_grad():
        if torch.distributed.is_initialized():
            parallel_state.destroy_model_parallel()
        else:
            store = importlib.import_module("torch.testing._internal.distributed.fake_pg").FakeStore()
            torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
            parallel_state._node_count = lambda group: 1
            parallel_state.in_the_same_node_as = lambda *args, **kwargs: [True, True]
            queue = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast").MessageQueue
            queue.create_from_process_group = staticmethod(lambda *args: None)
            parallel_state.init_distributed_environment(2, 0, local_rank=0)
        parallel_state.initialize_model_parallel(2)
        with _OnTheCpu():
            model = initialize_model(config)
            for parameter in model.parameters():  # vLLM refuses what no checkpoint has written
                if parameter.is_floating_point():
                    parameter.copy_(torch.randn(parameter.shape) * 0.05)
            with contextlib.suppress(NotImplementedError):  # what packs scales for one GPU's GEMM
                process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        for module in model.modules():  # routers' kernels for few tokens are compiled for the GPU at once
            for switch in ("allow_ll_bf16_gemm", "allow_ll_fp32w_gemm"):
                if hasattr(module, switch):
                    setattr(module, switch, False)
        ids, positions = torch.zeros(TOKENS, dtype=torch.int32), torch.arange(TOKENS)
        with contextlib.suppress(_Done), set_forward_context(None, config, num_tokens=TOKENS):
            model(ids, positions)


# Its graphs ----------------------------------------------------------------------------------------------------------


class _Interpreter(simulate.Interpreter):
    """Runs a graph on simulated ranks. An op without a kernel here gives noise whose seed is all that it reads; memory
    that nobody has written is zero, so that it is no such input."""

    def run_node(self, n: fx.Node) -> Any:
        self.value = n.meta.get("val")
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(args[0] if target is torch.ops.higher_order.auto_functionalized else target)
        if name == "vllm.all_reduce.default":
            return simulate.all_reduce(args[0], (*args[1:], *kwargs.values())[0])
        if name.startswith("vllm."):  # its layers, which may be named by an opaque object
            return self._noise(name, args, kwargs)
        try:
            result = super().call_function(target, args, kwargs)
        except NotImplementedError:
            return self._noise(name, args, kwargs)
        if name.startswith("aten.empty"):
            torch.empty(0, dtype=torch.uint8).set_(result.untyped_storage()).zero_()
        return result

    def _noise(self, name: str, args: Any, kwargs: Any) -> Any:
        seed = hashlib.sha256(name.encode())
        for each in pytree.tree_leaves((args, kwargs)):
            if isinstance(each, torch.Tensor):
                seed.update(_bytes(each).numpy().tobytes())
        generator = torch.Generator().manual_seed(int.from_bytes(seed.digest()[:7], "big"))

        def noise(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            sizes = [size if isinstance(size, int) else _size(size) for size in value.shape]
            return torch.randn(sizes, generator=generator).to(value.dtype)

        return pytree.tree_map(noise, self.value)


def _size(size: torch.SymInt) -> int:
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, 5)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _differences(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """The outputs of a graph that are not those of another one, bit for bit, and what each wrote to an input."""
    inputs = [
        value.abs() + 0.5 if isinstance(value, torch.Tensor) and value.numel() == 1 else value  # a quantiser's scale
        for value in simulate.random_inputs(before)
    ]
    results = []
    for module in (before, after):
        own = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
        with simulate.simulated_ranks():
            results.append([*pytree.tree_leaves(_Interpreter(module).run(*own)), *own])
    return [f"output {index}" for index, (a, b) in enumerate(zip(*results, strict=True)) if not _same(a, b)]


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2:])))
