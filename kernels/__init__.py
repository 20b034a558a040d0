"""Triton kernels of the ops: the backend "triton". Imported as ``mta_fast.kernels``.

One file per op, named as in ``mta_fast/ops``; ``gram`` is the part of the span pairs for rows with many spans. In each
file the kernels come first, then the function that the op calls. The formulas are those of ``mta_fast/reference.py``;
comments here say only how they are laid out on the device. ``_device`` holds what kernels share, ``_rows`` how
importance deals out rows to programs, ``_launch`` how kernels are launched, ``_table`` with which blocks.
"""

from mta_fast import reference
from mta_fast.contract import checked
from mta_fast.kernels.hidden_alignment import hidden_alignment
from mta_fast.kernels.importance import token_importance
from mta_fast.kernels.linear_divergence import linear_divergence
from mta_fast.kernels.pooling import pool_spans, pool_spans_gradient, span_weights
from mta_fast.kernels.span_pairs import span_pairs

# torch's own kernels do these
hidden_alignment_gradient = checked(reference.hidden_alignment_gradient)
linear_divergence_gradient = checked(reference.linear_divergence_gradient)
span_pairs_gradient = checked(reference.span_pairs_gradient)

__all__ = [
    "hidden_alignment",
    "hidden_alignment_gradient",
    "linear_divergence",
    "linear_divergence_gradient",
    "pool_spans",
    "pool_spans_gradient",
    "span_pairs",
    "span_pairs_gradient",
    "span_weights",
    "token_importance",
]
