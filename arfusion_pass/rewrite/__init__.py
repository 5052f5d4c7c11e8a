"""A graph's way from raise to commit: read every site, match the patterns, write what fused."""
