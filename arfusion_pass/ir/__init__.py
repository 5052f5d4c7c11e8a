"""Canonical one-stage ops: what dialects raise to and patterns match on. Importing this package defines them."""

from arfusion_pass.ir import ops

__all__ = ["ops"]
