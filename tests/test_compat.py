"""The public scripts' calls, against their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.public_algorithm import public_loss
from bench.workload import standard_workload
from mta_fast import compat, token_importance
from mta_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("cpu_backend")

FIXTURES = ("small", "gpt2_like", "entropy")
Spans = list[list[tuple[int, int]]]


class Fixture:
    """One file of expected numbers, as the scripts' arguments."""

    def __init__(self, path: Path) -> None:
        self.data: dict[str, Any] = dict(np.load(path))
        self.layers = int(self.data["split"][2])
        self.student = tuple(self.tensor(f"student_hidden_{i}").requires_grad_() for i in range(self.layers))
        self.teacher = tuple(self.tensor(f"teacher_hidden_{i}") for i in range(self.layers))
        self.mask = self.tensor("attention_mask")
        self.projectors = nn.ModuleList(self._linear(i) for i in range(self.layers))
        layers = list(range(self.layers))
        entropy = {"entropy_weight": True} if self.data["entropy"] else {}
        split = self.data["split"].tolist()
        self.args = SimpleNamespace(
            student_layer_mapping=layers, teacher_layer_mapping=layers, split_layer_mapping=split, **entropy
        )
        self.logits = self.tensor("teacher_logits") if entropy else None

    def tensor(self, name: str) -> Tensor:
        return torch.tensor(self.data[name])

    def spans(self, kind: str) -> Spans:
        table, bounds = self.data[f"{kind}_spans"], np.cumsum(self.data[f"{kind}_counts"])
        return [[tuple(span) for span in part] for part in np.split(table, bounds[:-1])]

    def first_family(self) -> tuple[Any, ...]:
        states = (None, self.logits, self.student, self.teacher, self.tensor("offset_mapping"))
        return (self.projectors, self.mask, *states, self.spans("phrase"), self.spans("word"), self.args)

    def second_family(self) -> tuple[Any, ...]:
        states = (self.student, self.teacher, self.tensor("offset_mapping"))
        unused = [["not read"]]
        return (self.projectors, self.mask, *states, unused, self.spans("phrase"), self.spans("word"), self.args)

    def _linear(self, i: int) -> nn.Linear:
        weight = self.tensor(f"proj_weight_{i}")
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(self.tensor(f"proj_bias_{i}"))
        return linear


@pytest.fixture(params=FIXTURES)
def fixture(shared: Path, request: pytest.FixtureRequest) -> Fixture:
    return Fixture(shared / f"fixtures/{request.param}.npz")


@pytest.mark.parametrize("family", ["first_family", "second_family"])
def test_loss_and_gradients(fixture: Fixture, family: str) -> None:
    if family == "second_family" and fixture.logits is not None:
        with pytest.raises(InputError, match="expected t_logits with it"):
            compat.compute_overall_span_loss(*fixture.second_family())
        return
    loss = compat.compute_overall_span_loss(*getattr(fixture, family)())
    assert loss.item() == pytest.approx(float(fixture.data["loss"]), abs=1e-7)
    loss.backward()
    for i in range(fixture.layers):
        for name, grad in (
            (f"grad_student_hidden_{i}", fixture.student[i].grad),
            (f"grad_proj_weight_{i}", fixture.projectors[i].weight.grad),
            (f"grad_proj_bias_{i}", fixture.projectors[i].bias.grad),
        ):
            torch.testing.assert_close(grad, fixture.tensor(name), rtol=1e-4, atol=1e-8, msg=name)


def test_token_weights(fixture: Fixture) -> None:
    for i in range(fixture.layers):
        for side, hidden in (("student", fixture.student), ("teacher", fixture.teacher)):
            made = token_importance(hidden[i], fixture.mask, count_padding=True)
            torch.testing.assert_close(made, fixture.tensor(f"{side}_token_weights_{i}"), rtol=1e-5, atol=1e-8)


def test_call_by_name_float_mask_and_longer_offsets(fixture: Fixture) -> None:
    names = compat._FIRST_FAMILY
    call = dict(zip(names, fixture.first_family(), strict=True))
    expected = compat.compute_overall_span_loss(**call)
    call["attention_mask"] = call["attention_mask"].float()
    call["offsets_mapping"] = torch.cat([call["offsets_mapping"], torch.full((len(fixture.mask), 3, 2), 9999)], 1)
    projectors = call.pop(names[0])
    assert torch.equal(compat.compute_overall_span_loss(projectors, **call), expected)


def _made_up(batch: int = 3, seq_len: int = 20, dims: tuple[int, int] = (12, 20)) -> dict[str, Any]:
    """A call of the first family, on random states and ragged rows."""
    workload = standard_workload(batch, seq_len, dims)
    mask = torch.ones(batch, seq_len)
    for b in range(batch):
        mask[b, seq_len - 3 * b :] = 0
    args = SimpleNamespace(
        student_layer_mapping=[0, 1, 2], teacher_layer_mapping=[0, 1, 2], split_layer_mapping=[0, 1, 3, 3]
    )
    # not the standard workload's own projections: the scripts hold plain linear layers
    projectors = nn.ModuleList(nn.Linear(*dims) for _ in range(3))
    states = (tuple(workload.student_hidden.values()), tuple(workload.teacher_hidden.values()))
    spans = (workload.char_spans["phrase"], workload.char_spans["word"])
    arguments = (projectors, mask, None, None, *states, workload.offset_mapping, *spans, args)
    return dict(zip(compat._FIRST_FAMILY, arguments, strict=True))


def test_equals_the_public_algorithm_of_the_benchmark() -> None:
    # an independent, dense implementation: this holds without the expected numbers beside the checkout
    call = _made_up()
    learnt = [*call["s_hidden_states"], *call["projectors"].parameters()]
    loss = compat.compute_overall_span_loss(**call)
    hidden = [dict(enumerate(call[name])) for name in ("s_hidden_states", "t_hidden_states")]
    spans = [call["words_offsets"], call["spans_offsets"], call["spans_offsets"]]
    expected = public_loss(call["projectors"], call["attention_mask"].long(), *hidden, call["offsets_mapping"], spans)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, learnt), torch.autograd.grad(expected, learnt))


def test_where_the_scripts_crash() -> None:
    call = _made_up()
    args = call["args"]
    generator_state = torch.get_rng_state()

    def loss(**changes: Any) -> Tensor:
        made = compat.compute_overall_span_loss(**(call | changes))
        assert made.isfinite()
        made.backward()
        return made

    rows = len(call["attention_mask"])
    loss(words_offsets=[[], *call["words_offsets"][1:]])  # a row without spans
    assert loss(words_offsets=[[]] * rows, spans_offsets=[[]] * rows) == 0  # a batch without spans
    for bounds in ((0, 0, 3, 3), (0, 3, 3, 3)):  # an empty split on either side
        args.split_layer_mapping = bounds
        loss()
    args.split_layer_mapping = (0, 0, 0, 0)
    assert loss() == 0
    args.split_layer_mapping = (0, 1, 3, 3)
    mask = call["attention_mask"].clone()
    mask[0, 1:] = 0
    loss(attention_mask=mask)  # a row of one real token
    assert torch.equal(torch.get_rng_state(), generator_state)  # and no random number was drawn


def test_states_as_tuple_with_gaps_or_dict() -> None:
    call = _made_up()
    expected = compat.compute_overall_span_loss(**call)
    for make in (lambda states: (*states, None), lambda states: dict(enumerate(states))):
        states = {name: make(call[name]) for name in ("s_hidden_states", "t_hidden_states")}
        assert torch.equal(compat.compute_overall_span_loss(**(call | states)), expected)


def test_public_spans(shared: Path) -> None:
    spacy = pytest.importorskip("spacy")
    from spacy.matcher import Matcher

    from mta_fast.spans.extract import load_pipeline

    nlp = load_pipeline("en_core_web_sm")
    assert isinstance(nlp, spacy.language.Language)
    matcher = Matcher(nlp.vocab)
    tail = [{"POS": "VERB", "OP": "+"}, {"POS": "ADV", "OP": "*"}]
    matcher.add("verb phrase", [[{"POS": "AUX", "OP": "*"}, {"POS": "ADV", "OP": "*"}, *tail]])
    rows = json.loads((shared / "fixtures/public_spans.json").read_text())
    texts = [row["text"] for row in rows]
    spans, words = compat.get_spans_offsets(texts, nlp, matcher)
    assert spans == [[tuple(span) for span in row["phrases"]] for row in rows]
    assert words == [[tuple(span) for span in row["words"]] for row in rows]
    assert compat.get_phrases_spans_offsets(texts[:2], nlp, matcher) == (spans[:2], spans[:2], words[:2])


def test_errors_name_expected_and_received() -> None:
    call = _made_up()
    with pytest.raises(InputError, match="got 3 by position"):
        compat.compute_overall_span_loss(1, 2, 3)
    with pytest.raises(InputError, match="projectors: expected 3 nn.Linear, one for each layer pair, got 0"):
        compat.compute_overall_span_loss(**(call | {"projectors": call["projectors"][:2]}))
    with pytest.raises(InputError, match="s_hidden_states: expected hidden states, got none"):
        compat.compute_overall_span_loss(**(call | {"s_hidden_states": (None,)}))
    for split in ((0, 4, 5, 5), (0, 1)):
        call["args"].split_layer_mapping = split
        with pytest.raises(InputError, match="0 <= a0 <= a1 <= a2 <= that number"):
            compat.compute_overall_span_loss(**call)
    del call["args"].split_layer_mapping
    with pytest.raises(InputError, match="args: expected student_layer_mapping, .* got none of split_layer_mapping"):
        compat.compute_overall_span_loss(**call)
