"""Batches with capacities: the same results, and launches that follow from the capacities alone."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accuracy import check
from batches import RaggedBatch, make_batch
from models import make_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import make_rows

from mta_fast import MTAConfig, MTALoss, SpanBatch, SpanCollator, SpanExtractor, hidden_alignment_loss
from mta_fast.distill.data import load_rows, load_sample
from mta_fast.errors import InputError
from mta_fast.ops._operator import FUNCTIONS
from mta_fast.spans.batch import Capacities

pytest.importorskip("triton", reason="the triton backend needs the package triton")
from mta_fast.kernels import _launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS, KINDS, STUDENT_DIM, TEACHER_DIM = ((1, 2), (3, 4)), ("word", "phrase"), 5, 7
SIZE = 24  # tokens of a padded row
# rows of a batch of four: their tokens and spans; no, few and many of each
BATCHES: list[list[tuple[int, list[tuple[int, int]]]]] = [
    [(6, [(0, 2), (2, 6)]), (3, [(0, 1), (1, 3), (0, 3)]), (5, []), (0, [])],
    [(0, []), (0, []), (0, []), (0, [])],
    [(1, [(0, 1)]), (SIZE, [(j, j + 1) for j in range(SIZE)]), (9, [(1, 4), (3, 9)]), (2, [(0, 2)])],
]
EXACT = {"backend": "reference"}
MOST = Capacities(row_tokens=SIZE, row_spans=70, spans=80, incidences=90)


def _states(batch: RaggedBatch, rows: list[Any]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Student's and teacher's states of a batch; NaN in the padding."""
    generator = torch.Generator().manual_seed(1)
    made: list[dict[int, Tensor]] = []
    for layers, dim in (((1, 3), STUDENT_DIM), ((2, 4), TEACHER_DIM)):
        each = {
            layer: batch.lay([torch.randn(n, dim, generator=generator) for n, _ in rows], padding=torch.nan)
            for layer in layers
        }
        made.append({layer: states.to(DEVICE) for layer, states in each.items()})
    return made[0], made[1]


def _results(spans: SpanBatch, states: tuple[dict[int, Tensor], dict[int, Tensor]], **config: Any) -> list[Tensor]:
    """The terms, and the gradients of their sum; of the reference in float64."""
    torch.manual_seed(5)
    loss = MTALoss(MTAConfig(PAIRS, KINDS, **{"backend": "triton", **config}), STUDENT_DIM, TEACHER_DIM).to(DEVICE)
    dtype = torch.float64 if config.get("backend") == "reference" else torch.float32
    loss = loss.to(dtype)
    student = {layer: hidden.to(dtype, copy=True).requires_grad_() for layer, hidden in states[0].items()}
    teacher = {layer: hidden.to(dtype) for layer, hidden in states[1].items()}
    on_device = spans.to(DEVICE)
    output = loss(student, teacher, dict.fromkeys(KINDS, on_device))
    gradients = torch.autograd.grad(output.loss, [*student.values(), *loss.parameters()])
    return [output.dsa.detach(), output.hid.detach(), *gradients]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("right", {}),
        ("left", {"normalization": "sample"}),
        ("packed", {"weighting": "uniform", "student_pooling": "own"}),
    ],
)
def test_capacities_change_nothing(layout: str, config: dict[str, Any]) -> None:
    rows = BATCHES[2] if layout == "packed" else BATCHES[0]
    batch = make_batch(layout, rows)
    states = _states(batch, rows)
    _check_alike(batch, MOST, states, **config)


def _check_alike(batch: RaggedBatch, most: Capacities, states: Any, **config: Any) -> None:
    """The error with capacities is within the bound of the same without."""
    ours, other, exact = (
        _results(spans, states, **config, **backend)
        for spans, backend in ((batch.spans.with_capacities(most), {}), (batch.spans, {}), (batch.spans, EXACT))
    )
    for results in zip(ours, other, exact, strict=True):
        check(*results)


@pytest.mark.gpu
def test_capacities_of_long_rows_change_nothing() -> None:
    """Rows below and above the longest of one pass, of which the capacities hold only a bound."""
    rows: list[tuple[int, list[tuple[int, int]]]] = [(3, [(0, 2)]), (300, [(j, j + 2) for j in range(0, 140, 2)])]
    batch = make_batch("right", rows)
    states = _states(batch, rows)
    most = Capacities(row_tokens=batch.spans.shape[1], row_spans=100, spans=100, incidences=200)
    _check_alike(batch, most, states)


@pytest.mark.parametrize("config", [{"weighting": "uniform"}, {"normalization": "sample"}])
def test_capacities_with_two_tokenizers_and_denominators(config: dict[str, Any]) -> None:
    """Hid of spans, of which those that fill up the capacities are none."""
    rows = BATCHES[0]
    batch, other = (make_batch("right", rows) for _ in range(2))  # two objects, as two tokenizers have
    student, teacher = _states(batch, rows)
    loss = MTALoss(MTAConfig(PAIRS, KINDS, backend="triton", **config), STUDENT_DIM, TEACHER_DIM).to(DEVICE)
    made = []
    for capacities in (False, True):
        own, theirs = (
            dict.fromkeys(KINDS, (each.spans.with_capacities(MOST) if capacities else each.spans).to(DEVICE))
            for each in (batch, other)
        )
        output = loss(student, teacher, own, teacher_spans=theirs)
        made.append([output.dsa, output.hid, loss.denominators(teacher, own, teacher_spans=theirs)])
    for with_capacities, without in zip(*reversed(made), strict=True):
        torch.testing.assert_close(with_capacities, without)
    gram = MTALoss(MTAConfig(PAIRS, KINDS, backend="triton", dsa_method="gram"), STUDENT_DIM, TEACHER_DIM).to(DEVICE)
    with pytest.raises(InputError, match="expected 'auto' or 'pairwise' for spans with capacities"):
        gram(student, teacher, own)


def _padded(rows: list[Any]) -> RaggedBatch:
    """Of SIZE tokens a row, whatever the rows are."""
    return make_batch("right", [*rows, (SIZE, [])])


class _Sizes(TorchDispatchMode):
    """Every op of torch with what its tensors are; on "meta" the package's own run instead of their fakes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "mta_fast":
            with self:
                return FUNCTIONS[op._opname](*args, **(kwargs or {}))
        made = op(*args, **(kwargs or {}))
        tensors = [x for x in (*args, *(made if isinstance(made, (tuple, list)) else [made])) if isinstance(x, Tensor)]
        self.seen.append((str(op), [(x.dtype, x.shape, x.stride()) for x in tensors]))
        return made


def _plan(spans: Mapping[str, SpanBatch]) -> list[Any]:
    """Everything that a captured graph keeps of a batch's forward and backward: launches, and sizes of torch's ops."""
    launches: list[Any] = []

    def watch(made: Any) -> None:
        arguments = {
            name: (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value
            for name, value in made.arguments.items()
        }
        launches.append((made.name, made.grid, arguments, made.options))

    shape = spans["word"].shape
    loss = MTALoss(MTAConfig(PAIRS, KINDS, backend="triton"), 64, 96).to("meta")
    student, teacher = (
        {layer: torch.empty(*shape, dim, device="meta", requires_grad=dim == 64) for layer in layers}
        for layers, dim in (((1, 3), 64), ((2, 4), 96))
    )
    with _launch.observe(watch, execute=False), _Sizes() as sizes:
        output = loss(student, teacher, {kind: batch.to("meta") for kind, batch in spans.items()})
        torch.autograd.grad(output.loss, [*student.values(), *loss.parameters()])
    return [launches, sizes.seen]


@pytest.mark.parametrize("source", ["bundled", "dolly"])
def test_what_is_launched_follows_from_the_capacities_alone(source: str, request: pytest.FixtureRequest) -> None:
    """Ten batches of one to four real rows; a row without text stands for each that is missing."""
    pytest.importorskip("spacy")
    rows = make_rows()
    if source == "dolly":
        rows = load_rows(request.getfixturevalue("shared") / "data" / "dolly" / "dev.jsonl").rows[:40]
    spans = SpanExtractor()([row["prompt"] + row["output"] for row in rows])
    rows = [dict(row) | {name: column[i] for name, column in spans.items()} for i, row in enumerate(rows)]
    nothing = {"prompt": "", "output": "", "word_spans": [], "phrase_spans": []}
    drawn = random.Random(0)
    batches = [[*drawn.sample(rows, 1 + i % 4), *[nothing] * (3 - i % 4)] for i in range(10)]
    most = dict.fromkeys(KINDS, Capacities(row_tokens=400, row_spans=400, spans=1600, incidences=3200))
    plans = []
    for capacities in (most, None):
        collate = SpanCollator(make_tokenizer(), max_length=400, pad_to="max_length", capacities=capacities)
        plans.append([_plan(collate(batch)["spans"]) for batch in batches])
    bounded, others = plans
    assert {made[0] for made in bounded[0][0]} >= {"strips", "statistics", "pair_errors", "pair_gradients", "align"}
    for launches, sizes in bounded[1:]:
        assert launches == bounded[0][0]
        assert sizes == bounded[0][1]
    assert not any(plan == others[0] for plan in others[1:])


@pytest.mark.parametrize("capacities", [False, True], ids=["without", "with"])
def test_ops_that_read_lengths_are_kept_out_of_graphs(capacities: bool) -> None:
    """Without capacities every op that reads lengths on the host is tagged: Inductor leaves it out of CUDA graphs."""
    batch = make_batch("right", BATCHES[0])
    states, spans = _states(batch, BATCHES[0]), batch.spans.with_capacities(MOST) if capacities else batch.spans
    loss = MTALoss(MTAConfig(PAIRS, KINDS, backend="triton"), STUDENT_DIM, TEACHER_DIM).to(DEVICE)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "mta_fast":
                seen.add((op._opname, torch.Tag.cudagraph_unsafe in op.tags))
            return op(*args, **(kwargs or {}))

    with Watch():
        explained = loss(*states, dict.fromkeys(KINDS, spans.to(DEVICE)), explain=True)
        loss(*states, dict.fromkeys(KINDS, spans.to(DEVICE)))
    assert explained.layer_pairs
    ending = "_with_capacities" if capacities else ""
    reading = {"layer_weights", "layer_pairs", "pool_spans", "span_pairs"}
    unsafe = {name for name, tagged in seen if tagged}
    assert unsafe == (set() if capacities else reading)
    assert {f"{name}{ending}" for name in reading} <= {name for name, _ in seen}


def test_a_batch_takes_another_ones_spans() -> None:
    first, second = (_padded(rows) for rows in (BATCHES[0], BATCHES[2]))
    held = first.spans.with_capacities(MOST).to(DEVICE)
    held.copy_(second.spans.with_capacities(MOST))
    assert torch.equal(held.ranges.cpu(), second.spans.with_capacities(MOST).ranges)
    expected = second.spans.with_capacities(MOST)
    assert not expected.cover_splits.diff()[second.spans.covered.shape[0] :].any()  # n_j of what fills up
    for name, tensor in held.index._asdict().items():
        if name != "host":  # which a captured graph does not read
            assert torch.equal(tensor.cpu(), getattr(expected, name)), name
    assert torch.equal(held.rows.table.cpu(), expected.rows.table)
    with pytest.raises(InputError, match="expected a batch of the same capacities"):
        held.copy_(second.spans)
    with pytest.raises(InputError, match="expected a batch of the same capacities"):
        held.copy_(make_batch("right", [*BATCHES[0], (5, [])]).spans.with_capacities(MOST))


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (Capacities(5, 70, 80, 90), "rows of at most 5 tokens, got 24"),
        (Capacities(SIZE, 20, 80, 90), "at most 20 row_spans, got 24"),
        (Capacities(SIZE, 70, 27, 90), "at most 27 spans, got 28"),
        (Capacities(SIZE, 70, 80, 30), "at most 30 incidences, got 36"),
    ],
)
def test_what_is_larger_than_the_capacities_is_refused(most: Capacities, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_batch("right", BATCHES[2]).spans.with_capacities(most)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_other_backends_refuse_capacities(backend: str) -> None:
    if backend == "cpp":
        from mta_fast import _extension

        if (reason := _extension.why_missing()) is not None:
            pytest.skip(reason)
    batch = make_batch("right", BATCHES[0])
    states = _states(batch, BATCHES[0])
    cpu = tuple({layer: hidden.cpu() for layer, hidden in side.items()} for side in states)
    loss = MTALoss(MTAConfig(PAIRS, KINDS, backend=backend), STUDENT_DIM, TEACHER_DIM)
    spans = batch.spans.with_capacities(MOST)
    with pytest.raises(InputError, match="expected a batch without capacities"):
        loss(*cpu, dict.fromkeys(KINDS, spans))
    with pytest.raises(InputError, match="expected a batch without, got one that has them"):
        spans.with_capacities(MOST)
    weights, projection = torch.ones(*spans.shape), torch.ones(TEACHER_DIM, STUDENT_DIM)
    with pytest.raises(InputError, match="expected a batch without capacities, got one with them"):
        hidden_alignment_loss(cpu[0][1], cpu[1][2], weights, projection, spans=spans)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1, 1), "row_tokens from 1 to 2^31 - 1, got 0"),
        ((1, 1.5, 1, 1), "row_spans from 1 to 2^31 - 1, got 1.5"),
        ((1, 1, 2**31, 1), f"spans from 1 to 2^31 - 1, got {2**31}"),
    ],
)
def test_capacities_are_numbers(sizes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Capacities(*sizes)
    with pytest.raises(InputError, match="expected fewer than 2\\^31 spans in all rows"):
        make_batch("right", BATCHES[0]).spans.with_capacities(Capacities(SIZE, 2**30, 80, 90))


def test_the_collator_gives_every_batch_its_capacities() -> None:
    tokenizer = make_tokenizer()
    rows = [dict(row) | {"word_spans": [[0, 5]], "phrase_spans": [[0, 5], [0, 8]]} for row in load_sample()[:6]]
    most = {"word": Capacities(64, 8, 20, 40), "phrase": Capacities(64, 8, 30, 60)}
    collate = SpanCollator(tokenizer, max_length=64, pad_to="max_length", capacities=most)
    made = [collate(part)["spans"] for part in (rows[:3], rows[3:])]
    for kind, capacities in most.items():
        assert all(batch[kind].num_spans == capacities.spans for batch in made)
        made[0][kind].copy_(made[1][kind])
    with pytest.raises(InputError, match="at most 1 spans, got 3"):
        SpanCollator(tokenizer, granularity="word", capacities={"word": Capacities(256, 8, 1, 40)})(rows[:3])
    with pytest.raises(InputError, match="capacities: expected those of word, phrase, got word"):
        SpanCollator(tokenizer, capacities={"word": most["word"]})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA or ROCm device answers")
def test_a_captured_step_is_right_for_other_batches() -> None:
    """Captured once with the first batch, replayed with each."""
    batches = [(_padded(rows), [*rows, (SIZE, [])]) for rows in BATCHES]
    bounded = [(batch.spans.with_capacities(MOST).to(DEVICE), _states(batch, rows)) for batch, rows in batches]
    torch.manual_seed(5)
    loss = MTALoss(MTAConfig(PAIRS, KINDS, backend="triton"), STUDENT_DIM, TEACHER_DIM).to(DEVICE)
    spans, (student, teacher) = bounded[0]
    student = {layer: hidden.clone().requires_grad_() for layer, hidden in student.items()}

    def step() -> list[Tensor]:
        output = loss(student, teacher, dict.fromkeys(KINDS, spans))
        gradients = torch.autograd.grad(output.loss, [*student.values(), *loss.parameters()])
        return [output.dsa.detach(), output.hid.detach(), *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for (batch, _), (other, states) in zip(batches, bounded, strict=True):
        spans.copy_(other)
        for held, new in zip((student, teacher), states, strict=True):
            for layer in held:
                held[layer].data.copy_(new[layer])
        graph.replay()
        for made in zip(results, _results(batch.spans, states), _results(batch.spans, states, **EXACT), strict=True):
            check(*made)
