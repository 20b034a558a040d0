"""Token importance: how much each token is attended by the others of its row."""

from __future__ import annotations

from torch import Tensor

from mta_fast import backends
from mta_fast.errors import InputError
from mta_fast.layout import Rows, compute_dtype
from mta_fast.ops._common import check_float, flat, make_rows
from mta_fast.ops._operator import fake, fitting, operator


def token_importance(
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    rows: Rows | None = None,
    causal: bool = False,
    count_padding: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Importance of each token (arXiv 2605.01374; formula: ``mta_fast/reference.py``, part 1); detached.

    a_j = mean over the row's tokens i of softmax_j(z_i . z_j / sqrt(d)), with z = h / (std(h) + 1e-5), no
    self-loop and no padding. It is 0 at padding and sums to 1 over a row (the causal form to (n - 1) / n); in a row
    of one token it is 1.

    Args:
        hidden: [B, S, d] padded (left or right) or [T, d] packed; d >= 2; any floating dtype.
        attention_mask: [B, S], non-zero at real tokens; None: all are. On a GPU it costs one synchronisation:
            pass ``rows`` of a SpanBatch to avoid it (and under ``torch.compile(fullgraph=True)``).
        cu_seqlens: [B + 1] bounds of packed rows.
        rows: ready-made ``Rows`` instead of either.
        causal: only earlier tokens are attended.
        count_padding: the mean runs over all S positions, padded queries attending to real keys (the public
            scripts); it needs a padded batch, and then padding does change the result.
        backend: "auto" or a backend's name.

    Returns:
        [B, S] or [T]: float64 for float64 input, else float32.

    Raises:
        InputError: shape or dtype; a mask with holes; ``count_padding`` with packed rows.
    """
    check_float("hidden", hidden, (2, 3))
    if hidden.shape[-1] < 2:
        raise InputError(f"hidden: expected a width of at least 2 (its standard deviation), got {hidden.shape[-1]}")
    backends.check_name(backend)
    made = make_rows(hidden, attention_mask, cu_seqlens, rows)
    if count_padding and len(made.shape) != 2:
        raise InputError("count_padding: expected a padded batch [B, S, d], got packed rows, which have no padding")
    seq_len = made.shape[-1]
    op = fitting(_token_importance, made.host)
    values = op(flat(hidden.detach()), made.table, made.host, seq_len, causal, count_padding, backend)
    return values.reshape(hidden.shape[:-1])


@operator("token_importance", reads_lengths=True)
def _token_importance(
    hidden: Tensor, rows: Tensor, rows_host: Tensor, seq_len: int, causal: bool, count_padding: bool, backend: str
) -> Tensor:
    """hidden [T, d], rows [B, 2] on its device and on the host -> [T]."""
    result: Tensor = backends.run(
        "token_importance", backend, [hidden], hidden, rows, rows_host, seq_len, causal, count_padding
    )
    return result


@fake(_token_importance)
def _(
    hidden: Tensor, rows: Tensor, rows_host: Tensor, seq_len: int, causal: bool, count_padding: bool, backend: str
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
