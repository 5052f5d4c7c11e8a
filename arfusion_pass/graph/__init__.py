"""Questions about the nodes of a post-grad FX graph, each with one home: whoever asks one imports it from here."""

from arfusion_pass.graph.calls import (
    CASTS,
    PRODUCTS,
    argument,
    aten,
    by_position,
    is_call,
    is_cast,
    only_user,
    other_operand,
    peel,
    prims,
    understood,
    users_of,
    widens,
)
from arfusion_pass.graph.constants import FP32_MAX, constant, multiplies_instead
from arfusion_pass.graph.lines import describe, nearest_line
from arfusion_pass.graph.memory import is_pure, is_returned, is_written, mutated_arguments, owners, says_nothing, viewed
from arfusion_pass.graph.values import (
    dtype_of,
    holds_tensors,
    is_last,
    known_contiguous,
    last_dim,
    same_geometry,
    same_rows,
    same_shape,
    same_size,
    statically_equal,
    tensor_of,
    value_of,
)
from arfusion_pass.graph.views import (
    VIEWS,
    as_many_rows,
    keeps_rows,
    path,
    row_views,
    source_of,
    views_of,
    views_of_all,
    without_views,
)
from arfusion_pass.graph.wholes import parts_of, put_in_order, trains
