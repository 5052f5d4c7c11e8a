"""Random functions as people write them: in-place ops, views, collectives in place, what is returned is written to; and
as servers' models have them: caches, masks, branches, several groups.

What Dynamo and AOT autograd make of such code are other graphs than those that ``test_random_graphs.Program`` traces:
copies, scatters, and writes to inputs at the end.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx

from tests.models import Tensor, divided, gemma, llama, reduce
from tests.simulate import captured

SHAPES = ((5,), (1,), (2, 3), (1, 2, 1), (1, 1, 4))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def in_place(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


# None permutes: what simulated ranks send depends on where an element lies.
REDUCE: tuple[Callable[[Tensor], Tensor], ...] = (
    reduce,
    lambda x: in_place(x.clone()),
    lambda x: reduce(x.float()).to(x.dtype),
    lambda x: reduce(x.reshape(-1, x.shape[-1])).view(x.shape),
    lambda x: in_place(x[None].clone())[0],
    lambda x: torch.cat([reduce(x)], 0),
)
NORM: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
    lambda x, w: F.rms_norm(x.reshape(-1, x.shape[-1]), x.shape[-1:], None, 1e-6).view(x.shape),
    lambda x, w: llama(x, w, 1e-5),
    lambda x, w: gemma(x, w, 1e-6),
    lambda x, w: divided(x, w, 1e-6),
    lambda x, w: x.clone().copy_(llama(x, w, 1e-6)),
)


class Program:
    """A function of ``x`` and a residual ``[..., H]``, a weight and a bias ``[H]``, decided by a seed."""

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        self.steps = [choose.random() for _ in range(200)]
        self.count = choose.randint(1, 7)
        self.dtype = choose.choice(DTYPES)
        hidden = choose.choice((16, 32))
        self.shapes = [(*choose.choice(SHAPES), hidden)] * 2 + [(hidden,)] * 2

    def graph(self) -> fx.GraphModule:
        """What torch.compile hands to the post-grad hook."""
        return captured(self, [torch.ones(shape, dtype=self.dtype) for shape in self.shapes])

    def __call__(self, x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        steps = iter(self.steps)

        def draw(count: int) -> int:
            return int(next(steps) * count)

        def row() -> Tensor:
            return rows[draw(len(rows))]

        rows, given, total = [x, r], [], r
        for _ in range(self.count):
            step = draw(10)
            if step == 0:
                rows.append(REDUCE[draw(len(REDUCE))](row()))
            elif step <= 2:
                total = total + REDUCE[draw(len(REDUCE))](row())
                rows.append(total)
            elif step <= 4:
                rows.append(NORM[draw(len(NORM))](total, w))
                given.append(rows[-1])
            elif step == 5:
                row().add_(row(), alpha=0.5)
            elif step == 6:
                row()[..., : x.shape[-1] // 2].mul_(0.5)
            elif step == 7:  # in other strides
                rows.append(row().transpose(0, -1).contiguous().transpose(0, -1))
            elif step == 8:
                rows.append(row() * torch.sigmoid(row()) + b)
            else:
                given.append(row())
        reduced = REDUCE[draw(len(REDUCE))](rows[-1])
        total = total + reduced
        norm = NORM[draw(len(NORM))](total, w)
        given += [norm, total, reduced][: 1 + draw(3)]
        if draw(4) == 0:
            norm.mul_(2)
        if draw(4) == 0:
            total.add_(1)
        return tuple(given)


@functools.cache
def other_group(world: dist.ProcessGroup) -> str:
    """The name of a second group of the same ranks."""
    return dist.new_group(list(range(world.size()))).group_name


class Served:
    """A function of rows ``[..., H]``, a residual, a weight and a bias ``[H]``, a cache of 8 rows that is written to, a
    mask, one number in each of three dtypes and a switch, decided by a seed."""

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        self.steps = [choose.random() for _ in range(200)]
        self.count = choose.randint(2, 8)
        self.dtype = choose.choice(DTYPES)
        self.lead, self.hidden = choose.choice(((5,), (1,), (2, 3))), choose.choice((16, 32))
        self.other = other_group(dist.group.WORLD)

    def graph(self) -> fx.GraphModule:
        """What torch.compile hands to the post-grad hook."""
        rows, row = (*self.lead, self.hidden), (self.hidden,)
        shapes = (rows, rows, row, row, (8, *rows[1:]))
        examples = [torch.ones(shape, dtype=self.dtype) for shape in shapes]
        numbers = [torch.ones((), dtype=dtype) for dtype in (torch.float32, torch.float64, self.dtype)]
        return captured(self, [*examples, torch.ones(rows) > 0, *numbers, torch.tensor(True)])

    def __call__(
        self, x: Tensor, r: Tensor, w: Tensor, b: Tensor, cache: Tensor, mask: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        *numbers, switch = others
        steps = iter(self.steps)

        def draw(count: int) -> int:
            return int(next(steps) * count)

        def row() -> Tensor:
            return rows[draw(len(rows))]

        def reduced(value: Tensor) -> Tensor:
            kind = draw(6)
            if kind == 0:
                return reduce(value, self.other)
            if kind == 1:
                return reduce(reduce(value, self.other))
            if kind == 2:
                return reduce(torch.where(mask, value, 0.0))
            if kind == 3:
                return torch.cond(switch, lambda v: reduce(v), lambda v: v * 2, (value,))
            return REDUCE[draw(len(REDUCE))](value)

        def norm(value: Tensor) -> Tensor:
            return NORM[draw(len(NORM))](value, (w, w, b, w + numbers[2])[draw(4)])

        rows, given, total = [x, r], [], r
        for _ in range(self.count):
            step = draw(12)
            if step == 0:
                rows.append(reduced(row()))
            elif step <= 3:
                total = torch.add(total, reduced(row()), alpha=1 + draw(2))
                rows.append(total)
            elif step <= 5:
                rows.append(norm(total))
                given.append(rows[-1])
            elif step == 6:
                rows.append((row() * numbers[draw(3)]).to(x.dtype))
            elif step == 7:
                rows.append(torch.where(mask, row(), (total, numbers[2], 0.0)[draw(3)]))
            elif step == 8:  # a cache is written, and read again
                cache[: x.shape[0]].copy_(norm(total))
                rows.append(cache[: x.shape[0]] * 1)
            elif step == 9:
                rows += torch.cond(
                    switch,
                    lambda t, n: (t * 2, llama(reduce(n) + t, w, 1e-6)),
                    lambda t, n: (t + 1, n * 1),
                    (total, norm(total)),
                )
            elif step == 10:
                wide = llama(reduce(torch.cat([row(), total], -1)), torch.cat([w, b]), 1e-6)
                rows.append(wide[..., x.shape[-1] :] * 1)
                given.append(wide)
            else:
                torch.mul(row(), 2, out=rows[draw(len(rows))])
        total = total + reduced(rows[-1])
        given += [norm(total), total]
        (given[-1], given[-2], x, r)[draw(4)].copy_(total if draw(2) else row())
        return tuple(given)
