"""Tests of the fused ops: schema, checks, reference, quantisers, layouts."""
