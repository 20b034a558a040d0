"""What the C++ ops refuse: before a pointer is touched, with the argument, what was expected and what came."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mta_fast import _extension, backends
from mta_fast.errors import BackendUnavailableError, InputError

if reason := _extension.why_missing():
    pytest.skip(reason, allow_module_level=True)
INT = torch.int32
OPS = torch.ops.mta_fast_cpp


def _index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=INT)


H, W = torch.ones(4, 3), torch.ones(4)
BAD: list[tuple[str, Callable[[], Any]]] = [
    ("hidden: expected 2 dimensions, got 1", lambda: OPS.token_importance(W, _index(0, 4).view(1, 2), 4, False, False)),
    ("hidden: expected float64, float32, bfloat16 or float16, got Int",
     lambda: OPS.token_importance(H.int(), _index(0, 4).view(1, 2), 4, False, False)),
    ("hidden: expected a width of at least 2, got 1",
     lambda: OPS.token_importance(H[:, :1], _index(0, 4).view(1, 2), 4, False, False)),
    ("rows_host: expected int32, got Long",
     lambda: OPS.token_importance(H, torch.tensor([[0, 4]]), 4, False, False)),
    ("rows_host: expected rows within the tokens, got row 0 from 1 of length 4",
     lambda: OPS.token_importance(H, _index(1, 4).view(1, 2), 4, False, False)),
    ("rows_host: expected rows within the tokens",
     lambda: OPS.token_importance(H, _index(0, 4).view(1, 2), 5, False, True)),
    ("ranges: expected indices from 0 to 4, got 5", lambda: OPS.pool_spans(H, W, _index(3, 5).view(1, 2))),
    ("ranges: expected indices from 0 to 4, got -1", lambda: OPS.pool_spans(H, W, _index(-1, 2).view(1, 2))),
    ("weights: expected 4 tokens, as in hidden, got 3", lambda: OPS.pool_spans(H, W[1:], _index(0, 1).view(1, 2))),
    ("token_splits: expected 5 bounds, got 2",
     lambda: OPS.pool_spans_gradient(H[:1], W[:1], W, _index(0, 1), _index(0), torch.float32)),
    ("token_splits: expected no decrease, got 0",
     lambda: OPS.pool_spans_gradient(H[:1], W[:1], W, _index(0, 1, 0, 1, 1), _index(0), torch.float32)),
    ("cover_spans: expected indices from 0 to 0, got 1",
     lambda: OPS.pool_spans_gradient(H[:1], W[:1], W, _index(0, 1, 1, 1, 1), _index(1), torch.float32)),
    ("span_splits: expected 1 last, got 2",
     lambda: OPS.span_weights(W, _index(0, 1).view(1, 2), _index(0, 2), _index(0), _index(0, 1), _index(0, 1))),
    ("covered: expected indices from 0 to 3, got 4",
     lambda: OPS.span_weights(W, _index(0, 1).view(1, 2), _index(0, 1), _index(4), _index(0, 1), _index(0, 1))),
    ("covered: expected ascending values, got 0 after 3",
     lambda: OPS.span_weights(W, _index(0, 1).view(1, 2), _index(0, 1), _index(3, 0), _index(0, 2), _index(0, 1, 2))),
    ("rows_host: expected rows that ascend and don't overlap, got row 1 from 1",
     lambda: OPS.token_importance(H, _index(0, 2, 1, 2).view(2, 2), 4, False, False)),
    ("student, teacher: expected widths of at least 1, got 0 and 0",
     lambda: OPS.hidden_alignment(H[:, :0], H[:, :0], _index(0), W[:1], H[:0, :0], None, torch.float32, True)),
    ("teacher: expected 4 spans, as in student, got 3",
     lambda: OPS.span_pairs(H, H[1:], W, W, W, _index(0, 4), -1, True)),
    ("student_norm: expected 4 spans, as in student, got 3",
     lambda: OPS.span_pairs(H, H, W, W[1:], W, _index(0, 4), -1, True)),
    ("span_splits: expected 4 last, got 3", lambda: OPS.span_pairs(H, H, W, W, W, _index(0, 3), -1, True)),
    ("span_rows: expected indices from 0 to 0, got 1",
     lambda: OPS.span_pairs_gradient(H, W[:1], _index(0, 0, 0, 1), torch.float32)),
    ("tokens: expected indices from 0 to 3, got 4",
     lambda: OPS.hidden_alignment(H, H, _index(4), W[:1], torch.ones(3, 3), None, torch.float32, True)),
    ("proj_weight: expected 3 rows, the teacher's width, got 2",
     lambda: OPS.hidden_alignment(H, H, _index(0), W[:1], torch.ones(2, 3), None, torch.float32, True)),
    ("proj_bias: expected 3 values, the teacher's width, got 4",
     lambda: OPS.hidden_alignment(H, H, _index(0), W[:1], torch.ones(3, 3), W, torch.float32, True)),
    ("tokens: expected indices from 0 to 3, got 4",
     lambda: OPS.hidden_alignment_gradient(H[:1], H, W, _index(4), W[0], 4, *[torch.float32] * 3)),
    ("dtype: expected a floating dtype, got Int",
     lambda: OPS.hidden_alignment_gradient(H[:1], H, W, _index(0), W[0], 4, INT, torch.float32, torch.float32)),
    ("ranges: expected 2 columns, got 1", lambda: OPS.pool_spans(H, W, _index(0, 1).view(2, 1))),
    ("ranges: expected 2 columns, got 0", lambda: OPS.pool_spans(H, W, torch.zeros(3, 0, dtype=INT))),
    ("ranges: expected start <= end in every row, got (2, 1) in row 0",
     lambda: OPS.pool_spans(H, W, _index(2, 1).view(1, 2))),
    ("ranges: expected 2 columns, got 1",
     lambda: OPS.span_weights(W, _index(0).view(1, 1), _index(0, 1), _index(0), _index(0, 1), _index(0, 1))),
    ("cover_splits: expected no decrease, got -5",
     lambda: OPS.span_weights(W, _index(0, 1).view(1, 2), _index(0, 1), _index(0), _index(0, 1), _index(0, -5))),
    ("span_splits: expected at least 1 value, got none",
     lambda: OPS.span_weights(W, _index(0, 1).view(1, 2), _index(), _index(0), _index(0, 1), _index(0, 1))),
    ("seq_len: expected positions of a row, 0 to 2^31 - 1, got 4611686018427387904",
     lambda: OPS.token_importance(H, _index(0, 2, 2, 2).view(2, 2), 2**62, False, True)),
    ("gram_from: expected a number of spans, or -1 for none, got -2",
     lambda: OPS.span_pairs(H, H, W, W, W, _index(0, 4), -2, True)),
    ("tokens: expected distinct indices, got 0 twice",
     lambda: OPS.hidden_alignment(H, H, _index(0, 1, 0), W[:3], torch.ones(3, 3), None, torch.float32, True)),
    *[(f"num_tokens: expected a number of tokens from 0 to 2^31 - 1, got {number}",
       lambda number=number: OPS.hidden_alignment_gradient(
           H[:0], H, W, _index(), W[0], number, *[torch.float32] * 3)) for number in (-1, 2**31, 2**62)],
    ("rows: expected 3 columns, as in weight, got 2",
     lambda: OPS.hidden_alignment_gradient(H[:1, :2], H, W, _index(0), W[0], 4, *[torch.float32] * 3)),
    ("bias: expected no values or 4, as weight has rows, got 3",
     lambda: OPS.hidden_alignment_gradient(H[:1], H, W[:3], _index(0), W[0], 4, *[torch.float32] * 3)),
    ("hidden: expected a tensor, got None", lambda: OPS.pool_spans(None, W, _index(0, 1).view(1, 2))),
    ("weights: expected a tensor on the CPU, got one elsewhere",
     lambda: OPS.pool_spans(H, W.to("meta"), _index(0, 1).view(1, 2))),
    ("hidden: expected a dense tensor (torch.strided), got one of another layout",
     lambda: OPS.pool_spans(H.to_sparse(), W, _index(0, 1).view(1, 2))),
    ("hidden: expected sizes below 2^31, got 4294967296",
     lambda: OPS.pool_spans(H[:1].expand(2**32, 3), W, _index(0, 1).view(1, 2))),
    ("char_spans: expected 0 <= start <= end, got (3, 1) in row 0",
     lambda: OPS.token_ranges(*(torch.tensor(x) for x in ([[0, 4]], [[0, 1]], [0], [[3, 1]])), None, None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_bad_input_is_refused_before_a_pointer_is_touched(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError) as error:
        call()
    assert message in str(error.value)


def test_other_devices_are_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="got cpp: expected CPU tensors, got meta"):
        backends.choose("token_importance", [torch.empty(2, 2, device="meta")], "cpp")


def test_an_index_beyond_int32_is_refused_not_wrapped() -> None:
    from mta_fast import cpp

    tokens = torch.tensor([2**32 + 1])
    with pytest.raises(InputError, match=r"tokens: expected indices below 2\^31, got 4294967297 to 4294967297"):
        cpp.hidden_alignment(H, H, tokens, W[:1], torch.ones(3, 3), None, torch.float32)


# the same refusals stand before the other backends, which would read the wrong memory or none
SPANS = [[[0, 1]], [0], [0, 1], [0], [0], [0, 1], [0, 1], [0], [0, 1, 1, 1, 1], [[0, 0], [1, 1]]]
WRONG_SPANS: list[tuple[str, int, Any]] = [
    ("spans.ranges: expected shape [any, 2], got [1, 1]", 0, [[0]]),
    ("spans.ranges: expected indices from 0 to 4, got 5", 0, [[3, 5]]),
    ("spans.ranges: expected start <= end, got (1, 0)", 0, [[1, 0]]),
    ("spans.span_splits: expected 0 first, no decrease and 1 last, got [0, 2]", 2, [0, 2]),
    ("spans.covered: expected indices from 0 to 3, got -1", 3, [-1]),
    ("spans.cover_spans: expected indices from 0 to 0, got 1", 7, [1]),
    ("spans.token_splits: expected shape [5], got [2]", 8, [0, 1]),
    ("spans.host: expected the running number of tokens", 9, [[0, 0], [1, 7]]),
]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("message", "at", "values"), WRONG_SPANS, ids=[message for message, _, _ in WRONG_SPANS])
def test_the_other_backends_refuse_wrong_spans(message: str, at: int, values: Any, backend: str) -> None:
    from mta_fast.ops import pooling  # noqa: F401  # registers the op

    if reasons := backends.BACKENDS[backend].reasons_against("span_weights", [W]):
        pytest.skip(reasons[0])
    spans = [torch.tensor(values if i == at else right, dtype=INT) for i, right in enumerate(SPANS)]
    with pytest.raises(InputError) as error:
        torch.ops.mta_fast.span_weights(W, spans, backend)
    assert message in str(error.value)


def test_every_op_survives_random_wrong_calls(tmp_path: Path) -> None:
    here, log = Path(__file__).parent, tmp_path / "cases"
    command = [sys.executable, str(here / "op_fuzz.py"), "0", "1500", str(log)]
    made = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert made.returncode == 0, f"{log.read_text().splitlines()[-1:]}: {made.stderr[-2000:]}"
    counts = json.loads(made.stdout)
    assert len(counts) >= 19
    assert all(returned and refused for returned, refused in counts.values()), counts
