"""What the triton backend promises: gradients, torch.compile, the same bits, its precision, its refusals."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from batches import EDGE_ROWS, LAYOUTS, RaggedBatch, TokenSpans, make_batch, random_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mta_fast import MTAConfig, MTALoss, backends, pool_spans, reference, span_pair_loss, token_importance
from mta_fast.errors import BackendUnavailableError
from mta_fast.ops.hidden_alignment import _hidden_alignment, hidden_alignment_numerator
from mta_fast.ops.importance import _token_importance
from mta_fast.ops.pooling import _pool_spans, _pool_spans_gradient, _span_weights
from mta_fast.ops.span_pairs import _span_pairs, span_pair_terms

triton = pytest.importorskip("triton", reason="the triton backend needs the package triton")
from mta_fast import kernels  # noqa: E402
from mta_fast.kernels import _launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SMALL: list[tuple[int, TokenSpans]] = [(4, [(0, 2), (1, 4), (3, 4)]), (1, [(0, 1)]), (0, []), (3, [(0, 1), (1, 3)])]


# --- gradients and torch.library ---------------------------------------------------------------------------------


@pytest.fixture
def small() -> RaggedBatch:
    return make_batch("packed", SMALL)


def _states(batch: RaggedBatch, width: int) -> Tensor:
    return batch.lay(random_rows(batch.lengths, width)).to(DEVICE)


def test_gradcheck(small: RaggedBatch) -> None:
    spans = small.spans.to(DEVICE)
    student, teacher, weights = _states(small, 3), _states(small, 5), torch.rand(8, dtype=torch.float64, device=DEVICE)
    check = partial(torch.autograd.gradcheck, fast_mode=True)
    assert check(lambda x: pool_spans(x, weights, spans, backend="triton")[0], student.requires_grad_())
    pooled = torch.randn(spans.num_spans, 3, dtype=torch.float64, device=DEVICE).requires_grad_()
    other = torch.randn(spans.num_spans, 5, dtype=torch.float64, device=DEVICE)
    salience = torch.rand(spans.num_spans, dtype=torch.float64, device=DEVICE)
    for method in ("pairwise", "gram"):
        for reduction in ("mean", "sample"):
            options = {"reduction": reduction, "method": method, "backend": "triton"}
            assert check(lambda x, o=options: span_pair_loss(x, other, salience, spans, **o), pooled)
    matrix, bias = (torch.randn(*n, dtype=torch.float64, device=DEVICE).requires_grad_() for n in ((5, 3), (5,)))
    tokens = spans.covered
    assert check(
        lambda *x: hidden_alignment_numerator(x[0], teacher, tokens, weights[tokens], *x[1:], backend="triton"),
        (student.detach().requires_grad_(), matrix, bias),
    )


def test_opcheck(small: RaggedBatch) -> None:
    spans = small.spans.to(DEVICE)
    index, rows = list(spans.index_tensors()), [spans.rows.table, spans.rows.host]
    student, teacher = (_states(small, d).float().requires_grad_(d == 3) for d in (3, 5))
    weights = torch.rand(8, device=DEVICE)
    pooled, salience = torch.randn(spans.num_spans, 3, device=DEVICE), torch.rand(spans.num_spans, device=DEVICE)
    other, norm = torch.randn(spans.num_spans, 5, device=DEVICE), torch.ones(spans.num_spans, device=DEVICE)
    splits = [spans.span_rows, spans.span_splits, spans.host]
    matrix = torch.randn(5, 3, device=DEVICE).requires_grad_()
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (_token_importance, (student.detach(), *rows, 0, False, False, "triton")),
        (_span_weights, (weights, index, "triton")),
        (_pool_spans, (student, weights, index, rows, "triton")),
        (_pool_spans_gradient, (pooled, salience, weights, index, torch.bfloat16, "triton")),
        (_span_pairs, (pooled.clone().requires_grad_(), other, salience, [norm, norm], splits, "auto", True, "triton")),
        (
            _hidden_alignment,
            (student, teacher, spans.covered, weights[spans.covered], matrix, None, torch.float32, True, "triton"),
        ),
    ]
    for op, inputs in calls:
        torch.library.opcheck(op, inputs)


def _loss_and_gradients(batch: RaggedBatch, rows: list[list[Tensor]], **changes: Any) -> list[Tensor]:
    """Loss, gradients of the real tokens, gradients of the projections."""
    settings: dict[str, Any] = {"layer_pairs": [(0, 0)], "granularity": ["word"], "backend": "triton"}
    torch.manual_seed(1)
    loss = MTALoss(MTAConfig(**settings | changes), 8, 16).to(DEVICE)
    student, teacher = (batch.lay(side).to(DEVICE) for side in rows)
    output = loss({0: student.requires_grad_()}, {0: teacher}, {"word": batch.spans.to(DEVICE)})
    first, *rest = torch.autograd.grad(output.loss, [student, *loss.parameters()])
    return [output.loss.detach(), batch.unlay(first.cpu()), *rest]


def test_the_same_bits_twice_and_in_every_layout() -> None:
    long = (270, [(j, j + 1) for j in range(0, 270, 30)])
    for method, rows in (("pairwise", [*EDGE_ROWS, long]), ("gram", EDGE_ROWS)):
        sides = [random_rows([n for n, _ in rows], d, dtype=torch.float32) for d in (8, 16)]
        made = [_loss_and_gradients(make_batch(x, rows), sides, dsa_method=method) for x in ("right", *LAYOUTS)]
        for other in made[1:]:
            assert all(torch.equal(x, y) for x, y in zip(made[0], other, strict=True))


def test_compile_takes_the_loss_whole_and_never_again_for_new_lengths() -> None:
    settings: dict[str, Any] = {"layer_pairs": [(0, 0)], "granularity": ["word"], "backend": "triton"}
    loss = MTALoss(MTAConfig(**settings), 8, 16).to(DEVICE)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for step, lengths in enumerate([(9, 7, 4), (8, 6, 5), (11, 3, 2)]):
            batch = make_batch("right", [(n, [(0, 2), (1, n)]) for n in lengths])
            student, teacher = (batch.lay(random_rows(batch.lengths, d, dtype=torch.float32)) for d in (8, 16))
            student, spans = student.to(DEVICE).requires_grad_(), {"word": batch.spans.to(DEVICE)}
            inputs = ({0: student}, {0: teacher.to(DEVICE)}, spans)
            with torch._dynamo.config.patch(error_on_recompile=step > 1):
                made = compiled(*inputs).loss
            expected = loss(*inputs).loss
            assert torch.equal(made, expected)
            assert torch.equal(*(torch.autograd.grad(x, student)[0] for x in (made, expected)))


# --- no synchronisation, no large buffers ------------------------------------------------------------------------


def test_nothing_is_read_back_from_the_device() -> None:
    # tensors of device "meta" have no data: .item(), .cpu() or nonzero would raise
    batch = make_batch("packed", [(600, [(j, j + 1) for j in range(500)]), (40, [(0, 3), (2, 5)])])
    made = batch.spans.to("meta")
    spans, rows = made.index_tensors(), (made.rows.table, made.rows.host)
    student, teacher = (torch.empty(640, d, device="meta") for d in (8, 16))
    seen: list[_launch.Launch] = []
    with _launch.observe(seen.append, execute=False):
        token, span, _ = kernels.span_weights(kernels.token_importance(teacher, *rows, 0, False, False), spans)
        pooled, other = (kernels.pool_spans(x, token, spans, *rows) for x in (student, teacher))
        sides = (pooled[0], other[0], span, pooled[2], other[2])
        kernels.span_pairs(*sides, spans.span_splits, spans.host, "auto", True)
        kernels.pool_spans_gradient(pooled[0], span, token, spans, torch.float32)
        weights, matrix = token.new_empty(len(spans.covered)), token.new_empty(16, 8)
        kernels.hidden_alignment(student, teacher, spans.covered, weights, matrix, None, torch.float32, True)
    assert len(seen) == 17  # one pass and two, pairwise and Gram form, one chunk of Hid
    largest = max(x.numel() for made in seen for x in made.arguments.values() if isinstance(x, Tensor))
    assert largest == 3 * 64 * 64 > teacher.numel()  # one tile of errors; nothing 600 x 600, nothing 500 x 500


@pytest.mark.parametrize(("length", "slots"), [(256, 4), (300, 3), (4096, 32), (16384, 32), (131072, 128)])
def test_scratch_of_importance(length: int, slots: int) -> None:
    """12 S ceil(S / 1024) bytes for long rows; at most 32 slots a token for shorter ones."""
    host = torch.tensor([[0, length]], dtype=torch.int32)
    hidden = torch.empty(length, 8, dtype=torch.bfloat16, device="meta")
    seen: list[_launch.Launch] = []
    with _launch.observe(seen.append, execute=False):
        kernels.token_importance(hidden, host.to("meta"), host, 0, False, False)
    assert {x.arguments["partial_sums"].numel() for x in seen if "partial_sums" in x.arguments} == {slots * length}


# --- split precision ---------------------------------------------------------------------------------------------


def _tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the 10 stored bits of TF32."""
    return ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The interpreter multiplies float32 as tensor cores do in the precision asked for, and notes which it was."""
    if DEVICE == "cuda":
        pytest.skip("a GPU needs no emulation")
    from triton.runtime import interpreter

    used: list[str] = []

    def create_dot(_builder: Any, a: Any, b: Any, d: Any, input_precision: Any, _imprecise: int) -> Any:
        name = str(input_precision).rsplit(".", 1)[-1].lower()
        used.append(name)
        left, right = a.data, b.data
        if left.dtype != np.float32 or name == "ieee":
            product = left @ right
        else:
            high_left, high_right = _tf32(left), _tf32(right)
            product = high_left @ high_right
            if name == "tf32x3":
                low_left, low_right = _tf32(left - high_left), _tf32(right - high_right)
                product = (low_left @ high_right + high_left @ low_right) + product
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    yield used
    torch.set_float32_matmul_precision("highest")


def _similar_spans(cosine: float) -> tuple[Any, ...]:
    """40 spans whose mean cosine is ``cosine``, as hidden states of real models have."""
    batch = make_batch("packed", [(40, [(j, j + 1) for j in range(40)])])
    spread = (1 / cosine - 1) ** 0.5
    sides = (1 + spread * torch.randn(40, d, dtype=torch.float64) for d in (48, 64))
    return (*(side.float() for side in sides), torch.rand(40), batch.spans)


def _numerator_and_gradient(student: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    numerator, _ = span_pair_terms(leaf, *rest, reduction="none", **options)
    return numerator.detach(), torch.autograd.grad(numerator, leaf)[0]


@pytest.mark.parametrize("cosine", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("method", ["pairwise", "gram"])
def test_split_products_are_as_exact_as_float32(tensor_cores: list[str], method: str, cosine: float) -> None:
    inputs = _similar_spans(cosine)
    exact = _numerator_and_gradient(
        *(x.double() for x in inputs[:3]), inputs[3], method="pairwise", backend="reference"
    )
    eager = _numerator_and_gradient(*inputs, method=method, backend="reference")
    relative = lambda made: [((x.double() - y).norm() / y.norm()).item() for x, y in zip(made, exact, strict=True)]  # noqa: E731
    split = relative(_numerator_and_gradient(*inputs, method=method, backend="triton"))
    # the parts of unit spans are bfloat16, in float32's clothes here: nothing is left to split
    assert set(tensor_cores) == {"ieee" if method == "pairwise" else "tf32x3"}
    for error, allowed in zip(split, relative(eager), strict=True):
        assert error <= 2 * allowed + 1e-6 / (1 - cosine)
    torch.set_float32_matmul_precision("high")
    single = relative(_numerator_and_gradient(*inputs, method=method, backend="triton"))
    if method == "gram":  # stays exact: single products are not enough for it
        assert single == split
    else:
        assert single[1] > 4 * split[1]  # two parts in place of three


class Operators(TorchDispatchMode):
    """Names of torch's operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_gram_form_leaves_no_product_to_torch() -> None:
    # which may make it of TF32, where the emulation above would not see it
    student, teacher, weights, spans = (x.to(DEVICE) for x in _similar_spans(0.9))
    norms = student.norm(dim=1), teacher.norm(dim=1)
    with Operators() as used:
        kernels.span_pairs(student, teacher, weights, *norms, spans.span_splits, spans.host, "gram", True)
    assert {"mul", "sum"} <= used.names
    assert not {name for name in used.names if "mm" in name or "mv" in name or "matmul" in name or "dot" in name}


def test_both_of_torchs_precision_settings_are_followed() -> None:
    settings = (
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    )
    code = (  # each in a process of its own, forked where torch is imported and has not been asked for anything
        "import os, torch; from mta_fast.kernels._launch import numerics; x = torch.empty(2, 2)\n"
        f"for setting in {settings!r}:\n"
        "    if os.fork(): os.wait(); continue\n"
        "    before = numerics(x).constants['PRECISION']; exec(setting)\n"
        "    print(before, numerics(x).constants['PRECISION'], flush=True); os._exit(0)\n"
    )
    assert _without_interpreter(code).splitlines() == ["tf32x3 tf32"] * len(settings)


def test_importance_follows_the_matmul_precision(tensor_cores: list[str]) -> None:
    hidden = torch.randn(2, 40, 48) + 2
    exact, eager = (token_importance(x, backend="reference") for x in (hidden.double(), hidden))
    errors = {}
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        errors[setting] = (token_importance(hidden, backend="triton") - exact).norm().item()
    assert set(tensor_cores) == {"tf32x3", "tf32"}
    assert errors["highest"] <= 2 * (eager - exact).norm() + 3e-7 * exact.norm()
    assert errors["high"] > 20 * errors["highest"]


# --- who runs a call ---------------------------------------------------------------------------------------------


def test_auto_never_picks_the_interpreter() -> None:
    if DEVICE == "cuda":
        pytest.skip("the kernels are compiled here")
    choice = backends.choose("token_importance", [torch.empty(2, 2)])
    assert choice.name != "triton"
    assert choice.refused["triton"] == ["the interpreter is for tests"]


def _without_interpreter(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return made.stdout + made.stderr


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    code = "import torch, mta_fast; mta_fast.token_importance(torch.randn(1, 3, 4), backend='triton')"
    output = _without_interpreter(code)
    assert "BackendUnavailableError: token_importance (torch.float32[3, 4] on cpu)" in output
    assert "triton: CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 before the first call" in output


def test_the_package_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, mta_fast\n"
        "mta_fast.token_importance(torch.randn(1, 3, 4)); print(sorted(m for m in sys.modules if 'kernels' in m))"
    )
    assert _without_interpreter(code).strip() == "[]"


@pytest.fixture
def forget() -> Iterator[None]:
    """What was found about Triton and the devices is looked up again, before and after."""
    for found in (backends._triton_is_missing, backends._device_is_unfit):
        found.cache_clear()
    yield
    for found in (backends._triton_is_missing, backends._device_is_unfit):
        found.cache_clear()


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (lambda m: m.setattr(importlib.util, "find_spec", lambda name: None), "triton is not installed"),
        (lambda m: m.setattr(triton, "__version__", "3.5.1"), "expected triton >= 3.6, got 3.5.1"),
    ],
    ids=["missing", "old"],
)
def test_a_missing_or_old_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch, patch: Callable[[pytest.MonkeyPatch], None], message: str
) -> None:
    patch(monkeypatch)
    with pytest.raises(BackendUnavailableError, match=message):
        token_importance(torch.randn(1, 3, 4, device=DEVICE), backend="triton")
    assert token_importance(torch.randn(1, 3, 4, device=DEVICE)).shape == (1, 3)  # auto: the reference


@dataclass
class Stand:
    """A tensor on a GPU that is not here."""

    device: torch.device
    dtype: torch.dtype = torch.float32


@pytest.mark.usefixtures("forget")
def test_unfit_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons_against: Any = backends.BACKENDS["triton"].reasons_against
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    expected = ["expected compute capability 8.0 or later, got 7.5"]
    assert reasons_against("token_importance", [Stand(torch.device("cuda:0"))]) == expected
    backends._warn_of_slower.cache_clear()
    with pytest.warns(UserWarning, match="expected triton on a GPU and takes a slower one: expected compute"):
        assert backends.choose("token_importance", [Stand(torch.device("cuda:0"))]).name == "reference"  # type: ignore[list-item]
    backends._device_is_unfit.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = type("Properties", (), {"gcnArchName": "gfx1100:sramecc+"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    expected = ["expected one of gfx90a, gfx942, gfx950, got gfx1100"]
    assert reasons_against("token_importance", [Stand(torch.device("cuda:0"))]) == expected


@pytest.mark.parametrize(
    ("capability", "family"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 0), "sm_80")],
)
def test_gpus_take_the_rows_of_their_family(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], family: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert _launch._device_architecture.__wrapped__(0) == family


def test_every_op_has_a_kernel() -> None:
    assert set(kernels.__all__) == set(backends.OPS)
    assert all(callable(getattr(module, op)) for op in backends.OPS for module in (kernels, reference))
