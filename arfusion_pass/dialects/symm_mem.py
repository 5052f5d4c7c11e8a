"""torch's symmetric-memory all-reduces, called directly.

%ar = symm_mem.one_shot_all_reduce.default(%x, "sum", "0")          # or multimem_one_shot_all_reduce
"""

from __future__ import annotations

from arfusion_pass.dialects.reading.custom_ops import CustomOpDialect, functional_all_reduce, refused

_IN_PLACE = refused("{node} reduces in place in symmetric memory; one_shot_all_reduce is fused")
_COPY = refused("{node} copies into a buffer that others may read; one_shot_all_reduce is fused")

DIALECT = CustomOpDialect(
    "symm_mem",
    {
        "symm_mem::one_shot_all_reduce": functional_all_reduce("input", "group_name", "reduce_op"),
        "symm_mem::multimem_one_shot_all_reduce": functional_all_reduce("input", "group_name", "reduce_op"),
        "symm_mem::two_shot_all_reduce_": _IN_PLACE,
        "symm_mem::multimem_all_reduce_": _IN_PLACE,
        "symm_mem::one_shot_all_reduce_out": _IN_PLACE,
        "symm_mem::two_shot_all_reduce_out": _IN_PLACE,
        "symm_mem::multimem_one_shot_all_reduce_out": _IN_PLACE,
        "symm_mem::one_shot_all_reduce_copy": _COPY,
        "symm_mem::one_shot_all_reduce_copy_out": _COPY,
    },
)
