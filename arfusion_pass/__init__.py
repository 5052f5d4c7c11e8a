"""arfusion_pass: fuse all-reduce, residual add, RMSNorm and quantisation in models compiled with torch.compile.

The public names; everything else is an implementation detail. Importing the package registers the fused ops
(``torch.ops.arfusion``), because a compiled artefact from a cache names them and imports nothing itself; the rest is
imported when it is first used.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():
    # pip installs torch without NumPy, which torch warns of when it is imported, so in front of every command of ours
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    from arfusion_pass import ops as ops
    from arfusion_pass import runtime as _runtime  # noqa: F401  (gives the ops their backends)

if TYPE_CHECKING:
    from arfusion_pass import comm as comm
    from arfusion_pass import inspection as inspection
    from arfusion_pass import testing as testing
    from arfusion_pass.config import FusionConfig as FusionConfig
    from arfusion_pass.fusion_pass import AllReduceFusionPass as AllReduceFusionPass
    from arfusion_pass.fusion_pass import fuse as fuse
    from arfusion_pass.fusion_pass import reports as reports
    from arfusion_pass.groups import register_group as register_group
    from arfusion_pass.install import enable as enable
    from arfusion_pass.install import inductor_options as inductor_options
    from arfusion_pass.reporting.reports import FusionReport as FusionReport
    from arfusion_pass.reporting.reports import Reports as Reports
    from arfusion_pass.reporting.sites import Site as Site
    from arfusion_pass.runtime.workspace import ExchangeError as ExchangeError
    from arfusion_pass.runtime.workspace import ExchangeOverlap as ExchangeOverlap
    from arfusion_pass.runtime.workspace import ExchangeTimeout as ExchangeTimeout
    from arfusion_pass.runtime.workspace import check as check
    from arfusion_pass.runtime.workspace import prepare as prepare

__version__ = "0.1.0"

_HOMES = {
    "AllReduceFusionPass": "arfusion_pass.fusion_pass",
    "enable": "arfusion_pass.install",
    "fuse": "arfusion_pass.fusion_pass",
    "inductor_options": "arfusion_pass.install",
    "reports": "arfusion_pass.fusion_pass",
    "FusionConfig": "arfusion_pass.config",
    "FusionReport": "arfusion_pass.reporting.reports",
    "Reports": "arfusion_pass.reporting.reports",
    "Site": "arfusion_pass.reporting.sites",
    "register_group": "arfusion_pass.groups",
    "ExchangeError": "arfusion_pass.runtime.workspace",
    "ExchangeOverlap": "arfusion_pass.runtime.workspace",
    "ExchangeTimeout": "arfusion_pass.runtime.workspace",
    "check": "arfusion_pass.runtime.workspace",
    "prepare": "arfusion_pass.runtime.workspace",
}
_MODULES = ("comm", "inspection", "testing")

__all__ = [
    "AllReduceFusionPass",
    "ExchangeError",
    "ExchangeOverlap",
    "ExchangeTimeout",
    "FusionConfig",
    "FusionReport",
    "Reports",
    "Site",
    "check",
    "comm",
    "enable",
    "fuse",
    "inductor_options",
    "inspection",
    "ops",
    "prepare",
    "register_group",
    "reports",
    "testing",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"arfusion_pass.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    close = difflib.get_close_matches(name, __all__, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise AttributeError(f"module 'arfusion_pass' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
