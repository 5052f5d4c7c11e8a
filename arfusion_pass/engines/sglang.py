"""SGLang hook, for servers started with ``--enable-torch-compile``::

    from arfusion_pass.engines import sglang
    fusion = sglang.enable()                     # in each worker, before the model is compiled
    ... fusion.report

It installs the pass in Inductor's global config, behind a pass that is there already, and registers SGLang's groups.

Nothing of this has run with SGLang itself, only with ops under its schemas. What is known of its source: its
*piecewise* graphs put a pass manager of their own into Inductor's config and cut the graph at
``inplace_all_reduce``, so that no all-reduce and its norm share a graph there; only the out-of-place all-reduce of
the plain ``torch.compile`` path fuses.
"""

from __future__ import annotations

import importlib

from torch._inductor import config as inductor_config

from arfusion_pass.config import FusionConfig
from arfusion_pass.engines.groups import register_coordinators
from arfusion_pass.fusion_pass import AllReduceFusionPass
from arfusion_pass.install import HOOK, chained


def enable(config: FusionConfig | None = None) -> AllReduceFusionPass:
    """Install the pass for everything that this process compiles from now on; a second call replaces the first's."""
    register_groups()
    fusion = AllReduceFusionPass(config)
    setattr(inductor_config, HOOK, chained(getattr(inductor_config, HOOK), fusion))
    return fusion


def register_groups() -> list[str]:
    """Register SGLang's groups under SGLang's names; gives the names. They must exist already."""
    return register_coordinators(importlib.import_module("sglang.srt.distributed.parallel_state"))
