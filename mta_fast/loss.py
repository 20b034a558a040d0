"""MTALoss: layer pairs -> importance -> pooling -> DSA and Hid -> MTAOutput."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mta_fast.config import MTAConfig
from mta_fast.errors import InputError
from mta_fast.layers import hidden_widths
from mta_fast.layout import Rows
from mta_fast.ops._common import check_device, check_float, check_shape, check_spans, flat, quotient
from mta_fast.ops.importance import token_importance
from mta_fast.ops.layer_pairs import PairedStates, importance_weights, joinable, span_terms
from mta_fast.ops.pooling import PooledSpans, SpanWeights, normalize_weights, pooled_spans
from mta_fast.ops.span_pairs import span_pair_terms
from mta_fast.projections import RIDGE, Compared, Projection, RidgeFit, check_strength
from mta_fast.spans.batch import SpanBatch

HiddenStates = Mapping[int, Tensor] | Sequence[Tensor | None]


class LayerPairTerms(NamedTuple):
    """Numerators and denominators of both terms, [L] each or scalars of one layer pair; a term left out is 0 / 0."""

    dsa_numerator: Tensor
    dsa_denominator: Tensor
    hid_numerator: Tensor
    hid_denominator: Tensor

    def quotients(self, denominators: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """DSA and Hid of each layer pair [L]: numerator / denominator (0 / 0 is 0).

        Args:
            denominators: [L, 2] of (DSA, Hid) to divide by instead of these.
        """
        dsa, hid = (self.dsa_denominator, self.hid_denominator) if denominators is None else denominators.unbind(1)
        return quotient(self.dsa_numerator, dsa), quotient(self.hid_numerator, hid)

    def means(self, denominators: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """L_DSA and L_Hid: the unweighted means of ``quotients`` over the layer pairs."""
        dsa, hid = self.quotients(denominators)
        return dsa.mean(), hid.mean()


class MTAOutput(NamedTuple):
    """What MTALoss returns."""

    loss: Tensor  # lambda_dsa * dsa + lambda_hid * hid
    dsa: Tensor  # L_DSA, unweighted mean over the layer pairs
    hid: Tensor  # L_Hid, likewise
    per_layer: LayerPairTerms

    def nonfinite_layer_pairs(self) -> list[int]:
        """Positions (in ``config.layer_pairs``) whose terms are NaN or infinite; one synchronisation on a GPU."""
        finite = torch.stack([terms.detach().isfinite() for terms in self.per_layer]).all(0)
        return [i for i, fine in enumerate(finite.tolist()) if not fine]


class ExplainedPair(NamedTuple):
    """What one layer pair's terms were made of: the very tensors, the student's with their graph.

    N spans, T tokens (B * S of a padded batch) of either side, C covered tokens of the student's.
    """

    importance: Tensor  # [B, S] or [T] a_j of the teacher's tokens
    token_weights: Tensor  # [T] w_j: what the teacher's spans were pooled with
    student_token_weights: Tensor | None  # [T] likewise of the student's; None where nothing was pooled
    student_spans: PooledSpans | None  # None where nothing was pooled: one tokenizer and no DSA
    teacher_spans: PooledSpans | None
    span_weights: Tensor | None  # [N] W_u of DSA; None without DSA
    hid_weights: Tensor | None  # [C] g_c of Hid, with two tokenizers [N]; None without Hid
    compared: Compared | None  # what Hid compares, [C] or [N] of it; None without Hid
    terms: LayerPairTerms  # scalars; the denominators are this batch's own


class MTAExplanation(NamedTuple):
    """What MTALoss returns, and what it was made of."""

    output: MTAOutput
    layer_pairs: tuple[ExplainedPair, ...]  # in the order of ``config.layer_pairs``


class MTALoss(nn.Module):
    """The MTA loss of a student and a teacher; holds the trained projections of Hid.

    ``torch.compile(fullgraph=True)`` takes it whole, and new lengths need no new graph. torch makes a graph of its
    own for each size of 0 or 1 (a batch of one row, or of one span): where such batches are common, raise
    ``torch._dynamo.config.recompile_limit``.

    Args:
        config: what to compute.
        student_dim: width of the student's hidden states, or one width per layer pair.
        teacher_dim: likewise.

    Raises:
        InputError: a list of widths of another length than the layer pairs.
    """

    def __init__(self, config: MTAConfig, student_dim: int | Sequence[int], teacher_dim: int | Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.student_dims = _per_pair("student_dim", student_dim, len(config.layer_pairs))
        self.teacher_dims = _per_pair("teacher_dim", teacher_dim, len(config.layer_pairs))
        widths = zip(self.student_dims, self.teacher_dims, strict=True) if config.lambda_hid > 0 else ()
        self.projections = nn.ModuleList(Projection(s, t, bias=config.projection_bias) for s, t in widths)

    @classmethod
    def for_models(cls, student: nn.Module, teacher: nn.Module, config: MTAConfig) -> MTALoss:
        """MTALoss with the widths that these models' hidden states have at the configured layers.

        Args:
            student, teacher: causal language models of transformers (PEFT-wrapped ones too). Each runs once on
                two tokens; the projections are made in float32 on the student's device.

        Raises:
            InputError: a layer index beyond a model's depth.
        """
        student_widths = hidden_widths(student, config.student_layers)
        teacher_widths = hidden_widths(teacher, config.teacher_layers)
        pairs = config.layer_pairs
        loss = cls(config, [student_widths[s] for s, _ in pairs], [teacher_widths[t] for _, t in pairs])
        return loss.to(next(student.parameters()).device)

    def forward(
        self,
        student_hidden: HiddenStates,
        teacher_hidden: HiddenStates,
        spans: Mapping[str, SpanBatch],
        attention_mask: Tensor | None = None,
        *,
        teacher_spans: Mapping[str, SpanBatch] | None = None,
        teacher_attention_mask: Tensor | None = None,
        entropy_weights: Tensor | None = None,
        teacher_importance: Mapping[int, Tensor] | None = None,
        denominators: Tensor | None = None,
        explain: bool = False,
    ) -> MTAOutput | MTAExplanation:
        """The loss of one batch.

        Args:
            student_hidden: {layer: [B, S, d_S]} of the configured layers, or a transformers ``hidden_states``
                tuple; [T, d_S] or [1, T, d_S] packed.
            teacher_hidden: likewise; needs no gradient and may be half precision.
            spans: {"word": SpanBatch, "phrase": SpanBatch} (those the config uses), on the same device. They
                carry the rows, so the masks are not needed.
            attention_mask: [B, S] or None. A given mask is checked against the spans: its shape always, its
                content where it is on the CPU and not compiled.
            teacher_spans: with two tokenizers, the teacher's half of ``SpanBatch.pair``.
            teacher_attention_mask: likewise for the teacher's tokens.
            entropy_weights: [B, S] over the teacher's tokens (``entropy_weights(logits)``), packed like the states;
                needed for ``weighting="entropy"``, refused otherwise.
            teacher_importance: {teacher layer: [B, S]} as ``token_importance`` gives it, where it is known without the
                states or from better ones, 0 at padding; None: made of ``teacher_hidden``.
            denominators: [L, 2] from ``denominators()``, summed over all micro-batches and ranks. Then the sum
                of the micro-batches' losses (and gradients) is that of the one big batch.
            explain: keep what the terms were made of, too.

        Returns:
            MTAOutput; with ``explain`` an MTAExplanation. The loss is 0 with a graph when the batch has no spans,
            NaN when a hidden state that it reads is NaN or infinite: the teacher's real tokens in rows with spans,
            the student's covered ones (with its own importance, all its real tokens).

        Raises:
            InputError: layers, widths, shapes, dtypes or devices that don't match.
        """
        pairs = self._pairs(spans, teacher_spans, teacher_hidden, entropy_weights, teacher_importance)
        students = []
        for i, ((layer, _), pair) in enumerate(zip(self.config.layer_pairs, pairs, strict=True)):
            student = _hidden_state(student_hidden, layer, "student", self.student_dims[i], pair.spans)
            check_device(student.device, teacher_hidden=pair.teacher)
            check_spans(pair.spans, student.shape[:-1], student.device, "student_hidden")
            _check_mask("attention_mask", attention_mask, pair.spans.rows)
            _check_mask("teacher_attention_mask", teacher_attention_mask, pair.teacher_spans.rows)
            students.append(student)
        per_layer, explained = self._terms(students, pairs, explain)
        if denominators is not None:
            check_shape("denominators", denominators, (len(pairs), 2), "one (DSA, Hid) pair per layer pair")
            check_device(per_layer.dsa_numerator.device, denominators=denominators)
            dsa_denominator, hid_denominator = denominators.detach().to(per_layer.dsa_numerator.dtype).unbind(1)
            per_layer = per_layer._replace(dsa_denominator=dsa_denominator, hid_denominator=hid_denominator)
        dsa, hid = per_layer.means()
        output = MTAOutput(self.config.weighted(dsa, hid), dsa, hid, per_layer)
        return MTAExplanation(output, tuple(explained)) if explain else output

    @torch.no_grad()
    def denominators(
        self,
        teacher_hidden: HiddenStates,
        spans: Mapping[str, SpanBatch],
        *,
        teacher_spans: Mapping[str, SpanBatch] | None = None,
        entropy_weights: Tensor | None = None,
        teacher_importance: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """[L, 2] denominators of (DSA, Hid) per layer pair, from the teacher only.

        Sum them over the micro-batches and ranks of an optimisation step and give the sum to ``forward``. It
        costs the teacher's importance a second time. Under DDP, which averages gradients over the ranks,
        multiply the loss by the number of ranks.

        Args:
            As in ``forward``.
        """
        rows = []
        for pair in self._pairs(spans, teacher_spans, teacher_hidden, entropy_weights, teacher_importance):
            # the denominator needs weights only: zero vectors of one feature stand in for the pooled states
            zero = torch.zeros_like(pair.weights.span)
            stand_in = PooledSpans(zero[:, None], zero, zero)
            method = "auto" if pair.spans.has_capacities else "gram"
            _, dsa = self._span_pair_terms(stand_in, stand_in, pair.dsa_weights(self.config), pair.spans, method)
            rows.append(torch.stack([dsa, pair.hid_denominator(self.config, pair.hid_weights(self.config))]))
        return torch.stack(rows)

    @torch.no_grad()
    def fit_projections(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        strength: float = RIDGE,
        reduce: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> None:
        """Start the projections of Hid where ridge regression maps the student's states of these batches.

        With the states that Hid compares at length 1, A of the student and B of the teacher, and Hid's own weights w:
        P = [(A'wA + r tr(A'wA)/d_S I)^-1 A'wB]', bias 0. One pass; only sums of d_S x d_S and d_S x d_T numbers of a
        layer pair are kept, in float64. Give the optimiser the projections before or after, they stay the same tensors.

        Args:
            batches: the arguments of ``forward`` by name, {"student_hidden": ..., "teacher_hidden": ..., "spans": ...};
                read once, one at a time.
            strength: r > 0. Larger is nearer to A'wB, which needs few tokens; smaller follows the batches more closely.
            reduce: sums a tensor over the ranks, each of which gives its own batches; all then have the same.

        Raises:
            InputError: no projections (lambda_hid 0), a strength out of range, no tokens that a span covers, or states
                that are NaN or infinite; the projections then stay as they are.
        """
        check_strength("strength", strength)
        fit = RidgeFit(self.projections)  # type: ignore[arg-type]  # ModuleList knows modules alone
        for batch in batches:
            for i, pair in enumerate(self(**batch, explain=True).layer_pairs):
                fit.add(i, pair.compared, pair.hid_weights)
        fit.finish(strength, reduce)

    def _pairs(
        self,
        spans: Mapping[str, SpanBatch],
        teacher_spans: Mapping[str, SpanBatch] | None,
        teacher_hidden: HiddenStates,
        entropy_weights: Tensor | None,
        teacher_importance: Mapping[int, Tensor] | None,
    ) -> list[_LayerPair]:
        """What every layer pair has before the student is read. Importance is computed once for a layer used twice."""
        config = self.config
        if (entropy_weights is None) == (config.weighting == "entropy"):
            raise InputError(
                f"entropy_weights: expected {'them' if entropy_weights is None else 'none'} with "
                f"weighting={config.weighting!r}, got {'none' if entropy_weights is None else 'some'}"
            )
        read = []
        for i, ((_, layer), kind) in enumerate(zip(config.layer_pairs, config.granularity, strict=True)):
            own = _span_batch("spans", spans, kind)
            other = own if teacher_spans is None else _span_batch("teacher_spans", teacher_spans, kind)
            _check_paired(own, other)
            hidden = _hidden_state(teacher_hidden, layer, "teacher", self.teacher_dims[i], other)
            hidden = hidden.detach() if hidden.requires_grad else hidden
            check_spans(other, hidden.shape[:-1], hidden.device, "teacher_hidden")
            read.append((hidden, own, other))
        pairs = []
        made = self._importances([(hidden, other) for hidden, _, other in read], teacher_importance)
        for (hidden, own, other), (importance, pooling) in zip(read, made, strict=True):
            weights = pooling
            if config.weighting != "importance":
                values = (
                    torch.ones_like(importance) if entropy_weights is None else _unpacked(entropy_weights, other, 1)
                )
                check_device(hidden.device, entropy_weights=values)
                check_shape("entropy_weights", values, hidden.shape[:-1], "the teacher's tokens")
                weights = normalize_weights(values, other, backend=config.backend)
            token_weights = pooling.token.reshape(-1)
            two_tokenizers = teacher_spans is not None
            pairs.append(_LayerPair(flat(hidden), own, other, two_tokenizers, importance, token_weights, weights))
        return pairs

    def _importances(
        self, read: list[tuple[Tensor, SpanBatch]], given: Mapping[int, Tensor] | None
    ) -> list[tuple[Tensor, SpanWeights]]:
        """Importance of the teacher's tokens, once for a layer used twice, and the weights of each layer pair."""
        config = self.config
        used = [layer for _, layer in config.layer_pairs]
        first = {layer: read[used.index(layer)] for layer in used}
        hidden_of = [list(first).index(layer) for layer in used]
        states = [flat(hidden) for hidden, _ in first.values()]
        spans = [other for _, other in read]
        packed = config.count_padding and len(spans[0].shape) != 2  # refused below
        if given is None and not packed and joinable(spans, [states[i] for i in hidden_of]):
            return importance_weights(
                states,
                hidden_of,
                spans,
                causal=config.causal,
                count_padding=config.count_padding,
                backend=config.backend,
            )
        values = [
            self._importance(hidden, other.rows) if given is None else _given_importance(given, layer, hidden, other)
            for layer, (hidden, other) in first.items()
        ]
        made = [values[i] for i in hidden_of]
        return [
            (one, normalize_weights(one, own, backend=config.backend)) for one, own in zip(made, spans, strict=True)
        ]

    def _importance(self, hidden: Tensor, rows: Rows) -> Tensor:
        config = self.config
        options = {"causal": config.causal, "count_padding": config.count_padding, "backend": config.backend}
        return token_importance(hidden, rows=rows, **options)  # type: ignore[arg-type]  # a dict of mixed values

    def _terms(
        self, students: list[Tensor], pairs: list[_LayerPair], explain: bool
    ) -> tuple[LayerPairTerms, list[ExplainedPair]]:
        """The terms of all layer pairs and, where it is wanted, what they are made of."""
        states = [flat(student) for student in students]  # once: autograd then adds both terms' gradients in place
        together = not explain and self.config.lambda_dsa > 0 and not any(pair.two_tokenizers for pair in pairs)
        if together and joinable([pair.spans for pair in pairs], states, [pair.teacher for pair in pairs]):
            dsa = self._joined_span_terms(students, states, pairs)
            hid = (
                [
                    self._hid(i, pair.compared(own), pair)
                    for i, (own, pair) in enumerate(zip(states, pairs, strict=True))
                ]
                if self.config.lambda_hid > 0
                else []
            )
            made = [torch.stack(column) for column in zip(*hid, strict=True)] or [torch.zeros_like(dsa[1])] * 2
            return LayerPairTerms(*dsa, *made), []
        terms, explained = [], []
        for i, (student, own, pair) in enumerate(zip(students, states, pairs, strict=True)):
            one = self._explained(i, student, own, pair)
            terms.append(one.terms)
            if explain:
                explained.append(one)
            del one  # its pooled spans would fill memory beside those of the next layer pair
        return LayerPairTerms(*(torch.stack(column) for column in zip(*terms, strict=True))), explained

    def _joined_span_terms(
        self, students: list[Tensor], states: list[Tensor], pairs: list[_LayerPair]
    ) -> tuple[Tensor, Tensor]:
        """DSA's (numerators, denominators) [L]."""
        config = self.config
        given = [
            PairedStates(
                own, pair.teacher, self._student_weights(student, pair), pair.token_weights, pair.dsa_weights(config),
                pair.spans,
            )
            for student, own, pair in zip(students, states, pairs, strict=True)
        ]  # fmt: skip
        return span_terms(given, reduction=config.normalization, method=config.dsa_method, backend=config.backend)

    def _hid(self, i: int, compared: Compared, pair: _LayerPair) -> tuple[Tensor, Tensor]:
        """Hid's numerator and denominator."""
        weights = pair.hid_weights(self.config)
        numerator: Tensor = self.projections[i](*compared, weights, self.config.backend)
        return numerator, pair.hid_denominator(self.config, weights)

    def _explained(self, i: int, student: Tensor, states: Tensor, pair: _LayerPair) -> ExplainedPair:
        """The terms of one layer pair, and what they are made of; a term left out has the student's graph."""
        config, backend = self.config, self.config.backend
        zero = states[:0].sum(dtype=pair.weights.span.dtype)
        dsa = hid = (zero, zero.detach())
        student_weights = student_spans = teacher_spans = span_weights = hid_weights = compared = None
        if config.lambda_dsa > 0 or pair.two_tokenizers:
            student_weights = self._student_weights(student, pair)
            student_spans = pooled_spans(states, student_weights, pair.spans, backend=backend)
            teacher_spans = pooled_spans(pair.teacher, pair.token_weights, pair.teacher_spans, backend=backend)
            if config.lambda_dsa > 0:
                span_weights = pair.dsa_weights(config)
                dsa = self._span_pair_terms(student_spans, teacher_spans, span_weights, pair.spans, config.dsa_method)
        if config.lambda_hid > 0:
            hid_weights = pair.hid_weights(config)
            compared = pair.compared(states)
            # token by token means nothing with two tokenizers: compare the spans
            if pair.two_tokenizers and student_spans is not None and teacher_spans is not None:
                spans = torch.arange(hid_weights.shape[0], device=hid_weights.device)
                compared = Compared(student_spans.states, teacher_spans.states, spans)
            numerator = self.projections[i](*compared, hid_weights, backend)
            hid = numerator, pair.hid_denominator(config, hid_weights)
        return ExplainedPair(
            pair.importance,
            pair.token_weights,
            student_weights,
            student_spans,
            teacher_spans,
            span_weights,
            hid_weights,
            compared,
            LayerPairTerms(*dsa, *hid),
        )

    def _student_weights(self, student: Tensor, pair: _LayerPair) -> Tensor:
        """[T] what the student's spans are pooled with."""
        if not pair.two_tokenizers and self.config.student_pooling == "teacher":
            return pair.token_weights
        importance = self._importance(student, pair.spans.rows)
        return normalize_weights(importance, pair.spans, backend=self.config.backend).token.reshape(-1)

    def _span_pair_terms(
        self, student: PooledSpans, teacher: PooledSpans, weights: Tensor, spans: SpanBatch, method: str
    ) -> tuple[Tensor, Tensor]:
        return span_pair_terms(
            student.states,
            teacher.states,
            weights,
            spans,
            reduction=self.config.normalization,
            method=method,
            backend=self.config.backend,
            norms=(student.norm, teacher.norm),
        )


class _LayerPair(NamedTuple):
    """What one layer pair has before the student's states are read."""

    teacher: Tensor  # flat hidden states [T, d_T], detached
    spans: SpanBatch  # on the student's tokens
    teacher_spans: SpanBatch  # the same object with one tokenizer
    two_tokenizers: bool
    importance: Tensor  # [B, S] or [T] of the teacher's tokens
    token_weights: Tensor  # [T] it over the spans' incidences: what pooling uses
    weights: SpanWeights  # what DSA and Hid are weighted with

    def dsa_weights(self, config: MTAConfig) -> Tensor:
        """DSA's weights of the spans [N]."""
        return torch.ones_like(self.weights.span) if config.weighting == "uniform" else self.weights.span

    def compared(self, states: Tensor) -> Compared:
        """What Hid compares with one tokenizer: the covered tokens, or with capacities all, of weight 0 where no span
        is; states of those count as 0, whatever padding holds."""
        if not self.spans.has_capacities:
            return Compared(states, self.teacher, self.spans.covered)
        covered = self.spans.token_splits.diff()[:, None] > 0
        tokens = torch.arange(len(states), dtype=torch.int32, device=states.device)
        return Compared(torch.where(covered, states, 0), torch.where(covered, self.teacher, 0), tokens)

    def hid_weights(self, config: MTAConfig) -> Tensor:
        """Hid's weights: of the covered tokens [C], n_j w_j; with two tokenizers of the spans [N].

        With capacities of all tokens [T].
        """
        uniform, per_row = config.weighting == "uniform", config.normalization == "sample"
        dtype = self.weights.span.dtype
        if self.two_tokenizers and uniform:
            spans_in_row = self.spans.span_splits.diff().to(dtype)[self.spans.span_rows]
            even = 1 / spans_in_row if per_row else torch.ones_like(spans_in_row)
            if not self.spans.has_capacities:
                return even
            return torch.where(self.spans.ranges.diff(dim=1)[:, 0] > 0, even, 0)  # what fills up is no span
        if self.two_tokenizers:
            return self.weights.span
        bounded = self.spans.has_capacities
        counts = (self.spans.token_splits if bounded else self.spans.cover_splits).diff()
        if uniform and not per_row:
            return counts.to(dtype)
        token = self.token_weights if config.weighting == "importance" else self.weights.token.reshape(-1)
        return (token if bounded else token.index_select(0, self.spans.covered)) * counts

    def hid_denominator(self, config: MTAConfig, weights: Tensor) -> Tensor:
        """The sum of ``hid_weights``; for "sample" the number of rows whose weights don't sum to 0."""
        if config.normalization == "sample":
            return (self.weights.row_total != 0).sum().to(self.weights.span.dtype)
        return weights.sum()


def _per_pair(name: str, dim: Any, pairs: int) -> list[int]:
    try:
        dims = [operator.index(d) for d in dim] if isinstance(dim, Iterable) else [operator.index(dim)] * pairs
    except TypeError:
        dims = []
    if len(dims) != pairs or min(dims) < 1:
        raise InputError(f"{name}: expected a width or one for each of the {pairs} layer pairs, got {dim!r}")
    return dims


def _span_batch(name: str, spans: Mapping[str, SpanBatch], kind: str) -> SpanBatch:
    if not isinstance(spans, Mapping) or kind not in spans:
        got = sorted(spans) if isinstance(spans, Mapping) else type(spans).__name__
        raise InputError(f"{name}: expected a dict with the key {kind!r}, got {got}")
    return spans[kind]


def _check_paired(own: SpanBatch, other: SpanBatch) -> None:
    if own is other:
        return
    same = (own.num_spans, own.num_rows) == (other.num_spans, other.num_rows)
    if same and not torch.compiler.is_compiling():
        same = torch.equal(own.host[:, 0], other.host[:, 0])
    if not same:
        raise InputError(
            f"teacher_spans: expected the spans of `spans`, {own.num_spans} in {own.num_rows} rows, row by row; got "
            f"{other.num_spans} in {other.num_rows} rows, or other numbers per row; make both with SpanBatch.pair"
        )


def _hidden_state(hidden: HiddenStates, layer: int, side: str, width: int, spans: SpanBatch) -> Tensor:
    if isinstance(hidden, Mapping):
        state = hidden.get(layer)
        available = sorted(hidden)
    else:
        state = hidden[layer] if layer < len(hidden) else None
        available = [i for i, h in enumerate(hidden) if h is not None]
    if state is None:
        raise InputError(f"{side}_hidden: expected the hidden state of layer {layer}, got layers {available}")
    check_float(f"{side}_hidden[{layer}]", state, (2, 3))
    if state.shape[-1] != width:
        raise InputError(
            f"{side}_hidden[{layer}]: expected width {width} as MTALoss was made for, got {state.shape[-1]}; "
            f"MTALoss.for_models reads the widths from the models"
        )
    return _unpacked(state, spans, 2)


def _unpacked(tensor: Tensor, spans: SpanBatch, ndim: int) -> Tensor:
    """[1, T, ...] of models that run on packed rows as [T, ...], of ``ndim`` dimensions; others as they are."""
    packed = len(spans.shape) == 1 and tensor.ndim == ndim + 1 and tensor.shape[0] == 1
    return tensor.squeeze(0) if packed else tensor


def _given_importance(importance: Mapping[int, Tensor], layer: int, hidden: Tensor, spans: SpanBatch) -> Tensor:
    if layer not in importance:
        raise InputError(
            f"teacher_importance: expected that of layer {layer}, got layers {sorted(importance)}; give all, or none"
        )
    values = _unpacked(importance[layer].detach(), spans, 1)
    check_float(f"teacher_importance[{layer}]", values, (1, 2))
    check_shape(f"teacher_importance[{layer}]", values, hidden.shape[:-1], "the teacher's tokens")
    check_device(hidden.device, teacher_importance=values)
    return values


def _check_mask(name: str, mask: Tensor | None, rows: Rows) -> None:
    if mask is None:
        return
    check_shape(name, mask, rows.shape, "the tokens of the spans")
    if torch.compiler.is_compiling() or mask.device.type != "cpu":
        return
    if not Rows.from_mask(mask).same_tokens(rows):
        raise InputError(f"{name}: expected the mask the spans were made with, got one with other real tokens")
