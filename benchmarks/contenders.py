"""Everything that is timed, ours and the peers, each as a call on the same inputs of one cell.

A contender is made once for a run (it may allocate a workspace, collectively) and gives a :class:`Timed` for each cell,
or None where it does not apply. Peers are optional: one that does not import, or fails on any rank, is left out with a
note. FlashInfer comes from a kit (``flashinfer_kit.py``), else as it is installed, and is always asked for
``backend="trtllm"``: its ``"auto"`` takes a back-end that makes NVLink multicast objects.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from arfusion_pass.ops import layouts
from arfusion_pass.ops.spec import Bound, Flags, QuantFormat, QuantSpec, ScaleLayout
from benchmarks import norm_kernels

EPSILON = 1e-6
GROUP128 = QuantSpec(QuantFormat.FP8, 128, ScaleLayout.ROW, bound_on=Bound.AMAX, bound=1e-10)
QUANTISERS = {
    "static FP8": QuantSpec(QuantFormat.FP8, 0),
    "group-128 FP8": GROUP128,
    "token FP8": QuantSpec(QuantFormat.FP8, -1),
    "NVFP4": QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.SWIZZLED_128X4),
    "MXFP8": QuantSpec(QuantFormat.MXFP8, 32, ScaleLayout.SWIZZLED_128X4),
}


@dataclasses.dataclass
class Cell:
    """One shape's inputs and outputs, shared by all contenders."""

    tokens: int
    hidden: int
    world: int
    rank: int
    device: torch.device

    def __post_init__(self) -> None:
        shape, bf16 = (self.tokens, self.hidden), torch.bfloat16

        def random(seed: int, size: tuple[int, ...]) -> torch.Tensor:
            generator = torch.Generator(self.device).manual_seed(seed)
            return torch.randn(size, generator=generator, device=self.device).to(bf16)

        self.x0 = random(self.rank + 1, shape)
        self.x = self.x0.clone()
        self.residual, self.weight = random(100, shape), random(101, (self.hidden,))
        self.reduced, self.residual_out, self.norm = (torch.empty_like(self.x0) for _ in range(3))
        self.codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
        self.group_scales = torch.empty(self.tokens, max(1, self.hidden // 128), device=self.device)
        self.scale = torch.tensor([0.02], device=self.device)
        total = torch.zeros(shape, device=self.device)
        for rank in range(self.world):
            total += random(rank + 1, shape).float()
        value = (total.to(bf16).float() + self.residual.float()).to(bf16).float()
        self.expected = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + EPSILON) * self.weight.float()

    @property
    def bytes(self) -> int:
        return self.tokens * self.hidden * 2

    def norm_error(self) -> float:
        """Relative error of ``norm`` against fp32."""
        return float((self.norm.float() - self.expected).norm() / self.expected.norm())


@dataclasses.dataclass
class Timed:
    """What is captured: ``call``; ``reset`` before a replay; ``after_capture`` and ``warm`` for peers that need it.

    ``x`` is what the kernel in front writes, if it is not the cell's ``x0``, and ``norm`` gives what the one behind
    reads, if it is not the cell's."""

    call: Callable[[], object]
    reset: Callable[[], object] | None = None
    after_capture: Callable[[], object] | None = None
    warm: bool = True
    writes_norm: bool = True
    x: torch.Tensor | None = None
    norm: Callable[[], torch.Tensor] | None = None


class Contender:
    """One column of the table; ``quantiser`` None is the plain norm."""

    def __init__(
        self, name: str, make: Callable[[Cell], Timed | None], ours: bool = False, quantiser: str | None = None
    ):
        self.name, self.make, self.ours, self.quantiser = name, make, ours, quantiser
        self.keep: Any = None


def nccl(quantiser: str | None = None) -> Contender:
    """dist.all_reduce, then one Triton kernel."""

    def make(cell: Cell) -> Timed:
        kind, scale = norm_kernels.NONE, None
        if quantiser == "static FP8":
            kind, scale = norm_kernels.STATIC, cell.scale
        elif quantiser == "group-128 FP8":
            kind, scale = norm_kernels.GROUP128, cell.group_scales

        def call() -> None:
            dist.all_reduce(cell.x)
            norm_kernels.add_rms_norm(
                cell.x, cell.residual, cell.weight, cell.residual_out, cell.norm, cell.codes, scale, kind, EPSILON
            )

        return Timed(call, reset=lambda: cell.x.copy_(cell.x0), writes_norm=quantiser is None, x=cell.x)

    return Contender("NCCL + norm" if quantiser is None else f"NCCL + {quantiser}", make, quantiser=quantiser)


def symmetric_memory(largest: int, device: torch.device) -> Contender:
    """torch's two_shot_all_reduce_, then the Triton kernel."""
    import torch.distributed._symmetric_memory as symm_mem

    buffer = symm_mem.empty(largest // 2, dtype=torch.bfloat16, device=device)
    symm_mem.rendezvous(buffer, dist.group.WORLD.group_name)
    name = dist.group.WORLD.group_name

    def make(cell: Cell) -> Timed:
        x = buffer[: cell.tokens * cell.hidden].view(cell.tokens, cell.hidden)

        def call() -> None:
            torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", name)
            norm_kernels.add_rms_norm(
                x, cell.residual, cell.weight, cell.residual_out, cell.norm, None, None, 0, EPSILON
            )

        return Timed(call, reset=lambda: x.copy_(cell.x0), x=x)

    return Contender("symm two-shot + norm", make)


def nccl_windows(largest: int, device: torch.device) -> Contender:
    """dist.all_reduce on memory of NCCL's own allocator, registered as symmetric windows, then the Triton kernel."""
    backend = dist.group.WORLD._get_backend(device)
    pool = torch.cuda.MemPool(backend.mem_allocator)
    with torch.cuda.use_mem_pool(pool):
        buffer = torch.zeros(largest // 2, dtype=torch.bfloat16, device=device)
    backend.register_mem_pool(pool, symm=True)

    def make(cell: Cell) -> Timed:
        x = buffer[: cell.tokens * cell.hidden].view(cell.tokens, cell.hidden)

        def call() -> None:
            dist.all_reduce(x)
            norm_kernels.add_rms_norm(
                x, cell.residual, cell.weight, cell.residual_out, cell.norm, None, None, 0, EPSILON
            )

        return Timed(call, reset=lambda: x.copy_(cell.x0), x=x)

    contender = Contender("NCCL windows + norm", make)
    contender.keep = pool
    return contender


def nccl_inductor() -> Contender:
    """dist.all_reduce, then the add and the norm as Inductor fuses them."""

    def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return total, torch.nn.functional.rms_norm(total, (x.shape[-1],), weight, EPSILON)

    def make(cell: Cell) -> Timed:
        compiled = torch.compile(add_norm, dynamic=False)
        made: list[torch.Tensor] = []

        def call() -> None:
            dist.all_reduce(cell.x)
            made[:] = compiled(cell.x, cell.residual, cell.weight)

        return Timed(call, reset=lambda: cell.x.copy_(cell.x0), writes_norm=False, x=cell.x, norm=lambda: made[1])

    return Contender("NCCL + Inductor", make)


def ours(label: str, flags: int = 0, quantiser: str | None = None) -> Contender:
    """``arfusion::allreduce_rms_norm`` with residual and weight."""
    name = dist.group.WORLD.group_name
    spec = QUANTISERS[quantiser] if quantiser else QuantSpec()

    def make(cell: Cell) -> Timed | None:
        out: dict[str, Any] = {"residual_out": cell.residual_out}
        if quantiser is None:
            out["norm_out"] = cell.norm
        else:
            if spec.group > 0 and cell.hidden % spec.group:
                return None
            shape = tuple(map(int, layouts.codes_shape((cell.tokens, cell.hidden), spec)))
            out["quant_out"] = torch.empty(shape, dtype=layouts.codes_dtype(spec), device=cell.device)
            out["scale_out"] = layouts.allocate_scales(cell.tokens, cell.hidden, spec, cell.device)
        scale = cell.scale if spec.is_static or spec.format == QuantFormat.NVFP4 else None
        arguments = (name, EPSILON, 0.0, int(flags), spec.pack(), spec.bound, 1.0)
        op = torch.ops.arfusion.allreduce_rms_norm.default
        return Timed(
            lambda: op(cell.x0, cell.residual, cell.weight, scale, *arguments, **out),
            writes_norm=quantiser is None,
            norm=(lambda: out["quant_out"]) if quantiser else None,
        )

    return Contender(label, make, ours=True, quantiser=quantiser)


def meeting(device: torch.device) -> Callable[[], object]:
    """An exchange of 16 bytes with every rank: what it costs to meet."""
    x = torch.ones(1, 8, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    arguments = (dist.group.WORLD.group_name, EPSILON, 0.0, 0, 0, 0.0, 1.0)
    op = torch.ops.arfusion.allreduce_rms_norm.default
    return lambda: op(x, None, None, None, *arguments, allreduce_out=out)


class FlashInfer:
    """FlashInfer's fused kernels and its copy of vLLM's all-reduce, from the kit."""

    def __init__(self, kit: str, world: int, rank: int, tokens: int, hidden: int):
        for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
            del sys.modules[name]  # of another version's kit
        if kit:
            sys.path.insert(0, kit)
        if os.path.exists("/usr/local/cuda/bin/nvcc"):
            os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
        _forbid_multicast()
        import flashinfer
        import flashinfer.comm as comm

        self.version = flashinfer.__version__
        self.comm, self.world, self.rank = comm, world, rank
        os.environ["FLASHINFER_CONFIDENTIAL_COMPUTE"] = "0"
        self.workspace = comm.create_allreduce_fusion_workspace(
            backend="trtllm",
            world_size=world,
            rank=rank,
            max_token_num=tokens,
            hidden_dim=hidden,
            dtype=torch.bfloat16,
            group=dist.group.WORLD,
        )
        self.pointer: Any = None

    def fused(self, label: str, oneshot: bool | None, quantiser: str | None = None, early: bool = False) -> Contender:
        """``allreduce_fusion`` with residual and norm, or static FP8, as vLLM calls it (PDL, fp32_acc).

        ``early``: the next kernel may start before this one ends, as its one-shot can be asked to. Safe behind it is
        what waits for it: a kernel launched without PDL (cuBLAS), or one that waits as its first step (FlashInfer's).
        """
        patterns = self.comm.AllReduceFusionPattern
        pattern = patterns.kARResidualRMSNorm if quantiser is None else patterns.kARResidualRMSNormFP8Quant

        def make(cell: Cell) -> Timed | None:
            if oneshot is False and cell.tokens <= self.world:
                return None  # it asserts token_num > world_size
            arguments = {
                "input": cell.x0,
                "workspace": self.workspace,
                "pattern": pattern,
                "launch_with_pdl": True,
                "trigger_completion_at_end": not early,
                "output": cell.reduced,
                "residual_out": cell.residual_out,
                "norm_out": cell.norm if quantiser is None else None,
                "quant_out": None if quantiser is None else cell.codes,
                "residual_in": cell.residual,
                "rms_gamma": cell.weight,
                "rms_eps": EPSILON,
                "scale_factor": None if quantiser is None else cell.scale,
                "use_oneshot": oneshot,
                "fp32_acc": True,
            }
            if early:
                arguments["use_oneshot"] = True
            return Timed(
                lambda: self.comm.allreduce_fusion(**arguments),
                writes_norm=quantiser is None,
                norm=(lambda: cell.codes) if quantiser else None,
            )

        return Contender(label, make, quantiser=quantiser)

    def vllm(self, largest: int, cpu_group: dist.ProcessGroup, device: torch.device) -> Contender:
        """vLLM's custom all-reduce on graph-registered buffers, then the Triton kernel."""
        from ctypes import c_void_p

        from flashinfer.comm.cuda_ipc import create_shared_buffer, cudart

        comm = self.comm
        meta = create_shared_buffer(comm.vllm_meta_size() + largest, group=dist.group.WORLD)
        cudart.cudaMemset(c_void_p(meta[self.rank]), 0, comm.vllm_meta_size())
        rank_data = torch.empty(8 << 20, dtype=torch.uint8, device=device)
        pointer = self.pointer = comm.vllm_init_custom_ar(meta, rank_data, self.rank, True)
        warm_buffer = create_shared_buffer(2 << 20, group=dist.group.WORLD)
        comm.vllm_register_buffer(pointer, warm_buffer)
        for count in (4096, 512 << 10):  # both kernels are loaded outside capture
            x = torch.ones(count, device=device, dtype=torch.bfloat16)
            comm.vllm_all_reduce(pointer, x, torch.empty_like(x), warm_buffer[self.rank], 2 << 20, 36)
        torch.cuda.synchronize()

        def register() -> None:
            handle, offsets = comm.vllm_get_graph_buffer_ipc_meta(pointer)
            handles, all_offsets = [None] * self.world, [None] * self.world
            dist.all_gather_object(handles, handle, group=cpu_group)
            dist.all_gather_object(all_offsets, offsets, group=cpu_group)
            comm.vllm_register_graph_buffers(pointer, handles, all_offsets)

        def make(cell: Cell) -> Timed:
            def call() -> None:
                comm.vllm_all_reduce(pointer, cell.x0, cell.reduced, 0, 0, 36)
                norm_kernels.add_rms_norm(
                    cell.reduced, cell.residual, cell.weight, cell.residual_out, cell.norm, None, None, 0, EPSILON
                )

            return Timed(call, after_capture=register, warm=False)

        self._keep = rank_data
        return Contender("vLLM AR + norm", make)


def _forbid_multicast() -> None:
    """No peer may create an NVLink multicast object: it can put a shared host's GPUs out of service."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("cuMulticastCreate is forbidden here")

    driver.cuMulticastCreate = refuse


MIDDLE = int(Flags.SHARDED | Flags.RESIDUAL_IN_SHARDED | Flags.RESIDUAL_OUT_SHARDED)
"""A middle site of a chain, its residual sharded."""

OUR_STRATEGIES = {"ours one-shot": int(Flags.ONESHOT), "ours two-shot": int(Flags.TWOSHOT), "ours": 0}
