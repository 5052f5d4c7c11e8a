"""Built kernel libraries as contenders, several in one process, through the C ABI alone: how a change is measured.

    python -m benchmarks.bench_site --library before=a.so --library after=b.so

They are built of ``kernels/*.cu`` alone: with ``binding.cpp`` a second one would register torch's ops anew. Each has a
workspace of its own. Of a library built with ``-DARF_STAMPS`` (``kernels/stamps.cuh``)
:meth:`Library.phases` says how long a site's phases took.
"""

from __future__ import annotations

import ctypes
import statistics

import torch
import torch.distributed as dist

from arfusion_pass.runtime import c_api
from benchmarks.contenders import EPSILON, QUANTISERS, Cell, Contender, Timed

PHASES = ("started", "waited", "pushed", "arrived", "reduced", "stored", "ended")
LAUNCHES, CTAS, WORDS = 64, 128, 16
STAMP_BYTES = 8 * LAUNCHES * CTAS * WORDS


class Library:
    """One shared object and its workspace on this rank. ``threads``: of a CTA, which decides over how many CTAs a row
    is split; 0: the library's own choice."""

    def __init__(self, label: str, path: str, message_bytes: int, rank: int, device: torch.device, threads: int = 0):
        import torch.distributed._symmetric_memory as symm_mem

        self.label, self.device = label, device
        self.library = ctypes.CDLL(path)
        self.library.arf_set_launch_override(threads, 0)
        world, name = dist.get_world_size(), dist.group.WORLD.group_name
        size = self._int64("arf_workspace_bytes", ctypes.c_int(world), ctypes.c_int64(message_bytes), ctypes.c_int(1))
        self.buffer = symm_mem.empty(size, dtype=torch.uint8, device=device).fill_(255)
        handle = symm_mem.rendezvous(self.buffer, name)
        torch.cuda.synchronize()
        dist.barrier()
        self.control = torch.zeros(c_api.CONTROL_BYTES + STAMP_BYTES, dtype=torch.uint8, device=device)
        description = c_api.WorkspaceDesc(
            group=label.encode(), device=device.index, rank=rank, world=world, bytes=size,
            control=self.control.data_ptr(), timeout_ns=5_000_000_000,
        )  # fmt: skip
        description.peers[:world] = list(handle.buffer_ptrs)
        self._checked(self.library.arf_register_workspace(ctypes.byref(description)))

    def _int64(self, name: str, *arguments: object) -> int:
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return int(function(*arguments))

    def _checked(self, status: int) -> None:
        if status:
            self.library.arf_last_error.restype = ctypes.c_char_p
            raise RuntimeError(self.library.arf_last_error().decode())

    def contender(self, quantiser: str | None = None) -> Contender:
        def make(cell: Cell) -> Timed:
            call = c_api.Call(
                tokens=cell.tokens, hidden=cell.hidden, x=cell.x0.data_ptr(), residual=cell.residual.data_ptr(),
                weight=cell.weight.data_ptr(), epsilon=EPSILON, scale_value=1.0,
                residual_out=cell.residual_out.data_ptr(),
            )  # fmt: skip
            if quantiser is None:
                call.norm_out = cell.norm.data_ptr()
            else:
                call.quant, call.quant_out = QUANTISERS[quantiser].pack(), cell.codes.data_ptr()
                call.scale, call.scale_dtype = cell.scale.data_ptr(), 2

            def launch() -> None:
                stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
                self._checked(
                    self.library.arf_launch(self.label.encode(), self.device.index, ctypes.byref(call), stream)
                )

            return Timed(
                launch,
                writes_norm=quantiser is None,
                norm=(lambda: cell.codes) if quantiser else None,
            )

        return Contender(self.label, make, ours=True, quantiser=quantiser)

    def phases(self) -> dict[str, float] | None:
        """Median µs of each phase of a CTA's first row over the last launches; None from a build without stamps.

        ``wait p10`` is near the link's own latency, what lies above it is the peer's delay. ``launch``: from the first
        CTA's start to the last one's end.
        """
        stamps = self.control[c_api.CONTROL_BYTES :].view(torch.int64).view(LAUNCHES, CTAS, WORDS).tolist()
        last = len(PHASES) - 1
        launches = [
            [cta for cta in launch if cta[last + 1] and all(cta[i] <= cta[i + 1] for i in range(last))]
            for launch in stamps
        ]
        launches = [launch for launch in launches if launch]
        ctas = [cta for launch in launches for cta in launch]
        if not ctas:
            return None
        ns = statistics.median(cta[last + 2] - cta[last + 1] for cta in ctas)
        scale = ns / statistics.median(cta[last] - cta[0] for cta in ctas) / 1e3
        found = {
            f"{PHASES[i]} to {PHASES[i + 1]}": statistics.median(cta[i + 1] - cta[i] for cta in ctas) * scale
            for i in range(last)
        }
        waits = sorted((cta[3] - cta[2]) * scale for cta in ctas)
        spans = [max(cta[last + 2] for cta in launch) - min(cta[last + 1] for cta in launch) for launch in launches]
        return found | {
            "CTA": ns / 1e3,
            "launch": statistics.median(spans) / 1e3,
            "wait p10": waits[len(waits) // 10],
            "wait p90": waits[9 * len(waits) // 10],
        }
