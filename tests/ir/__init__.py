"""Tests of the canonical one-stage ops."""
