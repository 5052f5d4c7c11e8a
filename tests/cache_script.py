"""Run by ``test_cache_key.py`` in processes of its own: compiles one model on a fake world and prints what happened."""

from __future__ import annotations

import json
import sys
import warnings

import torch
from torch._dynamo.utils import counters

import arfusion_pass as arf
from arfusion_pass.ops import reference
from tests.models import Tensor, llama, reduce
from tests.simulate import all_reduce, fake_world


class Counting(arf.AllReduceFusionPass):
    """Counts its calls."""

    calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        Counting.calls += 1
        super().__call__(graph)


def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return llama(total, w, 1e-6), total


def main() -> None:
    warnings.simplefilter("ignore")
    settings = json.loads(sys.argv[1])
    ran = []

    def simulated(x: Tensor, group: object) -> Tensor:
        ran.append(x.shape)
        return all_reduce(x, group)

    reference.ordered_all_reduce = simulated
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in ((8, 64), (8, 64), (64,))]
    fusion = Counting(arf.FusionConfig(**settings.get("config", {})))
    with fake_world(settings.get("world", 2)):
        outputs = torch.compile(model, fullgraph=True, options={"post_grad_custom_post_pass": fusion})(*inputs)
    print(
        json.dumps(
            {
                "calls": Counting.calls,
                "fused": fusion.reports.matched_count,
                "ran": len(ran),
                "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
                "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
                "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
                "result": [float(output.double().sum()) for output in outputs],
            }
        )
    )


if __name__ == "__main__":
    main()
