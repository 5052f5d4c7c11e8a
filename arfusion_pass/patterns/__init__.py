"""Pattern/replacement classes over the canonical ops; they know neither engines nor kernels."""
