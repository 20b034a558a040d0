"""MTALoss."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from batches import EDGE_ROWS, LAYOUTS, RaggedBatch, make_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mta_fast import MTAConfig, MTALoss, MTAOutput, SpanBatch, reference
from mta_fast.errors import InputError
from mta_fast.loss import LayerPairTerms, MTAExplanation
from mta_fast.ops.importance import token_importance
from mta_fast.ops.pooling import pooled_spans
from mta_fast.ops.span_pairs import span_pair_terms

pytestmark = pytest.mark.usefixtures("cpu_backend")

LENGTHS = [length for length, _ in EDGE_ROWS]
PAIRS = ((1, 2), (3, 5), (4, 6))
KINDS = ("word", "phrase", "phrase")
STUDENT_DIM, TEACHER_DIM = 5, 7
WORDS = [(n, [(j, j + 1) for j in range(n)]) for n in LENGTHS]


class Case:
    """The edge rows as one batch: words are single tokens, phrases the edge spans."""

    def __init__(self, layout: str = "right", rows: dict[str, list[Any]] | None = None, **changes: Any) -> None:
        rows = rows or {"word": WORDS, "phrase": EDGE_ROWS}
        self.batches: dict[str, RaggedBatch] = {kind: make_batch(layout, of) for kind, of in rows.items()}
        self.spans = {kind: batch.spans for kind, batch in self.batches.items()}
        self.batch = self.batches["word"]
        lengths = self.batch.lengths
        generator = torch.Generator().manual_seed(7)
        make = lambda dim: [torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in lengths]  # noqa: E731
        self.student = {s: self.batch.lay(make(STUDENT_DIM)).requires_grad_() for s, _ in PAIRS}
        self.teacher = {t: self.batch.lay(make(TEACHER_DIM)) for _, t in PAIRS}
        entropy = [torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
        self.entropy = self.batch.lay(entropy) if changes.get("weighting") == "entropy" else None
        self.loss = MTALoss(MTAConfig(PAIRS, KINDS, **changes), STUDENT_DIM, TEACHER_DIM).double()
        for parameter in self.loss.parameters():
            torch.nn.init.normal_(parameter, generator=generator)

    def __call__(self, **options: Any) -> MTAOutput:
        made: MTAOutput = self.loss(self.student, self.teacher, self.spans, entropy_weights=self.entropy, **options)
        return made

    def gradients(self, output: MTAOutput) -> list[Tensor]:
        """Of the student's states (as rows) and of the projections."""
        leaves = [*self.student.values(), *self.loss.parameters()]
        grads = torch.autograd.grad(output.loss, leaves, allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]
        return [self.batch.unlay(g) for g in grads[: len(PAIRS)]] + grads[len(PAIRS) :]


ABLATIONS: list[dict[str, Any]] = [
    {},
    {"lambda_hid": 0.0},
    {"lambda_dsa": 0.0},
    {"student_pooling": "own"},
    {"weighting": "uniform"},
    {"weighting": "entropy"},
    {"normalization": "sample"},
    {"normalization": "sample", "weighting": "uniform"},
    {"normalization": "sample", "weighting": "entropy"},
    {"causal": True},
    {"projection_bias": False},
    {"dsa_method": "gram"},
    {"dsa_method": "pairwise"},
]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_padding_and_packing_change_nothing(changes: dict[str, Any]) -> None:
    results = []
    for layout in LAYOUTS:
        case = Case(layout, **changes)
        output = case()
        assert output.loss.isfinite()
        results.append([output.loss, *output.per_layer, *case.gradients(output)])
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_micro_batches_with_denominators_equal_one_batch(changes: dict[str, Any]) -> None:
    rows = {"word": WORDS, "phrase": EDGE_ROWS}
    whole = Case("packed", rows, **changes)
    parts = [Case("packed", {kind: [row] for kind, row in zip(rows, pair, strict=True)}, **changes) for pair in
             zip(*rows.values(), strict=True)]  # fmt: skip
    first = 0
    for part, length in zip(parts, LENGTHS, strict=True):
        part.loss = whole.loss
        cut = slice(first, first + length)
        part.student = {layer: h.detach()[cut].requires_grad_() for layer, h in whole.student.items()}
        part.teacher = {layer: h[cut] for layer, h in whole.teacher.items()}
        part.entropy = None if whole.entropy is None else whole.entropy[cut]
        first += length
    made = [p.loss.denominators(p.teacher, p.spans, entropy_weights=p.entropy) for p in parts]
    denominators = torch.stack(made).sum(0)
    output = whole()
    expected = whole.gradients(output)
    counted = [i for i, on in enumerate((whole.loss.config.lambda_dsa, whole.loss.config.lambda_hid)) if on]
    stated = torch.stack([output.per_layer.dsa_denominator, output.per_layer.hid_denominator], 1)
    torch.testing.assert_close(denominators[:, counted], stated[:, counted])
    outputs = [part(denominators=denominators) for part in parts]
    torch.testing.assert_close(sum(o.loss for o in outputs), output.loss)
    grads = [part.gradients(o) for part, o in zip(parts, outputs, strict=True)]
    for i, gradient in enumerate(expected):
        pieces = [g[i] for g in grads]
        torch.testing.assert_close(torch.cat(pieces) if i < len(PAIRS) else sum(pieces), gradient)


@pytest.mark.parametrize("two_tokenizers", [False, True])
@pytest.mark.parametrize("changes", [*ABLATIONS[:6], ABLATIONS[7], ABLATIONS[9]], ids=str)
def test_what_is_explained_makes_the_terms(changes: dict[str, Any], two_tokenizers: bool) -> None:
    case = Case(**changes)
    config = case.loss.config
    options = (
        {"teacher_spans": {kind: copy.copy(spans) for kind, spans in case.spans.items()}} if two_tokenizers else {}
    )
    plain = case(**options)
    explanation = case.loss(
        case.student, case.teacher, case.spans, entropy_weights=case.entropy, explain=True, **options
    )
    assert isinstance(explanation, MTAExplanation)
    torch.testing.assert_close(explanation.output, plain, rtol=0, atol=0)
    for i, ((student, teacher), kind, pair) in enumerate(zip(PAIRS, KINDS, explanation.layer_pairs, strict=True)):
        spans = case.spans[kind]
        dsa, hid = config.lambda_dsa > 0, config.lambda_hid > 0
        assert [value is None for value in (pair.student_spans, pair.teacher_spans, pair.student_token_weights)] == (
            [not (dsa or two_tokenizers)] * 3
        )
        terms = [torch.zeros((), dtype=torch.float64)] * 4
        expected = token_importance(case.teacher[teacher], rows=spans.rows, causal=config.causal)
        torch.testing.assert_close(pair.importance, expected, rtol=0, atol=0)
        compared = case.student[student].flatten(0, 1), case.teacher[teacher].flatten(0, 1)
        if pair.student_spans is not None:
            for states, weights, pooled in zip(
                compared,
                (pair.student_token_weights, pair.token_weights),
                (pair.student_spans.states, pair.teacher_spans.states),
                strict=True,
            ):
                assert torch.equal(pooled_spans(states, weights, spans).states, pooled)
        tokens = spans.covered
        if two_tokenizers:
            compared = pair.student_spans.states, pair.teacher_spans.states
            tokens = torch.arange(spans.num_spans)
        assert [pair.span_weights is None, pair.hid_weights is None] == [not dsa, not hid]
        if dsa:
            made = (pair.student_spans, pair.teacher_spans)
            terms[:2] = span_pair_terms(
                *(side.states for side in made),
                pair.span_weights,
                spans,
                reduction=config.normalization,
                method=config.dsa_method,
                norms=tuple(side.norm for side in made),
            )
        if hid:
            terms[2] = case.loss.projections[i](*compared, tokens, pair.hid_weights, "auto")
            terms[3] = pair.hid_weights.sum()
        if config.normalization == "sample":
            terms[3] = pair.terms.hid_denominator  # counts rows, which no weight tells
        torch.testing.assert_close(pair.terms, LayerPairTerms(*terms), rtol=0, atol=0)
        for whole, part in zip(plain.per_layer, pair.terms, strict=True):
            assert whole[i] == part


def test_terms_are_unweighted_means_over_layer_pairs() -> None:
    case = Case(lambda_dsa=3.0, lambda_hid=0.5)
    output = case()
    terms = output.per_layer
    torch.testing.assert_close(output.dsa, (terms.dsa_numerator / terms.dsa_denominator).mean())
    torch.testing.assert_close(output.hid, (terms.hid_numerator / terms.hid_denominator).mean())
    torch.testing.assert_close(output.loss, 3 * output.dsa + 0.5 * output.hid)
    # every row with spans contributes 1 to Hid's denominator
    torch.testing.assert_close(terms.hid_denominator, torch.tensor([5.0, 4.0, 4.0]).double())


def test_uniform_weights_by_count() -> None:
    terms = Case(weighting="uniform")().per_layer
    for kind, dsa, hid in zip(KINDS, terms.dsa_denominator, terms.hid_denominator, strict=True):
        rows = WORDS if kind == "word" else EDGE_ROWS
        assert dsa == sum(len(spans) * (len(spans) - 1) for _, spans in rows)
        assert hid == sum(last - first for _, spans in rows for first, last in spans)


def test_a_term_left_out_costs_and_holds_nothing() -> None:
    dsa_only, hid_only = Case(lambda_hid=0.0), Case(lambda_dsa=0.0)
    assert not list(dsa_only.loss.parameters())
    assert dsa_only().hid == 0
    assert hid_only().dsa == 0
    both = Case()
    torch.testing.assert_close(dsa_only().dsa, both().dsa)


@pytest.mark.parametrize("normalization", ["batch", "sample"])
@pytest.mark.parametrize("weighting", ["importance", "uniform"])
@pytest.mark.parametrize(
    "rows", [[(4, []), (3, [])], [(0, []), (0, [])], []], ids=["no spans", "all padding", "no rows"]
)
def test_nothing_to_align_is_zero_with_a_graph(rows: list[Any], weighting: str, normalization: str) -> None:
    if not rows:
        spans = SpanBatch.from_char_spans([], torch.zeros(0, 3, 2), torch.zeros(0, 3))
        case = Case(weighting=weighting, normalization=normalization)
        case.spans = {"word": spans, "phrase": spans}
        case.student = {s: torch.zeros(0, 3, STUDENT_DIM).double().requires_grad_() for s, _ in PAIRS}
        case.teacher = {t: torch.zeros(0, 3, TEACHER_DIM).double() for _, t in PAIRS}
    else:
        case = Case("right", {"word": rows, "phrase": rows}, weighting=weighting, normalization=normalization)
    output = case()
    assert output.loss.item() == 0
    grads = torch.autograd.grad(output.loss, [*case.student.values(), *case.loss.parameters()])
    assert all(grad.isfinite().all() and grad.abs().sum() == 0 for grad in grads)
    assert output.nonfinite_layer_pairs() == []


def test_a_row_of_one_token_is_finite() -> None:
    rows = {"word": [(1, [(0, 1)])], "phrase": [(1, [(0, 1)])]}
    for changes in ABLATIONS:
        case = Case("right", rows, **changes)
        output = case()
        assert output.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in case.gradients(output))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_not_a_number_names_its_layer_pair(side: str, value: float) -> None:
    case = Case()
    hidden = {"student": {k: v.detach().clone() for k, v in case.student.items()}, "teacher": dict(case.teacher)}
    layer = PAIRS[1][side == "teacher"]
    hidden[side][layer] = hidden[side][layer].clone()
    hidden[side][layer][0, 3, 0] = value  # a real token that spans cover
    output = case.loss(hidden["student"], hidden["teacher"], case.spans)
    assert output.loss.isnan()
    assert output.nonfinite_layer_pairs() == [1]


def test_half_precision_teacher() -> None:
    case = Case()
    exact = {layer: h.half().double() for layer, h in case.teacher.items()}
    case.loss.float()
    student = {layer: h.detach().float() for layer, h in case.student.items()}
    half = case.loss(student, {layer: h.half() for layer, h in exact.items()}, case.spans)
    case.loss.double()
    expected = case.loss({k: v.double() for k, v in student.items()}, exact, case.spans)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)


def test_transformers_tuple_and_dict_are_the_same() -> None:
    case = Case()
    student = tuple(case.student.get(i) for i in range(5))
    teacher = tuple(case.teacher.get(i) for i in range(7))
    assert torch.equal(case.loss(student, teacher, case.spans).loss, case().loss)


def test_bitwise_repeatable() -> None:
    case = Case()
    first, second = case(), case()
    assert torch.equal(first.loss, second.loss)
    for left, right in zip(case.gradients(first), case.gradients(second), strict=True):
        assert torch.equal(left, right)


def test_a_layer_used_twice_computes_its_importance_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = reference.token_importance
    monkeypatch.setattr(reference, "token_importance", lambda *args: (calls.append(1), original(*args))[1])
    case = Case()
    twice = MTAConfig(((1, 2), (1, 2)), ("word", "phrase"), backend="reference")
    MTALoss(twice, STUDENT_DIM, TEACHER_DIM).double()(case.student, case.teacher, case.spans)
    assert len(calls) == 1


def test_a_state_that_the_loss_does_not_read_may_hold_anything() -> None:
    case = Case(rows={"word": EDGE_ROWS, "phrase": EDGE_ROWS})
    student = {layer: h.detach().clone() for layer, h in case.student.items()}
    teacher = {layer: h.clone() for layer, h in case.teacher.items()}
    for hidden in (*student.values(), *teacher.values()):
        hidden[3, 2] = torch.nan  # row 3 has tokens and no spans
    assert torch.equal(case.loss(student, teacher, case.spans).loss, case().loss)


# --- two tokenizers ----------------------------------------------------------------------------------------------


def _two_tokenizers() -> tuple[dict[str, SpanBatch], dict[str, SpanBatch]]:
    """Two rows of 12 characters, tokenised by twos (student, left padded) and by threes (teacher)."""
    twos = torch.tensor([[[0, 0]] + [[2 * j, 2 * j + 2] for j in range(6)]] * 2)
    threes = torch.tensor([[[3 * j, 3 * j + 3] for j in range(4)]] * 2)
    char_spans = [[(0, 6), (6, 12), (0, 12)], [(0, 6), (0, 12)]]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 2)
    pair = SpanBatch.pair(char_spans, (twos, mask), (threes, torch.ones(2, 4)))
    return {"word": pair[0], "phrase": pair[0]}, {"word": pair[1], "phrase": pair[1]}


@pytest.mark.parametrize("changes", [c for c in ABLATIONS if c.get("weighting") != "entropy"], ids=str)
def test_two_tokenizers(changes: dict[str, Any]) -> None:
    spans, teacher_spans = _two_tokenizers()
    student = {s: torch.randn(2, 7, STUDENT_DIM).double().requires_grad_() for s, _ in PAIRS}
    teacher = {t: torch.randn(2, 4, TEACHER_DIM).double() for _, t in PAIRS}
    loss = MTALoss(MTAConfig(PAIRS, KINDS, **changes), STUDENT_DIM, TEACHER_DIM).double()
    output = loss(student, teacher, spans, teacher_spans=teacher_spans)
    grads = torch.autograd.grad(output.loss, [*student.values(), *loss.parameters()])
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads if grad.ndim > 1)
    assert all(grad[:, 0].abs().sum() == 0 for grad in grads[:3])  # padding
    made = loss.denominators(teacher, spans, teacher_spans=teacher_spans)
    again = loss(student, teacher, spans, teacher_spans=teacher_spans, denominators=made)
    torch.testing.assert_close(again.loss, output.loss)


@pytest.mark.parametrize("weighting", ["importance", "uniform"])
@pytest.mark.parametrize("tokenizers", [1, 2])
def test_sample_is_the_mean_of_the_rows_alone(tokenizers: int, weighting: str) -> None:
    rows = [row for row in zip(WORDS, EDGE_ROWS, strict=True) if row[0][0]]
    whole = Case("packed", {"word": [w for w, _ in rows], "phrase": [p for _, p in rows]}, weighting=weighting)

    def terms(case: Case, normalization: Any) -> tuple[Tensor, Tensor]:
        config = dataclasses.replace(case.loss.config, normalization=normalization)
        loss = MTALoss(config, STUDENT_DIM, TEACHER_DIM).double()
        loss.load_state_dict(whole.loss.state_dict())
        options = {"teacher_spans": case.spans} if tokenizers == 2 else {}
        made = loss(case.student, case.teacher, case.spans, **options).per_layer
        dsa, hid = made.dsa_numerator / made.dsa_denominator, made.hid_numerator / made.hid_denominator
        return dsa, hid

    alone: list[list[Tensor]] = [[], []]
    first = 0
    for word, phrase in rows:
        part = Case("packed", {"word": [word], "phrase": [phrase]}, weighting=weighting)
        cut = slice(first, first + word[0])
        part.student = {layer: h[cut] for layer, h in whole.student.items()}
        part.teacher = {layer: h[cut] for layer, h in whole.teacher.items()}
        first += word[0]
        for values, made in zip(alone, terms(part, "batch"), strict=True):
            values.append(made)  # 0 / 0, a NaN, where the row has nothing to compare
    for values, made in zip(alone, terms(whole, "sample"), strict=True):
        torch.testing.assert_close(made, torch.stack(values).nanmean(0))


def test_two_tokenizers_of_the_same_tokens_pool_with_own_importance() -> None:
    # with one tokenization on both sides DSA must equal student_pooling="own"; Hid compares spans, not tokens
    case = Case("packed", student_pooling="own", lambda_hid=0.0)
    output = case.loss(case.student, case.teacher, case.spans, teacher_spans=case.spans)
    torch.testing.assert_close(output.loss, case().loss)


# --- errors ------------------------------------------------------------------------------------------------------


def test_errors_name_expected_and_received() -> None:
    case = Case()
    student, teacher, spans = case.student, case.teacher, case.spans
    shorter = {layer: h[:, 1:] for layer, h in teacher.items()}
    checks: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("student_hidden: expected the hidden state of layer 1, got layers", ({3: student[3]}, teacher, spans), {}),
        ("expected a dict with the key 'phrase'", (student, teacher, {"word": spans["word"]}), {}),
        ("teacher_hidden has .*teacher_spans=", (student, shorter, spans), {}),
        (r"student_hidden\[1\]: expected width 5", ({1: student[1][..., 1:]}, teacher, spans), {}),
        ("entropy_weights: expected none", (student, teacher, spans), {"entropy_weights": torch.ones(1)}),
        ("denominators: expected shape", (student, teacher, spans), {"denominators": torch.ones(2, 2)}),
        ("attention_mask: expected the mask", (student, teacher, spans, torch.ones(student[1].shape[:2])), {}),
        ("attention_mask: expected the mask", (student, teacher, spans, case.batch.mask.flip(1)), {}),
        ("attention_mask: expected shape", (student, teacher, spans, torch.ones(2, 2)), {}),
        ("expected on", ({k: v.to("meta") for k, v in student.items()}, teacher, spans), {}),
    ]
    for message, args, options in checks:
        with pytest.raises(InputError, match=message):
            case.loss(*args, **options)
    with pytest.raises(InputError, match="student_dim: expected a width or one for each of the 3 layer pairs"):
        MTALoss(case.loss.config, [5, 5], 7)
    with pytest.raises(InputError, match="entropy_weights: expected them"):
        Case(weighting="entropy").loss(student, teacher, spans)
    rows = [(3, [(0, 1), (1, 2)]), (3, [(0, 1)])]
    one, other = ({"word": b, "phrase": b} for b in (make_batch("packed", r).spans for r in (rows, rows[::-1])))
    packed = [{layer: torch.randn(6, dim).double() for layer in layers} for dim, layers in
              ((STUDENT_DIM, (1, 3, 4)), (TEACHER_DIM, (2, 5, 6)))]  # fmt: skip
    with pytest.raises(InputError, match="or other numbers per row; make both with SpanBatch.pair"):
        case.loss(*packed, one, teacher_spans=other)
    with pytest.raises(InputError, match="make both with SpanBatch.pair"):
        case.loss(student, teacher, spans, teacher_spans={"word": spans["phrase"], "phrase": spans["phrase"]})


# --- what it costs -----------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """The ops that ran and the largest tensor they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return out


# what a GPU has to be waited for: reading a value, or an output whose size depends on values
WAITING = {"_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select", "is_nonzero"}


def test_no_op_of_the_step_waits_for_the_device() -> None:
    case = Case()
    with _Recorder() as recorder:
        case()
    assert not recorder.names & WAITING
    assert {"layer_weights", "layer_pairs", "hidden_alignment"} <= recorder.names


def test_nothing_grows_with_the_square_of_the_batch() -> None:
    # 24 rows of 20 one-token spans: (all spans)^2 would be 230,400 entries and [B, S, spans] 9,600
    rows, dim = [(20, [(j, j + 1) for j in range(20)])] * 24, 3
    spans = make_batch("packed", rows).spans
    tokens, index = 24 * 20, reference.Spans(*spans.index_tensors())
    student, teacher = torch.randn(tokens, dim), torch.randn(tokens, dim)
    table, host = spans.rows.table, spans.rows.host
    with _Recorder() as recorder:
        importance = reference.token_importance(teacher, table, host, 20, False, False)
        token, salience, _ = reference.span_weights(importance, index)
        pooled, _, norm = reference.pool_spans(student, token, index, table, host)
        reference.pool_spans_gradient(pooled, salience, token, index, torch.float32)
        for method in ("pairwise", "gram"):
            reference.span_pairs(pooled, pooled, salience, norm, norm, index.span_splits, index.host, method, True)
        reference.hidden_alignment(
            student, teacher, index.covered, token, torch.randn(dim, dim), None, torch.float32, True
        )
    assert recorder.largest == tokens * dim
    assert not recorder.names & WAITING  # inside the ops; their host tables are read with tolist
    assert {"mm", "segment_reduce"} <= recorder.names
