"""Hooks that put the pass into serving engines. No engine is imported before its hook is called."""
