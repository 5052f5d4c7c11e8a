"""Reports: what the pass did to each all-reduce and each graph."""
