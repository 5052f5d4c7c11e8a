"""A sharded residual, all ranks in one launch on one GPU: worlds 2 to 8, every quantiser, with two-shot's bits.

    python -m kernels.tests.simulated_sharded LIBRARY.so            # everything
    python -m kernels.tests.simulated_sharded LIBRARY.so --quick    # a few dozen cases, for compute-sanitizer

A call is run as the first, a middle and the last of a chain. Rows of `residual` that a rank does not own are NaN,
those of `residual_out` keep their poison, and nothing else may depend on them or differ. Codes of exactly the
sentinel's bytes are among the cases, and every launch checks that the one before it left the buffers empty.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time

import torch

from arfusion_pass.ops.spec import BLOCKS, Flags, QuantFormat, QuantSpec
from kernels.tests.machine import DEVICE, EMULATED, load, synchronize
from kernels.tests.simulated import DTYPES, SPECS, Ranks, make_call
from tests.gpu.calls import Config, Result, Shared, allocate, rank_input, shared_inputs
from tests.gpu.compare import POISON

PLACES = {
    "first": Flags.RESIDUAL_OUT_SHARDED,
    "middle": Flags.RESIDUAL_IN_SHARDED | Flags.RESIDUAL_OUT_SHARDED,
    "last": Flags.RESIDUAL_IN_SHARDED,
}
OUTPUTS = (("residual_out", "quant_out"), ("residual_out", "norm_out", "quant_out"), ("quant_out",))


def sharded(residual: torch.Tensor | None, rank: int, world: int) -> torch.Tensor | None:
    """A residual as one rank of a chain may hold it."""
    if residual is None:
        return None
    own = residual.clone()
    own[torch.arange(len(own), device=own.device) % world != rank] = float("nan")
    return own


def run_case(ranks: Ranks, config: Config, xs: list[torch.Tensor] | None = None, shared: Shared | None = None) -> None:
    """Two-shot, then each place in a chain."""
    xs = xs or [rank_input(config, r, DEVICE) for r in range(ranks.world)]
    shared = shared or shared_inputs(config, DEVICE)
    wanted = launch(ranks, config, Flags.TWOSHOT, xs, [shared] * ranks.world)[0].snapshot()
    for place, marks in PLACES.items():
        inputs = [
            dataclasses.replace(
                shared, residual=sharded(shared.residual, r, ranks.world) if place != "first" else shared.residual
            )
            for r in range(ranks.world)
        ]
        results = launch(ranks, config, Flags.SHARDED | marks, xs, inputs)
        for rank, result in enumerate(results):
            for name, buffer in result.buffers.items():
                buffer.assert_guards(name)
                got, want = as_bytes(buffer.tensor), as_bytes(wanted[name])
                if name == "residual_out" and place != "last":
                    others = torch.arange(config.tokens, device=DEVICE) % ranks.world != rank
                    got, want = got.view(config.tokens, -1), want.view(config.tokens, -1).clone()
                    want[others] = POISON
                differs = int((got != want).sum())
                assert not differs, f"{place}, rank {rank}: {name} differs in {differs} of {got.numel()} bytes"


def run_blocks(ranks: Ranks, config: Config) -> None:
    """One block of tokens a rank, as sequence parallelism has them: two-shot's bits, residuals of its own rows."""
    share = -(-config.tokens // ranks.world)
    config = dataclasses.replace(config, tokens=share * ranks.world)
    xs, shared = [rank_input(config, r, DEVICE) for r in range(ranks.world)], shared_inputs(config, DEVICE)
    wanted = launch(ranks, config, Flags.TWOSHOT, xs, [shared] * ranks.world)[0].snapshot()
    own = [slice(r * share, (r + 1) * share) for r in range(ranks.world)]
    residuals = [None if shared.residual is None else shared.residual[rows].clone() for rows in own]
    inputs = [dataclasses.replace(shared, residual=residual) for residual in residuals]
    for rank, result in enumerate(launch(ranks, config, BLOCKS, xs, inputs)):
        for name, buffer in result.buffers.items():
            buffer.assert_guards(name)
            got, want = as_bytes(buffer.tensor), as_bytes(wanted[name])
            if name == "residual_out":  # the front of a buffer for all tokens
                rows = want.view(config.tokens, -1)
                want = torch.full_like(rows, POISON)
                want[:share] = rows[own[rank]]
                want = want.view(-1)
            differs = int((got != want).sum())
            assert not differs, f"blocks, rank {rank}: {name} differs in {differs} of {got.numel()} bytes"


def launch(ranks: Ranks, config: Config, flags: int, xs: list[torch.Tensor], inputs: list[Shared]) -> list[Result]:
    chosen = dataclasses.replace(config, flags=int(config.flags) | int(flags))
    results = [allocate(chosen, DEVICE) for _ in xs]
    ranks.launch([make_call(chosen, x, s, r) for x, s, r in zip(xs, inputs, results, strict=True)])
    synchronize()
    return results


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def cases() -> list[Config]:
    made = []
    for (number, dtype), (name, spec) in itertools.product(enumerate(DTYPES), SPECS.items()):
        hidden = 2048 if dtype == torch.float32 else 7168 if name.startswith("group128") else 4096
        for index, outputs in enumerate(OUTPUTS):
            made.append(Config(7 + index, hidden, dtype, spec=spec, outputs=outputs))
        made.append(
            Config(3 * number + 1, hidden // 2, dtype, spec=spec, outputs=OUTPUTS[0], norm_fp32=True, weight="fp32")
        )
        unrounded = dataclasses.replace(spec, unrounded=True)
        made.append(Config(5, 384, dtype, spec=unrounded, outputs=OUTPUTS[1], logical_scales=True))
        made.append(Config(5, 384, dtype, spec=unrounded, outputs=OUTPUTS[1], norm_fp32=True))
    plain = ("residual_out", "norm_out")
    for dtype, residual, weight in itertools.product(DTYPES, ("none", "same", "fp32"), ("none", "same", "fp32")):
        for flags, wide in itertools.product((0, 1, 2), (False, True)):
            if residual == "fp32" and not flags & 1:
                continue
            hidden = 1440 if dtype == torch.float32 else 2880
            made.append(Config(6, hidden, dtype, residual=residual, weight=weight, flags=flags, outputs=plain,
                               norm_fp32=wide, residual_out_fp32=wide))  # fmt: skip
    for hidden, dtype in itertools.product((8, 24, 264, 5120, 8192, 8200, 16384), DTYPES):
        for tokens in (1, 2, 11):
            made.append(Config(tokens, hidden, dtype, outputs=plain))
            made.append(Config(tokens, hidden, dtype, outputs=OUTPUTS[0], spec=SPECS["int8"]))
    for tokens, dtype, name in itertools.product((130, 300, 1000), DTYPES, ("static", "token", "nvfp4_128x4", "int8")):
        wide = 2064 if dtype == torch.float32 else 4112  # enough for CTAs that only push
        hidden = wide if tokens == 300 else 1024
        made.append(Config(tokens, hidden, dtype, spec=SPECS[name], outputs=OUTPUTS[0]))
    for payload, dtype, name in itertools.product(
        ("specials", "nan_rank"), DTYPES, ("static", "int8", "nvfp4_linear", "mxfp8_linear")
    ):
        made.append(Config(11, 1024, dtype, payload=payload, spec=SPECS[name], outputs=OUTPUTS[0]))
    for dtype, name in itertools.product(DTYPES, ("static", "nvfp4_128x4")):  # a number is the same for all owners
        made.append(Config(6, 1024, dtype, factor="value", outputs=plain))
        made.append(Config(6, 1024, dtype, factor="value", spec=SPECS[name], outputs=OUTPUTS[0]))
    return made


def run_sentinels(ranks: Ranks) -> int:
    """Codes whose every word is the sentinel: INT8 of -1, e2m1 of -6, and e4m3 of a cast that gives -NaN."""
    tokens = 2 * ranks.world + 1
    count = 0
    for dtype, hidden in itertools.product(DTYPES, (384, 2048, 4096)):
        shape = (tokens, hidden)
        minus = -torch.ones(shape, dtype=dtype, device=DEVICE)
        spiked = minus.clone()
        spiked[:, 5] = 127.0
        nan = dataclasses.replace(SPECS["static_unclamped"], clamp=False)
        for spec, x, scale in (
            (QuantSpec(QuantFormat.INT8, -1), spiked, None),
            (SPECS["nvfp4_linear"], minus, torch.full((), 448.0 * 6.0 / 5.5, device=DEVICE)),
            (SPECS["nvfp4_128x4"], minus, torch.full((), 448.0 * 6.0 / 5.5, device=DEVICE)),
            (nan, minus, torch.full((), 1e-3, device=DEVICE)),
        ):
            config = Config(tokens, hidden, dtype, spec=spec, outputs=("residual_out", "quant_out"))
            xs = [x, *(torch.zeros_like(x) for _ in range(ranks.world - 1))]
            ones = torch.ones(hidden, dtype=dtype, device=DEVICE)
            shared = Shared(torch.zeros_like(x), ones, scale, 1.0)
            codes = as_bytes(launch(ranks, config, Flags.TWOSHOT, xs, [shared] * ranks.world)[0]["quant_out"])
            share = float((codes == 255).float().mean())
            assert share > 0.99, f"{spec.format.name}: {share:.0%} of the codes are the sentinel's bytes"
            run_case(ranks, config, xs, shared)
            count += 1
    return count


def run_expiry(ranks: Ranks) -> None:
    """Rank 1 is poisoned and sends nothing: rank 0 gives up in time, says so, and all it writes is NaN."""
    ranks.controls[1].view(torch.int32)[1::2] = 1
    for spec, nan in (
        (SPECS["static"], 0x7F),
        (SPECS["token"], 0x7F),
        (SPECS["mxfp8_linear"], 0x7F),
        (SPECS["int8"], 0),
    ):
        ranks.controls[0].zero_()
        ranks.errors[0].zero_()
        config = Config(4, 1024, spec=spec, outputs=("quant_out",), flags=int(Flags.SHARDED | PLACES["last"]))
        xs, shared = [rank_input(config, r, DEVICE) for r in range(2)], shared_inputs(config, DEVICE)
        results = [allocate(config, DEVICE) for _ in xs]
        start = time.time()
        ranks.launch([make_call(config, x, shared, r) for x, r in zip(xs, results, strict=True)], timeout_s=0.2)
        synchronize()
        took = time.time() - start
        record = ranks.errors[0].tolist()
        assert record[0] == 1 and record[1] == 0 and record[2] == 1, record
        assert EMULATED or 0.15 < took < 2, took
        for result in results:
            assert bool((as_bytes(result["quant_out"]) == nan).all()), "the codes of an expired launch are NaN's"
            scales = result.buffers.get("scale_out")
            if scales is not None and scales.tensor.dtype == torch.float32:
                assert bool(scales.tensor.isnan().all())


def main() -> None:
    library = load(sys.argv[1])
    library.arf_set_cast_saturates(0)
    quick = "--quick" in sys.argv
    failures, count, start = [], 0, time.time()

    def attempt(what: str, run) -> None:
        nonlocal count
        count += 1
        try:
            run()
        except AssertionError as error:
            failures.append(f"{what}: {error}")
            if len(failures) <= 20:
                print("FAIL", failures[-1][:500], flush=True)

    everything = cases()
    for world in (3,) if quick else (2, 3, 4, 5, 6, 7, 8):
        ranks = Ranks(library, world, 16 << 20 if quick else 64 << 20)
        for index, config in enumerate(everything):
            if (index + world) % (23 if quick else 4) == 0:
                attempt(f"world {world} {config}", lambda r=ranks, c=config: run_case(r, c))
                if not quick or config.tokens < 12:  # an emulated GPU takes minutes for more
                    attempt(f"world {world} blocks {config}", lambda r=ranks, c=config: run_blocks(r, c))
        attempt(f"world {world} sentinels", lambda r=ranks: run_sentinels(r))
        attempt(f"world {world} buffers", ranks.assert_clean)
        print(f"world {world}: {count} cases, {len(failures)} failures, {time.time() - start:.0f} s", flush=True)
    attempt("expiry", lambda: run_expiry(Ranks(library, 2, 1 << 22)))
    print(f"sharded: {count} cases, {len(failures)} failures, {time.time() - start:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
