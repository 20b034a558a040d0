"""Random wrong calls of every op of ``torch.ops.mta_fast_cpp`` and ``torch.ops.mta_fast``, in a process of its own.

``python op_fuzz.py SEED CASES LOG``: each case takes a valid call, changes one to three of its arguments and makes it
with inputs beside guard pages. It must return tensors or raise an error that names an argument. Before each call its
case is written to LOG, so that the last line names the one that ended the process. Prints {op: [returned, refused]}.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from guard import guarded
from torch import Tensor

from mta_fast import SpanBatch, _extension, backends
from mta_fast.contract import DIVERGENCES
from mta_fast.layout import Spans
from mta_fast.ops import entropy, hidden_alignment, importance, linear_divergence, pooling, span_pairs  # noqa: F401  # registers the ops

NAMESPACES = ("mta_fast_cpp", "mta_fast")
FLOAT, INT, LONG = torch.float32, torch.int32, torch.int64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8)
DTYPES = (*DTYPES, torch.bool, torch.complex64, torch.uint16, torch.float8_e5m2)
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63 - 1)
# an output of 2^31 - 1 tokens would be asked for and might be given
ELEMENTS = (-(2**31), -(2**31) + 1, -2, -1, 0, 1, 2, 3, 5, 17, 2**31 - 2, 2**31 - 1)

# what is in the arguments that are lists of tensors, as the backends name it
LISTS: dict[str, tuple[str, ...]] = {
    "gradient": ("rows", "student", "weight", "bias"),
    "index": ("span_rows", "span_splits", "host"),
    "kinds": ("spans", "rows", "rows_host"),
    "norms": ("student_norm", "teacher_norm"),
    "rows": ("rows_host",),
    "spans": Spans._fields,
}

Arguments = dict[str, Any]


@cache
def schemas() -> dict[str, Any]:
    """{namespace::op: its schema} of every op that is registered."""
    names = torch._C._dispatch_get_all_op_names()
    ops = sorted(name for name in names if name.split("::")[0] in NAMESPACES)
    return {name: operator(name)._schema for name in ops}


def operator(name: str) -> Any:
    """The function of namespace::op."""
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


def valid_calls(rng: random.Random) -> dict[str, Arguments]:
    """A call of every op that is right, of random small sizes. A new op needs one here."""
    lengths = [rng.randint(0, 9) for _ in range(rng.randint(1, 4))] + [5]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens, student_width, teacher_width = int(cu_seqlens[-1]), rng.randint(2, 20), rng.randint(2, 20)
    starts = torch.cat([torch.arange(n) for n in lengths])
    offsets = torch.stack([2 * starts, 2 * starts + 1], 1)
    chars = [[(2 * (a := rng.randrange(n)), 2 * rng.randint(a, n - 1) + 1) for _ in range(n // 2)] for n in lengths]
    spans = SpanBatch.from_char_spans(chars, offsets, cu_seqlens=cu_seqlens, backend="reference")
    index, rows = spans.index_tensors(), spans.rows
    n, covered, batch = len(index.ranges), len(index.covered), len(lengths)
    dtype = rng.choice([torch.float64, FLOAT, torch.bfloat16, torch.float16])
    student, teacher = torch.randn(tokens, student_width).to(dtype), torch.randn(tokens, teacher_width)
    values, salience = torch.rand(tokens), torch.rand(n)
    pooled, pooled_teacher = torch.randn(n, student_width), torch.randn(n, teacher_width).to(dtype)
    norm, teacher_norm = pooled.norm(dim=1), pooled_teacher.float().norm(dim=1)
    weight, bias = torch.randn(teacher_width, student_width), torch.randn(teacher_width)
    gradient = (torch.randn(covered, student_width), torch.randn(teacher_width, student_width), bias)
    sides = {"student": pooled, "teacher": pooled_teacher, "weights": salience}
    aligned = {"student": student, "teacher": teacher, "tokens": index.covered, "weights": torch.rand(covered)}
    aligned |= {"proj_weight": weight, "proj_bias": rng.choice([bias, None]), "matmul_dtype": FLOAT}
    dtypes = {"student_dtype": dtype, "weight_dtype": FLOAT, "bias_dtype": FLOAT}
    backward = {"tokens": index.covered, "grad": torch.rand(()), "num_tokens": tokens, **dtypes}
    counts = {"seq_len": tokens, "causal": rng.random() < 0.5, "count_padding": False}
    table, listed = [rows.table, rows.host], list(index)
    pooling_backward = {"grad": pooled, "span_weight": salience, "weights": values}
    flag = {"with_gradient": rng.random() < 0.7}
    long_rows, span_rows = rows.host.long(), index.span_rows.long()
    characters = torch.randint(32, 64, (2 * tokens,), dtype=INT)
    texts = {"characters": characters, "text_splits": 2 * cu_seqlens, "spaces": torch.rand(40) < 0.2}
    flat_chars = torch.tensor([pair for row in chars for pair in row], dtype=LONG).reshape(-1, 2)
    char_rows = torch.repeat_interleave(torch.arange(batch), torch.tensor([len(row) for row in chars]))
    aligning = {"offsets": offsets, "rows": long_rows, "span_rows": char_rows, "char_spans": flat_chars}
    backend = {"backend": rng.choice(_backends())}
    splits = {"span_splits": index.span_splits}
    norms = {"student_norm": norm, "teacher_norm": teacher_norm}
    index_names = ("ranges", "span_splits", "covered", "covered_splits", "cover_splits")
    lists = {"token_splits": index.token_splits, "cover_spans": index.cover_spans}
    scaled = {"gradient": pooled, "grad": torch.rand(batch), "span_rows": index.span_rows, "dtype": dtype}
    method = {"method": rng.choice(["auto", "pairwise", "gram"])}
    diverging, kind = _diverging(rng, student, teacher)
    flags = {**flag, "with_head": rng.random() < 0.7}
    ops_own = {"divergence": kind, **diverging}
    cpps_own = {"kind": DIVERGENCES.index(kind), **diverging}
    kinds = {"kinds": [*index, *table] * 2, "kind_of": [0, 1, 0]}
    of_layers = {"hidden": [teacher, student.float()], "hidden_of": [0, 1, 1], **kinds, **counts}
    of_pairs = {"students": [student] * 3, "teachers": [teacher] * 3, **kinds, **method, **flag}
    of_pairs |= {"student_weights": [values] * 3, "teacher_weights": [values] * 3, "span_weights": [salience] * 3}
    of_gradients = {"gradients": [pooled] * 3, "sums": [salience] * 3, "weights": [values] * 3, **kinds}
    pairs_index = {"norms": [norm, teacher_norm], "index": [index.span_rows, index.span_splits, index.host]}
    calls = {
        "mta_fast_cpp::token_importance": {"hidden": student, "rows_host": rows.host, **counts},
        "mta_fast_cpp::span_weights": {"values": values, **{name: getattr(index, name) for name in index_names}},
        "mta_fast_cpp::pool_spans": {"hidden": student, "weights": values, "ranges": index.ranges},
        "mta_fast_cpp::pool_spans_gradient": {**pooling_backward, **lists, "dtype": dtype},
        "mta_fast_cpp::span_pairs": {**sides, **norms, **splits, "gram_from": rng.choice([-1, 0, 3]), **flag},
        "mta_fast_cpp::span_pairs_gradient": scaled,
        "mta_fast_cpp::hidden_alignment": {**aligned, **flag},
        "mta_fast_cpp::hidden_alignment_gradient": dict(zip(("rows", "weight", "bias"), gradient, strict=True))
        | backward,
        "mta_fast_cpp::linear_divergence": cpps_own | _int32_labels(diverging) | flags,
        "mta_fast_cpp::token_ranges": aligning | (texts if rng.random() < 0.5 else dict.fromkeys(texts)),
        "mta_fast_cpp::span_index": {"span_rows": span_rows, "ranges": index.ranges.long()}
        | {"offsets": offsets, "rows": long_rows},
        "mta_fast::token_importance": {"hidden": student, "rows": rows.table, "rows_host": rows.host, **counts}
        | backend,
        "mta_fast::span_weights": {"values": values, "spans": listed, **backend},
        "mta_fast::pool_spans": {"hidden": student, "weights": values, "spans": listed, "rows": table, **backend},
        "mta_fast::pool_spans_gradient": {**pooling_backward, "spans": listed, "dtype": dtype, **backend},
        "mta_fast::span_pairs": {**sides, **pairs_index, **method, **flag, **backend},
        "mta_fast::span_pairs_gradient": scaled | backend,
        "mta_fast::hidden_alignment": {**aligned, **flag, **backend},
        "mta_fast::hidden_alignment_gradient": {"gradient": list(gradient), **backward, **backend},
        "mta_fast::layer_weights": {**of_layers, **backend},
        "mta_fast::layer_pairs": {**of_pairs, **backend},
        "mta_fast::layer_pairs_gradient": {**of_gradients, "grad": torch.rand(3, batch), "dtype": dtype, **backend},
        "mta_fast::linear_divergence": {**ops_own, **flags, **backend},
        "mta_fast::linear_divergence_rows": {**ops_own, **backend},
        "mta_fast::linear_divergence_gradient": {
            "gradient": [torch.randn(tokens, student_width), *gradient[1:]],
            "grad": torch.rand(()),
            **dtypes,
            **backend,
        },
        "mta_fast::trajectory_divergence": {**_of_layers(diverging, student, teacher), **flags},
        "mta_fast::entropy_weights": {"logits": pooled_teacher},
    }
    ending = "_with_capacities"  # another op of the same function, which takes batches without them too
    return calls | {name: dict(calls[name.removesuffix(ending)]) for name in schemas() if name.endswith(ending)}


def _diverging(rng: random.Random, student: Tensor, teacher: Tensor) -> tuple[Arguments, str]:
    """Arguments of linear_divergence but the divergence, and that; heads of 40 and 43 ids."""
    kind, size = rng.choice(DIVERGENCES), len(student)
    made: Arguments = {"student": student, "student_weight": torch.randn(40, student.shape[1])}
    made |= {"student_bias": rng.choice([torch.randn(40), None]), "labels": None}
    made |= {"teacher": teacher, "teacher_weight": torch.randn(43, teacher.shape[1]), "teacher_bias": None}
    if kind == "cross_entropy":
        made |= dict.fromkeys(("teacher", "teacher_weight")) | {"labels": torch.randint(0, 40, (size,))}
    made |= {"alpha": torch.full((size,), 0.1), "factors": torch.rand(size), "beta": 0.5, "detach": rng.random() < 0.5}
    for side in ("student", "teacher"):
        numbers = {"scale": rng.choice([1.0, 0.5]), "softcap": rng.choice([0.0, 3.0]), "temperature": 2.0}
        made |= {f"{side}_{name}": value for name, value in numbers.items()}
    return made | {"vocabulary": 40, "matmul_dtype": FLOAT, "teacher_matmul_dtype": FLOAT}, kind


def _of_layers(diverging: Arguments, student: Tensor, teacher: Tensor) -> Arguments:
    """Arguments of trajectory_divergence, three layers."""
    others = ("alpha", "factors", "beta", "detach", "labels", "student_temperature", "teacher_temperature")
    made = {name: value for name, value in diverging.items() if name not in others}
    made |= {"teacher_weight": torch.randn(43, teacher.shape[1]), "tau": 2.0}
    return made | {"student": student.expand(3, -1, -1), "teacher": teacher.expand(3, -1, -1)}


def _int32_labels(arguments: Arguments) -> Arguments:
    labels = arguments["labels"]
    return {"labels": None if labels is None else labels.int()}


def _backends() -> list[str]:
    """Those that can run here; the interpreted kernels seldom, as they are slow."""
    able = [name for name in backends.BACKENDS if not backends.BACKENDS[name].reasons_against("", [torch.empty(0)])]
    return [name for name in able for _ in range(1 if name == "triton" else 8)]


# --- changes -----------------------------------------------------------------------------------------------------


def change(rng: random.Random, value: Any) -> Any:
    """Something else in place of an argument."""
    if isinstance(value, Tensor):
        return rng.choice(TENSOR_CHANGES)(rng, value)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        wrong = [*value[:at], change(rng, value[at]), *value[at + 1 :]]
        return rng.choice([wrong, wrong, wrong, wrong, value[:-1], [*value, value[0]], []])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([*INTEGERS, value - 1, value + 1])
    if isinstance(value, torch.dtype):
        return rng.choice(DTYPES)
    if isinstance(value, str):
        return rng.choice(["", "none", "cpp", "reference", "triton", "pairwise", "gram", "auto"])
    return rng.choice([None, torch.rand(3), torch.zeros(2, 2, dtype=LONG)])


def _resized(rng: random.Random, x: Tensor) -> Tensor:
    """Another shape."""
    last = x.shape[-1] if x.ndim else 0
    made = (
        [x.flatten(), x[None], x[..., None], x[:0], x[..., :0], x[..., :1], torch.cat([x, x])] if x.ndim else [x[None]]
    )
    if x.ndim:
        made += [
            x[:-1],
            x[1:],
            x[: len(x) // 2],
            torch.cat([x, x[-1:]]),
            torch.cat([x, x], -1),
            x.mT if x.ndim > 1 else x,
        ]
        made += [x.sum().to(x.dtype), x[..., : last - 1], x.new_empty(0, 2**40), x.new_empty(2**62, 0)]
    return rng.choice(made)


def _restrided(rng: random.Random, x: Tensor) -> Tensor:
    """The same shape, or a far larger one, in strides that no copy has."""
    if not x.ndim or not x.numel():
        return x
    spread = torch.stack([x, x], -1)[..., 0]
    made = [
        spread,
        torch.cat([x, x])[::2],
        x[:1].expand(x.shape),
        x.flatten()[0].expand(x.shape),
        x[:1].expand(2**40, *x.shape[1:]),
    ]
    made += [x.flatten()[0].expand(2**31, *x.shape[1:]), x.mT.contiguous().mT if x.ndim > 1 else x[::2]]
    return rng.choice(made)


def _retyped(rng: random.Random, x: Tensor) -> Tensor:
    return x.to(rng.choice(DTYPES))


def _revalued(rng: random.Random, x: Tensor) -> Tensor:
    """Other values, of which some are no index."""
    x = x.clone()
    if not x.numel():
        return x
    if x.dtype == torch.bool:
        return x.logical_not()
    if x.dtype.is_floating_point:
        flat = x.view(-1)
        flat[rng.randrange(len(flat))] = rng.choice([torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 1e38, 1e-45])
        return flat.view(x.shape)
    if rng.random() < 0.5:
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(ELEMENTS)
        return x
    ways = [x.flip(0), x.flip(-1), x[torch.randperm(len(x))], torch.randint_like(x, -1, 2 + len(x))]
    return rng.choice([*ways, x + 1, x - 1, 2 * x])


def _elsewhere(rng: random.Random, x: Tensor) -> Any:
    """On no CPU, in no dense layout, or no tensor at all."""
    sparse = x.to_sparse() if x.ndim else x
    real = torch.complex(x, x).conj().imag if x.dtype in (torch.float32, torch.float64) else x
    return rng.choice([x.to("meta"), sparse, None, real, x.clone().requires_grad_() if x.is_floating_point() else x])


TENSOR_CHANGES: list[Callable[[random.Random, Tensor], Any]] = [
    *[_revalued] * 5, *[_resized] * 4, *[_restrided] * 2, *[_retyped] * 2, _elsewhere,
]  # fmt: skip


# --- the run -----------------------------------------------------------------------------------------------------


def place(rng: random.Random, value: Any) -> Any:
    """Dense tensors on the CPU beside a guard page."""
    if isinstance(value, list):
        return [place(rng, x) for x in value]
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_contiguous():
        return value
    if value.device.type != "cpu" or value.requires_grad or value.is_neg() or not 0 < value.numel() < 10**6:
        return value
    return guarded(value, rng.random() < 0.8)


def tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a result."""
    for part in result if isinstance(result, (tuple, list)) else [result]:
        if isinstance(part, Tensor):
            yield part


def names_in(name: str) -> set[str]:
    """What a message may name: the op's arguments, or the parts of those that are lists of tensors."""
    arguments = {argument.name for argument in schemas()[name].arguments}
    return arguments | {part for argument in arguments & LISTS.keys() for part in LISTS[argument]}


def outcome(name: str, arguments: Arguments) -> bool:
    """Whether the call returned; else it was refused in words that name an argument."""
    try:
        for tensor in tensors(operator(name)(**arguments)):
            tensor.detach().double().sum()  # what it holds can be read
    except (RuntimeError, ValueError, TypeError) as error:
        if not set(re.findall(r"\w+", str(error))) & names_in(name):
            raise AssertionError(f"{type(error).__name__} names no argument of {name}: {error}") from error
        return False
    return True


def described(value: Any) -> str:
    """An argument in a line of the log."""
    if not isinstance(value, Tensor):
        return f"[{', '.join(map(described, value))}]" if isinstance(value, list) else str(value)
    if value.is_sparse:
        return f"{value.dtype}{list(value.shape)} sparse"
    small = 0 < value.numel() <= 40 and not value.is_floating_point() and value.device.type == "cpu"
    return f"{value.dtype}{list(value.shape)} {value.stride()} {value.tolist() if small else value.device}"


def run(seed: int, cases: int, log: int) -> dict[str, list[int]]:
    """How many calls of each op returned and how many were refused."""
    counts = {name: [0, 0] for name in schemas()}
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        torch.manual_seed(rng.randrange(2**31))
        calls = valid_calls(rng)
        assert calls.keys() == counts.keys(), f"ops without a valid call: {counts.keys() ^ calls.keys()}"
        name = rng.choice(list(calls))
        arguments = calls[name]
        changes = rng.sample(sorted(arguments), min(len(arguments), rng.choice([0, 1, 1, 1, 2, 2, 3])))
        arguments |= {argument: change(rng, arguments[argument]) for argument in changes}
        arguments = {argument: place(rng, value) for argument, value in arguments.items()}
        words = ", ".join(f"{argument}={described(arguments[argument])}" for argument in changes)
        os.write(log, f"{seed} {case}: {name}({words})\n".encode())
        returned = outcome(name, arguments)
        assert returned or changes, f"a valid call of {name} was refused"
        counts[name][not returned] += 1
    return counts


if __name__ == "__main__":
    assert _extension.why_missing() is None
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not (info := _extension.build_info()) or not info.sanitizers:  # those reserve terabytes
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2)  # what is too large is refused here, not swapped
    print(
        json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)))
    )
