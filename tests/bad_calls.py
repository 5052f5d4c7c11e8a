"""Calls of the fused ops, right ones and ones broken in one or two places: what every back-end has to refuse alike."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from arfusion_pass.ops import checks, library
from arfusion_pass.ops.schema import OUTPUT_NAMES
from arfusion_pass.ops.spec import NO_QUANT, Flags, QuantFormat
from tests.ops.cases import SPECS, outputs

HIDDEN = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OTHER_DTYPES = (
    *DTYPES,
    *(torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64),
)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4028235e38, 3.4028236e38, 1e39, -1e39, 1e308, float("inf"), float("nan"))
FLAGS = (
    1,
    2,
    3,
    1 << 2,
    1 << 3,
    3 << 3,
    1 << 5,
    1 << 7,
    1 << 8,
    1 << 9,
    3 << 8,
    1 << 10,
    1 << 11,
    1 << 15,
    1 << 16,
    0xF0000,
    1 << 20,
    1 << 31,
    -1,
)
REQUIRED = ("x", "expert_x", "expert_scale", "permuted_x", "index")
"""Arguments that no call of some op may leave out: None is refused by torch's own schema."""


@dataclasses.dataclass
class BadCall:
    """One call: the op, its arguments, and what was done to them."""

    op: str
    arguments: dict[str, Any]
    what: str

    def refusal(self) -> str | None:
        """What the checks say, or None where the call is right."""
        try:
            checks.check_call(checks.FusedCall.bind(self.op, dict(self.arguments)), eager=True)
        except ValueError as error:
            return str(error)
        return None

    def run(self) -> None:
        """Call the op."""
        library.fused_op(self.op)(**self.arguments)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors given, by name."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}


def good_call(random: random.Random) -> BadCall:
    """A right call: any op, dtype, token count, quantiser and set of outputs."""
    dtype, tokens = random.choice(DTYPES), random.choice((1, 2, 5))
    op = random.choice(("allreduce", "allreduce", "moe_reduce_allreduce", "moe_finalize_allreduce")) + "_rms_norm"
    spec = random.choice((NO_QUANT, *SPECS.values()))

    def rows(count: int = tokens, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(count, HIDDEN, dtype=dtype)

    inputs: dict[str, Any] = {"x": rows()}
    if op.startswith("moe_reduce"):
        inputs = {"expert_x": rows(3 * tokens).view(3, tokens, HIDDEN), "expert_scale": torch.ones(3, tokens)}
        inputs["token_input"] = random.choice((None, rows()))
    elif op.startswith("moe_finalize"):
        index = torch.zeros(tokens, 2, dtype=torch.int32)
        inputs = {"permuted_x": rows(7), "index": index, "expert_scale": random.choice((None, torch.ones(tokens, 2)))}
        inputs.update(shared=random.choice((None, rows())), routed_scaling_factor=1.0)
    written = outputs((tokens, HIDDEN), dtype, spec)
    for name in random.sample(("allreduce_out", "residual_out", "norm_out"), random.randrange(3)):
        del written[name]
    takes_scale = spec.is_static or spec.format == QuantFormat.NVFP4
    arguments = {
        **inputs,
        "residual": random.choice((None, rows())),
        "weight": random.choice((None, torch.ones(HIDDEN, dtype=dtype), torch.ones(HIDDEN))),
        "scale": torch.ones(1) if takes_scale and random.random() < 0.5 else None,
        "group_name": "",
        "epsilon": 1e-6,
        "weight_bias": 0.0,
        "flags": int(random.choice((0, Flags.ROUND_BEFORE_WEIGHT, Flags.UNROUNDED_SUM, Flags.DIVIDE_BY_ROOT))),
        "quant": spec.pack(),
        "quant_bound": spec.bound,
        "scale_value": 1.0,
        "addend": random.choice((None, None, rows(), torch.ones(HIDDEN, dtype=dtype))),
        "epsilon_tensor": random.choice((None, None, torch.ones(1), torch.ones((), dtype=torch.float64))),
        "factor": random.choice((None, None, torch.ones(1), torch.ones(tokens, 1, dtype=dtype))),
        "factor_value": random.choice((1.0, 1.0, 0.5)),
        **dict.fromkeys(OUTPUT_NAMES),
        **written,
    }
    if arguments["addend"] is not None and arguments["residual"] is not None and random.random() < 0.5:
        arguments["flags"] |= int(Flags.ADDEND_LAST)
    return BadCall(op, arguments, "as it should be")


def calls(count: int, seed: int) -> Iterator[BadCall]:
    """``count`` calls, about one in eight of them right."""
    chance = random.Random(seed)
    for _ in range(count):
        call = good_call(chance)
        done = [_break(call, chance) for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 2, 2)))]
        call.what = f"{call.op}: " + (", ".join(done) or call.what)
        yield call


def _break(call: BadCall, chance: random.Random) -> str:
    """Change one argument; what was done."""
    if chance.random() < 0.3:
        return _number(call, chance)
    name = chance.choice(sorted(call.tensors()))
    kind = chance.choice(sorted(CHANGES))
    changed = CHANGES[kind](call, call.arguments[name], chance)
    if changed is None and name in REQUIRED:
        return "nothing"
    call.arguments[name] = changed
    return f"{name} {kind}"


def _number(call: BadCall, chance: random.Random) -> str:
    name = chance.choice(("epsilon", "weight_bias", "quant_bound", "scale_value", "flags", "quant", "factor"))
    if name == "flags":
        call.arguments[name] ^= chance.choice(FLAGS) & ~int(Flags.RECORD)
    elif name == "quant":
        call.arguments[name] ^= 1 << chance.randrange(40)
    elif name == "factor":
        if "routed_scaling_factor" not in call.arguments:
            return "nothing"
        call.arguments["routed_scaling_factor"] = chance.choice(NUMBERS)
    else:
        call.arguments[name] = chance.choice(NUMBERS)
    return f"{name} = {call.arguments.get(name)}"


def _dtype(call: BadCall, tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=chance.choice(OTHER_DTYPES))


def _shape(call: BadCall, tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    shape = list(tensor.shape)
    dim = chance.randrange(len(shape)) if shape else 0
    kind = chance.randrange(5)
    if kind == 0 and shape:
        shape[dim] = max(0, shape[dim] + chance.choice((-8, -1, 1, 8)))
    elif kind == 1:
        shape.insert(dim, chance.choice((1, 2)))
    elif kind == 2 and shape:
        del shape[dim]
    elif kind == 3:
        shape = [tensor.numel()]
    elif shape:
        shape[dim] = 0
    return torch.zeros(shape, dtype=tensor.dtype)


def _strides(call: BadCall, tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """The same shape in memory of another shape: rows apart (legal for some), repeated, overlapping, transposed."""
    if tensor.dim() == 0:
        return tensor
    strides = list(tensor.stride())
    dim = chance.randrange(tensor.dim())
    strides[dim] = chance.choice((0, 1, 2, strides[dim] * 2, strides[dim] + 8, max(strides[dim] - 8, 0)))
    if chance.random() < 0.2:
        strides.reverse()
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True) if n)
    return torch.zeros(max(size, 1) + 8, dtype=tensor.dtype).as_strided(tensor.shape, strides)


def _memory(call: BadCall, tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """In another argument's memory: all of it, from some byte on, or overlapping its end."""
    other = call.arguments[chance.choice(sorted(call.tensors()))]
    if other is tensor or other.layout != torch.strided or other.device.type != "cpu" or tensor.numel() == 0:
        return tensor
    nbytes = tensor.numel() * tensor.itemsize
    spare = other.untyped_storage().nbytes()
    shared = torch.zeros(2 * nbytes + spare, dtype=torch.uint8)
    at = nbytes // 16 * 16
    for name, value in list(call.tensors().items()):
        if value is other:
            moved = torch.empty(0, dtype=other.dtype).set_(
                shared.untyped_storage(), at // other.itemsize + other.storage_offset(), other.shape, other.stride()
            )
            call.arguments[name] = moved
    start = max(0, at + chance.choice((0, 0, 0, 16, -16, spare // 16 * 16, HIDDEN, -nbytes // 16 * 16)))
    where = shared.untyped_storage()
    flat = torch.empty(0, dtype=tensor.dtype)
    return flat.set_(where, start // tensor.itemsize, tensor.shape, torch.empty(tensor.shape, device="meta").stride())


def _sparse(call: BadCall, tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (4,), check_invariants=True)


def _freed(call: BadCall, tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """The same tensor, whose storage was freed or made smaller afterwards."""
    moved = torch.ones(tensor.numel() + 64, dtype=tensor.dtype)[64:].view(tensor.shape)
    before = 64 * moved.itemsize
    moved.untyped_storage().resize_(chance.choice((0, before, before + max(moved.nbytes - 1, 0))))
    return moved


CHANGES: dict[str, Callable[[BadCall, torch.Tensor, random.Random], torch.Tensor | None]] = {
    "dtype": _dtype,
    "shape": _shape,
    "strides": _strides,
    "memory": _memory,
    "more memory": _memory,
    "sparse": _sparse,
    "freed": _freed,
    "device": lambda call, tensor, chance: tensor.to("meta"),
    "missing": lambda call, tensor, chance: None,
}
