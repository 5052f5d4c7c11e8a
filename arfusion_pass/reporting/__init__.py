"""Reports: what the pass did to each all-reduce (``sites``), to each graph (``reports``), and as text (``tables``)."""
