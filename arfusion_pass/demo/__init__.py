"""``arfusion demo``: a Llama-like tensor-parallel model, compiled with and without the pass and compared."""
