"""Ranks that drift apart, on an emulated GPU: calls of one group in random shapes and strategies, each rank's on a
stream of its own and in a grid of its own, on GPUs with room for few CTAs, each call's residual the last one's, in
place, whole or sharded.

    python -m kernels.tests.emulated.chains LIBRARY.so --seed 1 --seeds 20 --calls 24 --world 2

Every rank's outputs must be the reference's, the buffers empty at the end and the generations in step. What simulated
launches cannot show is here: a rank a launch ahead of its peer, and a launch that begins before the one in front ends.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import random
import sys

import torch

from arfusion_pass.ops import reference
from arfusion_pass.ops.spec import BLOCKS, NO_QUANT, Flags
from arfusion_pass.runtime import c_api
from kernels.tests.machine import DEVICE, EMULATED, load
from kernels.tests.simulated import SPECS, make_call
from tests.gpu.calls import Config, allocate, rank_input, shared_inputs, verify_epilogue

SIZE = 4 << 20
GPUS = 16
"""Streams with the same number modulo this share a GPU (emulator.cpp)."""


@dataclasses.dataclass
class Rank:
    """One rank's memory; its group's name, device and stream are its own."""

    name: bytes
    device: int
    stream: int
    buffer: torch.Tensor
    control: torch.Tensor
    error: torch.Tensor


def make_ranks(library: ctypes.CDLL, world: int, group: int = 0, size: int = SIZE) -> list[Rank]:
    """``group`` 1: another one of the same ranks, on streams of its own. ``size``: of a workspace, bytes."""
    ranks: list[Rank] = []
    for r in range(world):
        whole = torch.full((size + 256,), 255, dtype=torch.uint8)
        buffer = whole[-whole.data_ptr() % 256 :][:size]
        control = torch.zeros(c_api.CONTROL_BYTES // 8, dtype=torch.int64)
        name, stream = f"group{group} rank{r}".encode(), r + 1 + GPUS * group
        ranks.append(Rank(name, r, stream, buffer, control, torch.zeros(16, dtype=torch.int32)))
    register(library, ranks)
    return ranks


def register(library: ctypes.CDLL, ranks: list[Rank]) -> None:
    world = len(ranks)
    for r, rank in enumerate(ranks):
        peers = (ctypes.c_void_p * c_api.MAX_WORLD)(*(peer.buffer.data_ptr() for peer in ranks))
        c_api.check(
            library, "arf_register_workspace",
            c_api.WorkspaceDesc(
                group=rank.name, device=rank.device, rank=r, world=world, peers=peers, bytes=rank.buffer.numel(),
                control=rank.control.data_ptr(), error=rank.error.data_ptr(), timeout_ns=2 * 10**9,
            ),
        )  # fmt: skip


def random_call(rng: random.Random, seed: int) -> Config:
    strategy = rng.choice((Flags(0), Flags.ONESHOT, Flags.TWOSHOT))
    spec = rng.choice((NO_QUANT, NO_QUANT, SPECS["static"], SPECS["token"], SPECS["group128"], SPECS["int8"]))
    outputs = ("residual_out", "quant_out") if spec != NO_QUANT else ("residual_out", "norm_out")
    flags = strategy | rng.choice((Flags(0), Flags(0), Flags.NO_PDL, Flags.TRIGGER_EARLY))
    flags |= rng.choice((Flags(0), Flags.UNROUNDED_SUM, Flags.ROUND_BEFORE_WEIGHT))
    return Config(1, 128, outputs=outputs, spec=spec, flags=int(flags), seed=seed)


SHAPES = tuple(itertools.product((1, 2, 3, 7, 33), (128, 256, 1024, 2304)))
"""Tokens and hidden sizes; in a cluster for 2304 a warp has no tile."""


def run_chain(
    library: ctypes.CDLL, ranks: list[Rank], seed: int, count: int, twoshot: tuple[int, int] | None = None
) -> None:
    """Queue ``count`` calls on every rank's stream, let them run, and compare every output of every rank.

    ``twoshot``: tokens and hidden size of a chain of two-shot calls alone.
    """
    rng = random.Random(seed)
    library.emulated_seed(seed)
    tokens, hidden = twoshot or rng.choice(SHAPES)
    configs = [
        dataclasses.replace(random_call(rng, seed * 1000 + i), tokens=tokens, hidden=hidden) for i in range(count)
    ]
    if twoshot:
        configs = [dataclasses.replace(config, flags=int(Flags.TWOSHOT)) for config in configs]
    elif rng.random() < 0.4:  # a sharded residual: the rows that a rank does not own are nobody's until the last call
        marks = [
            Flags.RESIDUAL_IN_SHARDED * bool(i) | Flags.RESIDUAL_OUT_SHARDED * (i < count - 1) for i in range(count)
        ]
        plain = ~int(Flags.ONESHOT | Flags.TWOSHOT)
        configs = [
            dataclasses.replace(config, flags=config.flags & plain | int(Flags.SHARDED | mark))
            for config, mark in zip(configs, marks, strict=True)
        ]
    first = shared_inputs(configs[0], DEVICE).residual
    assert first is not None
    residuals = [first.clone() for _ in ranks]  # each in place, from call to call
    calls, wanted = [], first.clone()
    library.emulated_room(rng.choice((0, 8, 11, 24)))
    library.emulated_defer(1)
    for config in configs:
        xs = [rank_input(config, r, DEVICE) for r in range(len(ranks))]
        shared = shared_inputs(config, DEVICE)
        before = dataclasses.replace(shared, residual=wanted)
        reduced = reference.sum_in_rank_order(torch.stack(xs))
        wanted = reference.fused_add(reduced, wanted).to(config.dtype)
        results = [allocate(dataclasses.replace(config, outputs=config.outputs[1:]), DEVICE) for _ in ranks]
        for rank, x, result, residual in zip(ranks, xs, results, residuals, strict=True):
            library.arf_set_launch_override(0, rng.choice((0, 0, 1, 3, 11)))  # ranks' grids need not be equal
            call = make_call(config, x, dataclasses.replace(shared, residual=residual), result)
            call.residual_out = residual.data_ptr()
            c_api.check(library, "arf_launch", rank.name, rank.device, call, rank.stream)
        calls.append((config, xs, before, reduced, results))
    library.arf_set_launch_override(0, 0)
    library.emulated_synchronize()
    library.emulated_defer(0)
    library.emulated_room(0)
    for number, (config, _, before, reduced, results) in enumerate(calls):
        for r, result in enumerate(results):
            try:
                verify_epilogue(config, reduced, before, result)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, call {number}, rank {r}, {config}: {error}") from error
    for r, (rank, residual) in enumerate(zip(ranks, residuals, strict=True)):
        assert not int(rank.error[0]), f"seed {seed}: rank {r}'s wait expired: {rank.error.tolist()}"
        assert torch.equal(residual.view(torch.int16), wanted.view(torch.int16)), f"seed {seed}: rank {r}'s residual"
        assert bool((rank.buffer == 255).all()), f"seed {seed}: rank {r}'s buffer is not empty"
        generations = rank.control.view(torch.int32)[:2048:2]
        assert bool((generations == generations[0]).all()), f"seed {seed}: rank {r}'s generations differ"


def run_beside(library: ctypes.CDLL, world: int, seed: int) -> None:
    """Two streams' launches of one workspace, as of two graphs that are replayed at once: an overlap is found.

    Each rank has a second name and stream for the same memory, so that nothing on the host puts them in order.
    """
    ranks = make_ranks(library, world)
    beside = [dataclasses.replace(rank, name=rank.name + b" again", stream=rank.stream + GPUS) for rank in ranks]
    register(library, beside)
    rng = random.Random(seed)
    library.emulated_seed(seed)
    library.emulated_defer(1)
    keep = []
    for i in range(4):
        tokens, hidden = rng.choice(SHAPES)
        config = dataclasses.replace(random_call(rng, seed * 1000 + i), tokens=tokens, hidden=hidden)
        shared = shared_inputs(config, DEVICE)
        for r, pair in enumerate(zip(ranks, beside, strict=True)):
            x = rank_input(config, r, DEVICE)
            for rank in pair:
                result = allocate(config, DEVICE)
                keep.append((x, shared, result))
                call = make_call(config, x, shared, result)
                c_api.check(library, "arf_launch", rank.name, rank.device, call, rank.stream)
    library.emulated_synchronize()
    library.emulated_defer(0)
    states = [int(rank.error[0]) for rank in ranks]
    assert c_api.RecordState.OVERLAPPED in states, f"seed {seed}: {states}"
    for rank in ranks:  # its own error, or it waited for one that had given up
        if int(rank.error[0]) == c_api.RecordState.OVERLAPPED:
            assert library.arf_launch(rank.name, rank.device, ctypes.byref(call), rank.stream) == c_api.Status.EXPIRED
            assert b"ran two launches of group" in library.arf_last_error(), library.arf_last_error()


def run_two_groups(library: ctypes.CDLL, groups: list[list[Rank]], seed: int) -> None:
    """Launches of two groups that each would fill a GPU, on two streams of a rank: whoever begins first, both end."""
    rng = random.Random(seed)
    library.emulated_seed(seed)
    library.emulated_defer(1)
    expected = []
    for i in range(4):
        config = dataclasses.replace(random_call(rng, seed * 1000 + i), tokens=rng.choice((70, 150)), hidden=128)
        shared = shared_inputs(config, DEVICE)
        xs = [rank_input(config, r, DEVICE) for r in range(len(groups[0]))]
        for group in groups if i % 2 else groups[::-1]:
            for rank, x in zip(group, xs, strict=True):
                result = allocate(config, DEVICE)
                c_api.check(
                    library, "arf_launch", rank.name, rank.device, make_call(config, x, shared, result), rank.stream
                )
                expected.append((config, xs, shared, rank, result))
    library.emulated_synchronize()
    library.emulated_defer(0)
    for config, xs, shared, rank, result in expected:
        assert not int(rank.error[0]), f"seed {seed}: {rank.name!r} waited in vain: {rank.error.tolist()}"
        verify_epilogue(config, reference.sum_in_rank_order(torch.stack(xs)), shared, result)


def run_blocks(library: ctypes.CDLL, ranks: list[Rank], seed: int) -> None:
    """Sequence parallelism's calls, of one or several blocks a rank and in several pieces: two-shot's bits."""
    rng, world = random.Random(seed), len(ranks)
    library.emulated_seed(seed)
    block, count = rng.choice((1, 3, 10)), rng.choice((1, 2, 3))
    spec = rng.choice((NO_QUANT, *SPECS.values()))
    outputs = ("residual_out", "quant_out") if spec != NO_QUANT else ("residual_out", "norm_out")
    config = Config(
        block * count * world, 2304, outputs=outputs, spec=spec, seed=seed, addend=rng.choice(("none", "rows")),
        factor=rng.choice(("none", "value", "rows")),
    )  # fmt: skip
    shared, xs = shared_inputs(config, DEVICE), [rank_input(config, r, DEVICE) for r in range(world)]
    owner = torch.arange(config.tokens) // block % world
    launches, keep = [], []
    for flags in (int(Flags.TWOSHOT), int(BLOCKS)):
        results = []
        library.emulated_defer(1)
        for r, (rank, x) in enumerate(zip(ranks, xs, strict=True)):
            given = shared
            if flags == BLOCKS:
                mine = {name: getattr(shared, name) for name in ("residual", "addend", "factor")}
                given = dataclasses.replace(
                    shared, **{k: None if t is None else t[owner == r] for k, t in mine.items()}
                )
            result = allocate(config, DEVICE)
            call = make_call(dataclasses.replace(config, flags=flags), x, given, result)
            call.block = block if count > 1 or flags == int(Flags.TWOSHOT) else 0
            c_api.check(library, "arf_launch", rank.name, rank.device, call, rank.stream)
            results.append(result)
            keep.append((given, call))
        library.emulated_synchronize()
        library.emulated_defer(0)
        launches.append(results)
    for r, (wanted, got) in enumerate(zip(*launches, strict=True)):
        for name, buffer in got.buffers.items():
            want, have = wanted[name], buffer.tensor
            if name == "residual_out":  # the front of a buffer for all tokens
                want, have = want[owner == r], have[: int((owner == r).sum())]
            differs = int((want.view(torch.uint8) != have.view(torch.uint8)).sum())
            assert not differs, (
                f"seed {seed}, rank {r}: {differs} bytes of {name} differ in {config}, blocks of {block}"
            )
    assert all(bool((rank.buffer == 255).all()) for rank in ranks), f"seed {seed}: a buffer is not empty"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=24)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--twoshot", type=int, nargs=2, metavar=("TOKENS", "HIDDEN"), help="default: anything")
    parser.add_argument("--blocks", action="store_true", help="a block of tokens a rank, in several pieces")
    parser.add_argument("--groups", action="store_true", help="two groups on two streams: both end")
    parser.add_argument("--beside", action="store_true", help="two streams' launches of one workspace: errors")
    arguments = parser.parse_args()
    assert EMULATED, "on a GPU the ranks are processes: python -m tests.gpu"
    library = load(arguments.library)
    library.emulated_seed.argtypes = (ctypes.c_uint64,)
    ranks = make_ranks(library, arguments.world)
    if arguments.beside:
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            run_beside(library, arguments.world, seed)
        print(f"{arguments.seeds} times two launches at once: found each time")
        return 0
    if arguments.blocks:
        small = make_ranks(library, arguments.world, size=128 << 10)
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            run_blocks(library, small, seed)
        print(f"{arguments.seeds} calls of blocks: as two-shot")
        return 0
    if arguments.groups:
        groups = [ranks, make_ranks(library, arguments.world, group=1)]
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            run_two_groups(library, groups, seed)
        print(f"{arguments.seeds} times two groups at once: both ended")
        return 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        try:
            run_chain(library, ranks, seed, arguments.calls, arguments.twoshot)
        except AssertionError as error:
            print(error)
            return 1
    print(f"{arguments.seeds} chains of {arguments.calls} calls, {arguments.world} ranks: all as the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
