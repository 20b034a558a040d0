"""The C++ kernels against the float64 reference: edges, dtypes, thread counts, memory, bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import check
from batches import EDGE_ROWS, LAYOUTS, RaggedBatch, TokenSpans, make_batch, random_rows
from torch import Tensor

from mta_fast import MTAConfig, MTALoss, _extension, backends, token_importance
from mta_fast.ops.hidden_alignment import hidden_alignment_numerator
from mta_fast.ops.linear_divergence import linear_divergence_loss
from mta_fast.ops.pooling import normalize_weights, pooled_spans
from mta_fast.ops.span_pairs import span_pair_terms

if reason := _extension.why_missing():
    pytest.skip(reason, allow_module_level=True)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS = [{}, {"causal": True}, {"count_padding": True}, {"causal": True, "count_padding": True}]


def compare(call: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> None:
    """call(backend, *inputs): "cpp" against "reference" in the same dtypes and in float64."""
    exact = call(
        "reference", *(x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    )
    for ours, eager, true in zip(call("cpp", *inputs), call("reference", *inputs), exact, strict=True):
        assert ours.dtype == eager.dtype
        if ours.dtype == inputs[0].dtype == torch.float64:  # eager is the exact one
            assert (ours - true).norm() <= 1e-13 * true.norm()
        else:
            check(ours, eager, true)


# --- importance --------------------------------------------------------------------------------------------------

# 0, 1 and 2 tokens; around a block (64 up to 256 tokens, 128 beyond); several blocks, the last one short
LENGTHS = [0, 1, 2, 5, 63, 64, 65, 256, 257, 300]


def _rows(lengths: list[int], width: int, dtype: torch.dtype) -> RaggedBatch:
    batch = make_batch("right", [(n, []) for n in lengths])
    batch.hidden = batch.lay([row.to(dtype) for row in random_rows(lengths, width)], padding=0.5)
    return batch


def _importance(batch: RaggedBatch, **options: bool) -> Callable[..., tuple[Tensor, ...]]:
    return lambda backend, hidden: (token_importance(hidden, batch.mask, backend=backend, **options),)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance(dtype: torch.dtype, options: dict[str, bool]) -> None:
    batch = _rows(LENGTHS, 40, dtype)
    compare(_importance(batch, **options), batch.hidden)


# 1,024: the longest row that holds its scores; 1,025 and 1,300: strips; 4,200: strips of another height;
# 8,300: more strips than tasks
@pytest.mark.parametrize("length", [1024, 1025, 1300, 4200, 8300])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_importance_of_long_rows(length: int, options: dict[str, bool]) -> None:
    for dtype in (torch.float32, torch.bfloat16)[: 2 if length < 4000 else 1]:
        batch = _rows([3, length, 70], 8, dtype)
        compare(_importance(batch, **options), batch.hidden)


@pytest.mark.parametrize("width", [2, 3, 64, 577, 1600, 8192])
def test_importance_of_any_width(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        batch = _rows([5, 40, 130], width, dtype)
        compare(_importance(batch), batch.hidden)


def test_importance_of_large_means_and_scales() -> None:
    # the standard deviation is 1e-3 of the mean: a difference of squares would lose it
    batch = _rows([5, 70], 700, torch.float32)
    compare(_importance(batch), batch.hidden * 1e-3 + 1)
    for scale in (1e-30, 1e-6, 1e18, 1e20):  # products of states leave float32's range at the ends
        compare(_importance(batch), batch.hidden * scale)


def test_a_state_that_is_not_finite_stays_in_its_row() -> None:
    batch = _rows([70, 80], 16, torch.float32)
    clean = token_importance(batch.hidden, batch.mask, backend="cpp")
    for value in (torch.nan, torch.inf):
        hidden = batch.hidden.clone()
        hidden[0, 3, 5] = value
        made = token_importance(hidden, batch.mask, backend="cpp")
        assert made[0, :70].isnan().all()
        assert torch.equal(made[1], clean[1])


# --- pooling -----------------------------------------------------------------------------------------------------


def _pooling(batch: RaggedBatch) -> Callable[..., tuple[Tensor, ...]]:
    def call(backend: str, hidden: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        weights = normalize_weights(values, batch.spans, backend=backend)
        pooled = pooled_spans(hidden.reshape(-1, 5), weights.token.reshape(-1), batch.spans, backend=backend)
        (grad,) = torch.autograd.grad((pooled.states * torch.arange(1, 6, dtype=pooled.states.dtype)).sum(), hidden)
        return *weights, *pooled, grad

    return call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling(layout: str, dtype: torch.dtype) -> None:
    batch = make_batch(layout, EDGE_ROWS)
    hidden = batch.lay(random_rows(batch.lengths, 5), padding=0.0).to(dtype).requires_grad_()
    values = batch.lay([row.abs() for row in random_rows(batch.lengths)], padding=0.0)
    values = values if dtype == torch.float64 else values.float()
    compare(_pooling(batch), hidden, values)
    compare(_pooling(batch), hidden, torch.zeros_like(values))  # every span's weights sum to 0


# --- span pairs --------------------------------------------------------------------------------------------------


def _words(length: int) -> tuple[int, TokenSpans]:
    return length, [(j, j + 1) for j in range(length)]


def _pairs(counts: list[int], method: str) -> Callable[..., tuple[Tensor, ...]]:
    spans = make_batch("packed", [_words(n) for n in counts]).spans

    def call(backend: str, student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        options = {"reduction": "none", "method": method, "backend": backend}
        terms = span_pair_terms(student, teacher, weights, spans, **options)
        return *terms, *torch.autograd.grad(3 * terms[0], student)

    return call


def _pooled(count: int, widths: tuple[int, int] = (24, 40)) -> list[Tensor]:
    student, teacher = (torch.randn(count, width) + 1 for width in widths)
    return [student.requires_grad_(), teacher, torch.rand(count)]


# around a block of 64 and of 128; 1,024: the longest row that holds its errors; beyond: strips, two tiles of them
@pytest.mark.parametrize("counts", [[0, 1, 2, 5], [63, 64, 65, 0, 256, 257, 300], [1024, 3], [1025, 7, 1100]], ids=str)
@pytest.mark.parametrize("method", ["pairwise", "gram"])
def test_span_pairs(counts: list[int], method: str) -> None:
    compare(_pairs(counts, method), *_pooled(sum(counts)))


def test_gram_of_several_tiles_and_chunks() -> None:
    compare(_pairs([2100, 130], "gram"), *_pooled(2230, (260, 520)))  # tiles of 256, chunks of 1,024


@pytest.mark.parametrize("method", ["pairwise", "gram"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float64,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2], ids=str
)
def test_span_pairs_of_any_dtype(method: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher, weights = _pooled(170)
    student = student.detach().to(dtypes[0]).requires_grad_()
    compare(_pairs([100, 70], method), student, teacher.to(dtypes[1]), weights)


@pytest.mark.parametrize("count", [200, 1100])
def test_span_pairs_of_zero_vectors_and_any_length(count: int) -> None:
    student, teacher, weights = _pooled(count)
    with torch.no_grad():
        student[3] = 0
        teacher[3:5] = 0
        student[7] *= 1e-17  # products of states leave float32's range
        teacher[8] *= 1e17
    for method in ("pairwise", "gram"):
        compare(_pairs([count], method), student, teacher, weights)


def test_auto_takes_the_gram_form_where_it_has_fewer_products() -> None:
    student, teacher, weights = _pooled(60, (4, 6))
    call = {method: _pairs([4, 56], method) for method in ("auto", "pairwise", "gram")}
    # gram_from(4, 6) is 9: the row of 4 spans goes pair by pair, the other not
    whole = [call[method]("cpp", student, teacher, weights)[2] for method in call]
    assert torch.equal(whole[0][:4], whole[1][:4])
    assert torch.equal(whole[0][4:], whole[2][4:])
    assert not torch.equal(whole[1][4:], whole[2][4:])


# --- hidden alignment --------------------------------------------------------------------------------------------


def _alignment(count: int, autocast: torch.dtype | None = None) -> Callable[..., tuple[Tensor, ...]]:
    def call(
        backend: str, student: Tensor, teacher: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor | None
    ) -> Any:
        tokens = torch.randperm(len(student), generator=torch.Generator().manual_seed(0))[:count]
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = hidden_alignment_numerator(student, teacher, tokens, weights, matrix, bias, backend=backend)
        learnt = [x for x in (student, matrix, bias) if x is not None]
        return loss, *torch.autograd.grad(loss * 3, learnt)

    return call


def _states(count: int, widths: tuple[int, int], *dtypes: torch.dtype) -> list[Tensor]:
    made = [torch.randn(count + 5, widths[0]), torch.randn(count + 5, widths[1]), torch.rand(count)]
    made += [torch.randn(widths[1], widths[0]), torch.randn(widths[1])]
    student, teacher, weights, matrix, bias = (x.to(d) for x, d in zip(made, dtypes, strict=True))
    return [student.requires_grad_(), teacher, weights, matrix.requires_grad_(), bias.requires_grad_()]


F64, F32, BF16, F16 = DTYPES


# no token; below, at and above the smallest block; several blocks; more than one piece, the last one short
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 700, 2049, 4500])
def test_hidden_alignment(count: int) -> None:
    states = _states(count, (24, 40), *[F32] * 5)
    compare(_alignment(count), *states)
    compare(_alignment(count), *states[:4], None)


def test_hidden_alignment_of_several_tiles() -> None:
    compare(_alignment(300), *_states(300, (1030, 300), *[F32] * 5))  # tiles of 128 x 515


@pytest.mark.parametrize(
    "dtypes",
    [
        (F64,) * 5,
        (F32, F64, F32, F32, F32),
        (F32, BF16, F32, F32, F32),
        (BF16,) * 5,
        (F16,) * 5,
        (BF16, F16, F32, F32, F16),
    ],
    ids=str,
)
def test_hidden_alignment_of_any_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    compare(_alignment(90), *_states(90, (24, 40), *dtypes))


@pytest.mark.parametrize("autocast", [BF16, F16])
def test_hidden_alignment_rounds_factors_under_autocast(autocast: torch.dtype) -> None:
    inputs = _states(90, (24, 40), *[F32] * 5)
    ours, eager, unrounded = (
        _alignment(90, kind)(b, *inputs)
        for b, kind in [("cpp", autocast), ("reference", autocast), ("reference", None)]
    )
    for a, b, c in zip(ours, eager, unrounded, strict=True):
        assert (a - b).norm() < 0.2 * (b - c).norm()


def test_zero_vectors_have_no_direction() -> None:
    student, teacher, weights, matrix, _ = _states(70, (24, 40), *[F32] * 5)
    with torch.no_grad():
        student[::3] = 0
        teacher[::4] = 0
    compare(_alignment(70), student, teacher, weights, matrix, None)


# --- all together ------------------------------------------------------------------------------------------------


def _loss(backend: str, student: Tensor, teacher: Tensor, batch: RaggedBatch, dtype: torch.dtype, preset: str) -> Any:
    torch.manual_seed(3)
    make = getattr(MTAConfig, preset)
    config = make(layer_pairs=[(0, 0), (1, 1)], granularity=["word", "phrase"], backend=backend)
    loss = MTALoss(config, student.shape[-1], teacher.shape[-1]).to(dtype)
    hidden = {0: student, 1: student * 1.5}
    value = loss(hidden, {0: teacher, 1: teacher.flip(0)}, {"word": batch.spans, "phrase": batch.spans}).loss
    return value.detach(), *torch.autograd.grad(value, [student, *loss.parameters()])


@pytest.mark.parametrize("preset", ["paper", "public"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss(dtype: torch.dtype, preset: str) -> None:
    batch = make_batch("right", [*EDGE_ROWS, _words(140)])
    student, teacher = (batch.lay(random_rows(batch.lengths, d), padding=0.0).to(dtype) for d in (24, 40))
    student.requires_grad_()
    exact = _loss("reference", student.detach().double().requires_grad_(), teacher.double(), batch, F64, preset)
    made = [_loss(backend, student, teacher, batch, dtype, preset) for backend in ("cpp", "reference")]
    for ours, eager, true in zip(*made, exact, strict=True):
        if dtype == F64:
            assert (ours - true).norm() <= 1e-13 * true.norm()
        elif dtype == F32:
            check(ours, eager, true)
        else:  # the projections are rounded here and not in float64
            assert (ours.double() - eager.double()).norm() <= 4 * torch.finfo(dtype).eps * eager.double().norm()


def test_bitwise_the_same_at_any_thread_count() -> None:
    def everything() -> list[Tensor]:
        torch.manual_seed(1)
        batch = make_batch("packed", [_words(n) for n in (300, 40, 1200, 7, 130)])
        student, teacher = (torch.randn(sum(batch.lengths), d) for d in (48, 80))
        made = list(_loss("cpp", student.requires_grad_(), teacher, batch, F32, "paper"))
        made += _pairs([1300, 900], "gram")("cpp", *_pooled(2200, (48, 80)))
        return made + list(_pairs([1300, 900], "pairwise")("cpp", *_pooled(2200, (48, 80))))

    torch.set_num_threads(1)
    alone = everything()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(everything(), alone, strict=True)), threads


def test_a_zero_vector_changes_no_other_row() -> None:
    student, teacher, weights = _pooled(140, (100, 20))
    call = _pairs([70, 70], "pairwise")
    clean = call("cpp", student, teacher, weights)[2]
    with torch.no_grad():
        student[100] = 0
    assert torch.equal(call("cpp", student, teacher, weights)[2][:70], clean[:70])


@pytest.mark.parametrize("count", [20, 64, 100])
def test_small_products_are_bitwise_the_same_at_any_thread_count(count: int) -> None:
    # around the size from which an op leaves the calling thread
    def everything() -> list[Tensor]:
        torch.manual_seed(1)
        made = [token_importance(torch.randn(1, count, 100), backend="cpp")]
        for method, widths in (("pairwise", (100, 20)), ("gram", (4, 64))):
            made += _pairs([count], method)("cpp", *_pooled(count, widths))
        return made

    torch.set_num_threads(1)
    alone = everything()
    torch.set_num_threads(5)
    assert all(torch.equal(a, b) for a, b in zip(everything(), alone, strict=True))


def test_strides_and_offsets_of_views() -> None:
    wide = torch.randn(3, 70, 50)
    hidden = wide[..., 3:43]  # rows further apart than they are wide, not at the start of the memory
    for view in (hidden, hidden.transpose(0, 1).contiguous().transpose(0, 1), wide.mT.contiguous().mT[..., :40]):
        ours = token_importance(view, backend="cpp")
        assert torch.equal(ours, token_importance(view.contiguous(), backend="cpp"))
    inputs = _states(60, (24, 40), *[F32] * 5)
    views = [x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(x.requires_grad) for x in inputs]
    for a, b in zip(_alignment(60)("cpp", *views), _alignment(60)("cpp", *inputs), strict=True):
        assert torch.equal(a, b)
    row = torch.ones(24).expand(70, 24).clone().requires_grad_()
    expanded = _pairs([70], "pairwise")("cpp", row, torch.ones(40).expand(70, 40), torch.ones(1).expand(70))
    assert expanded[0] < 1e-8


PEAK = """
import torch
from mta_fast import token_importance
from mta_fast.ops.hidden_alignment import hidden_alignment_numerator
from mta_fast.backends import choose

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def growth(call):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before

torch.set_num_threads(2)
hidden = torch.randn(1, 12000, 16)
warm = token_importance(hidden[:, :64], backend="cpp")
print(growth(lambda: token_importance(hidden, backend="cpp")))
hidden = torch.randn(4000, 16, 512, dtype=torch.bfloat16)
print(growth(lambda: token_importance(hidden, backend="cpp")))
student, teacher, matrix = torch.randn(60000, 8), torch.randn(60000, 512), torch.randn(512, 8)
print(growth(lambda: hidden_alignment_numerator(
    student, teacher, torch.arange(60000), torch.ones(60000), matrix, None, backend="cpp")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_no_attention_map_and_no_projected_batch_in_memory() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    importance, halves, alignment = map(float, done.stdout.split())
    assert importance < 60, "an attention map would be 549 MB"
    assert halves < 80, "the batch in float32 would be 125 MB"
    assert alignment < 60, "the projected batch would be 117 MB"


def test_auto_runs_them_on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast import cpp

    seen: list[str] = []
    for op in backends.OPS:
        original = getattr(cpp, op)
        monkeypatch.setattr(cpp, op, lambda *args, op=op, run=original: (seen.append(op), run(*args))[1])
    batch = make_batch("right", EDGE_ROWS)
    student, teacher = (batch.lay(random_rows(batch.lengths, d), padding=0.0) for d in (6, 8))
    _loss("auto", student.requires_grad_(), teacher, batch, F64, "paper")
    linear_divergence_loss(
        torch.randn(3, 6), torch.randn(9, 6).requires_grad_(), torch.randn(3, 8), torch.randn(9, 8)
    ).backward()
    assert set(seen) == set(backends.OPS)
