"""Token importance."""

from __future__ import annotations

import pytest
import torch
from batches import EDGE_ROWS, LAYOUTS, make_batch, random_rows

from mta_fast import reference, token_importance
from mta_fast.errors import InputError
from mta_fast.layout import Rows
from mta_fast.ops.importance import _token_importance

pytestmark = pytest.mark.usefixtures("cpu_backend")

LENGTHS = [length for length, _ in EDGE_ROWS]


def test_two_tokens_attend_to_each_other() -> None:
    assert token_importance(torch.randn(1, 2, 4)).tolist() == [[0.5, 0.5]]


def test_one_token_has_importance_one() -> None:
    mask = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0]])
    expected = [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    for options in ({}, {"causal": True}, {"count_padding": True}):
        assert token_importance(torch.randn(3, 3, 4), mask, **options).tolist() == expected


def test_three_tokens_by_hand() -> None:
    # rows of standard deviation s: z = h / (s + 1e-5); the scores below follow from z . z / sqrt(2)
    hidden = torch.tensor([[[1.0, -1.0], [2.0, -2.0], [-1.0, 1.0]]], dtype=torch.float64)
    z = [1 / (2**0.5 + 1e-5), 2 / (2 * 2**0.5 + 1e-5), -1 / (2**0.5 + 1e-5)]
    score = lambda i, j: 2 * z[i] * z[j] / 2**0.5  # noqa: E731
    attention = [[0.0] * 3 for _ in range(3)]
    for i in range(3):
        others = [j for j in range(3) if j != i]
        total = sum(torch.tensor(score(i, j)).double().exp().item() for j in others)
        for j in others:
            attention[i][j] = torch.tensor(score(i, j)).double().exp().item() / total
    expected = [sum(attention[i][j] for i in range(3)) / 3 for j in range(3)]
    torch.testing.assert_close(token_importance(hidden)[0], torch.tensor(expected).double(), rtol=1e-6, atol=1e-8)


def test_causal_by_hand() -> None:
    # equal tokens: query 0 sees nothing, query 1 sees token 0, query 2 sees both before it
    importance = token_importance(torch.randn(4).double().expand(1, 3, 4), causal=True)
    torch.testing.assert_close(importance, torch.tensor([[1.5 / 3, 0.5 / 3, 0]]).double())


def test_count_padding_by_hand() -> None:
    # equal vectors everywhere: each real token attends to the other, the padded query to both
    hidden = torch.randn(4).double().expand(1, 3, 4)
    for mask in ([[1, 1, 0]], [[0, 1, 1]]):
        importance = token_importance(hidden, torch.tensor(mask), count_padding=True)
        torch.testing.assert_close(importance, torch.tensor(mask).double() * 0.5)


def test_causal_count_padding_left() -> None:
    # left padding comes before the keys: the padded query sees nothing
    hidden = torch.randn(4).double().expand(1, 4, 4)
    importance = token_importance(hidden, torch.tensor([[0, 1, 1, 1]]), causal=True, count_padding=True)
    torch.testing.assert_close(importance, torch.tensor([[0, 1.5 / 4, 0.5 / 4, 0]]).double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_packing_change_nothing(layout: str, causal: bool) -> None:
    rows = random_rows(LENGTHS, 5)
    batch = make_batch(layout)
    importance = token_importance(batch.lay(rows), batch.mask, cu_seqlens=batch.cu_seqlens, causal=causal)
    alone = torch.cat([token_importance(row[None], causal=causal)[0] for row in rows])
    assert torch.equal(batch.unlay(importance), alone)
    assert importance.isfinite().all()
    assert importance.sum() == pytest.approx(alone.sum().item())  # 0 at padding
    by_rows = token_importance(batch.lay(rows), rows=batch.spans.rows, causal=causal)
    assert torch.equal(by_rows, importance)


def test_a_row_sums_to_one() -> None:
    total = token_importance(torch.randn(2, 9, 6, dtype=torch.float64)).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"count_padding": True}])
def test_query_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]) -> None:
    hidden, mask = torch.randn(2, 23, 6, dtype=torch.float64), torch.ones(2, 23)
    mask[1, :5] = 0
    whole = token_importance(hidden, mask, **options)
    for block in (1, 7, 22, 23):
        monkeypatch.setattr(reference, "QUERY_BLOCK", block)
        torch.testing.assert_close(token_importance(hidden, mask, **options), whole)


@pytest.mark.parametrize("width", [2, 3, 64, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64(dtype: torch.dtype, width: int) -> None:
    # width 2 and 3: the smallest standard deviations; 577: no multiple of anything
    hidden = torch.randn(2, 17, width).to(dtype)
    importance = token_importance(hidden)
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance.double(), token_importance(hidden.double()), rtol=1e-5, atol=1e-7)


def test_not_a_number_stays_in_its_row() -> None:
    hidden = torch.randn(2, 4, 3)
    hidden[1, 2, 0] = torch.inf
    importance = token_importance(hidden)
    assert importance[0].isfinite().all()
    assert importance[1].isnan().any()


def test_detached() -> None:
    assert not token_importance(torch.randn(1, 3, 4, requires_grad=True)).requires_grad


def test_errors_name_expected_and_received() -> None:
    hidden = torch.randn(2, 4, 3)
    with pytest.raises(InputError, match="row 1 has a hole"):
        token_importance(hidden, torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]))
    with pytest.raises(InputError, match="count_padding: expected a padded batch"):
        token_importance(hidden[0], cu_seqlens=torch.tensor([0, 4]), count_padding=True)
    with pytest.raises(InputError, match="width of at least 2"):
        token_importance(torch.randn(1, 3, 1))
    with pytest.raises(InputError, match="at most one of"):
        token_importance(hidden[0], torch.ones(4), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(InputError, match=r"attention_mask: expected shape \(2, 4\).*got \(2, 5\)"):
        token_importance(hidden, torch.ones(2, 5))
    with pytest.raises(InputError, match="got torch.int64"):
        token_importance(hidden.long())
    with pytest.raises(InputError, match="packed hidden states"):
        token_importance(hidden[0])
    with pytest.raises(InputError, match="at most T = 4 last, got"):
        token_importance(hidden[0], cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(InputError, match="rows: made for tokens of shape"):
        token_importance(hidden, rows=Rows.full(2, 5))
    huge = torch.ones(1, 1).expand(2**16, 2**15)  # without memory of its own
    for make in (
        lambda: Rows.from_mask(huge),
        lambda: Rows.full(2**16, 2**15),
        lambda: Rows.from_cu_seqlens([0, 2**31], 2**31),
    ):
        with pytest.raises(InputError, match=r"fewer than 2\^31 tokens \(indices are int32\), got 2147483648"):
            make()
    with pytest.raises(InputError, match="backend: expected one of auto, triton, cpp, reference, got 'cuda'"):
        token_importance(hidden, backend="cuda")


def test_opcheck() -> None:
    batch = make_batch("right")
    hidden = batch.lay(random_rows(LENGTHS, 4), padding=0).reshape(-1, 4)
    rows = batch.spans.rows
    torch.library.opcheck(_token_importance, (hidden, rows.table, rows.host, batch.seq_len, False, False, "reference"))
