"""The fused torch ops: schema, fake implementation, reference. Importing this package defines them."""

from arfusion_pass.ops import library

__all__ = ["library"]
