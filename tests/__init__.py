"""Tests; the tree mirrors ``arfusion_pass/``."""
