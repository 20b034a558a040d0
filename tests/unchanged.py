"""Whether two versions of the package compute the same, bit for bit: seeded computations through public names.

    python tests/unchanged.py record FILE.json            a digest of every case's results
    python tests/unchanged.py compare FILE.json           again, and each case that differs by name; exit code 1
    ... --only WORD                                       the cases with WORD in their name

It runs in either version: PYTHONPATH names the tree whose package is taken, and that tree's own helpers of the tests.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

import mta_fast

TREE = Path(mta_fast.__file__).resolve().parents[1]
sys.path.insert(0, str(TREE / "tests"))
# ruff: noqa: E402

from batches import EDGE_ROWS, LAYOUTS, make_batch, random_rows
from models import make_model
from models import make_tokenizer as shared_tokenizer

from mta_fast import LayerMap, MTAConfig, MTALoss, SpanBatch, SpanCollator, SpanExtractor

Found = Iterator[tuple[str, Any]]
CASES: dict[str, Callable[[], Found]] = {}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
STUDENT_LAYERS, TEACHER_LAYERS = 4, 8
CONFIG = MTAConfig(LayerMap.proportional(STUDENT_LAYERS, TEACHER_LAYERS).pairs, ("word", "phrase", "phrase"))
# where a name may live: before, after
HOMES = {
    "losses": ("mta_fast.distill.losses", "mta_fast.distill.methods.losses"),
    "methods": ("mta_fast.distill.methods", "mta_fast.distill.methods.registry"),
    "pair collator": ("mta_fast.distill.distillm2", "mta_fast.distill.methods.distillm2"),
    "generation": ("mta_fast.distill.generation", "mta_fast.distill.responses.generation"),
    "pairs": ("mta_fast.distill.pairs", "mta_fast.distill.responses.pairs"),
    "evaluation": ("mta_fast.distill.evaluation", "mta_fast.distill.responses.evaluation"),
}


def make_tokenizer(vocabulary: int = 512) -> Any:
    """One of its own for every case: a tokenizer that another case had changed would be saved with the change."""
    return copy.deepcopy(shared_tokenizer(vocabulary))


def public(home: str, name: str) -> Any:
    """A public name, from where this version keeps it."""
    for module in HOMES[home]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise AttributeError(f"{name}: in none of {', '.join(HOMES[home])}")


def case(function: Callable[[], Found]) -> Callable[[], Found]:
    """Register what the function yields, (name, value) each."""
    CASES[function.__name__] = function
    return function


# --- digests -----------------------------------------------------------------------------------------------------

INDEX = ("ranges", "span_rows", "span_splits", "covered", "covered_rows", "covered_splits", "cover_splits")
INDEX += ("cover_spans", "token_splits", "host")


def plain(value: Any) -> Any:
    """What stands for a value: JSON, with the bytes of tensors and the bits of floats."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return [str(value.dtype), list(value.shape), hashlib.blake2b(raw, digest_size=16).hexdigest()]
    if isinstance(value, SpanBatch):
        rows = value.rows
        return plain([*(getattr(value, name) for name in INDEX), rows.table, rows.host, list(rows.shape)])
    if type(value).__module__ == "numpy":
        return plain(torch.as_tensor(value))
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    if isinstance(value, float):
        return value.hex() if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)) or hasattr(value, "popleft"):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"no digest of a {type(value).__name__}")


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(plain(value)).encode(), digest_size=16).hexdigest()


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A result, or the class of the refusal."""
    try:
        return function(*args, **options)
    except (mta_fast.errors.MTAFastError, mta_fast.errors.InputError) as error:
        return f"refused: {type(error).__name__}"


def files_of(folder: Path, *patterns: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def grads_of(value: torch.Tensor, *inputs: torch.Tensor) -> tuple[Any, ...]:
    return torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)


# --- ops ---------------------------------------------------------------------------------------------------------


def op_results(backend: str, dtype: torch.dtype, layout: str) -> Found:
    """The four ops on one batch, by value and gradient."""
    batch = make_batch(layout)
    lengths, spans = batch.lengths, batch.spans
    hidden, teacher = (batch.lay([r.to(dtype) for r in random_rows(lengths, d)], 0.5) for d in (24, 40))
    options = [{}, {"causal": True}] if layout == "packed" else [{}, {"causal": True}, {"count_padding": True}]
    rows = {"cu_seqlens": batch.cu_seqlens} if layout == "packed" else {"attention_mask": batch.mask}
    for option in options:
        yield (
            f"importance {sorted(option)}",
            attempt(mta_fast.token_importance, teacher, **rows, **option, backend=backend),
        )
    importance = mta_fast.token_importance(teacher, rows=spans.rows, backend=backend)
    weights = mta_fast.normalize_weights(importance, spans, backend=backend)
    yield "weights", tuple(weights)
    hidden.requires_grad_()
    pooled, span_weight = mta_fast.pool_spans(hidden, weights.token, spans, backend=backend)
    yield "pooled", [pooled, span_weight, *grads_of((pooled**2).sum(), hidden)]
    theirs, _ = mta_fast.pool_spans(teacher, weights.token, spans, backend=backend)
    for method, reduction in itertools.product(("pairwise", "gram", "auto"), ("mean", "sample", "none")):
        made = mta_fast.span_pair_loss(
            pooled, theirs, weights.span, spans, reduction=reduction, method=method, backend=backend
        )
        first = made[0] if isinstance(made, tuple) else made
        gradient = torch.autograd.grad(first, hidden, retain_graph=True)
        yield f"span pairs {method} {reduction}", [made, *gradient]
    matrix, bias = torch.randn(40, 24, dtype=dtype).requires_grad_(), torch.randn(40, dtype=dtype).requires_grad_()
    token_weights = torch.zeros_like(weights.token).reshape(-1)
    token_weights[spans.covered.long()] = weights.token.reshape(-1)[spans.covered.long()] * spans.cover_splits.diff()
    token_weights = token_weights.reshape(weights.token.shape)
    for given, reduction in itertools.product((None, spans), ("mean", "sample", "none")):
        args = (hidden, teacher, token_weights, matrix)
        made = attempt(mta_fast.hidden_alignment_loss, *args, bias, spans=given, reduction=reduction, backend=backend)
        name = f"hidden alignment {'rows' if given is None else 'spans'} {reduction}"
        first = made[0] if isinstance(made, tuple) else made
        yield name, [made, *([] if isinstance(made, str) else grads_of(first, hidden, matrix, bias))]
    made = mta_fast.hidden_alignment_loss(hidden, teacher, token_weights, matrix, spans=spans, backend=backend)
    yield "hidden alignment without bias", [made, *grads_of(made, hidden, matrix)]


def ops_of(backend: str) -> Callable[[], Found]:
    def ops() -> Found:
        torch.set_num_threads(2)  # all else is small: one thread is faster, and shares a machine better
        for (name, dtype), layout in itertools.product(DTYPES.items(), LAYOUTS):
            torch.manual_seed(11)
            for what, value in op_results(backend, dtype, layout):
                yield f"{name}, {layout}: {what}", value
        torch.set_num_threads(1)

    return ops


CASES["ops, reference"] = ops_of("reference")
CASES["ops, cpp"] = ops_of("cpp")


@case
def entropy_weights() -> Found:
    for name, dtype in DTYPES.items():
        yield name, mta_fast.entropy_weights(3 * torch.randn(3, 9, 517).to(dtype))


@case
def kernels_in_the_interpreter() -> Found:
    """A small case of every op on Triton's interpreter, in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TREE)}
    command = [sys.executable, __file__, "triton", "-"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    yield from json.loads(made.stdout.splitlines()[-1]).items()


def triton_results() -> dict[str, str]:
    torch.manual_seed(12)
    return {name: digest(value) for name, value in op_results("triton", torch.float32, "right")}


# --- MTALoss -----------------------------------------------------------------------------------------------------

ABLATIONS: list[dict[str, Any]] = [
    {},
    {"student_pooling": "own"},
    {"weighting": "uniform"},
    {"weighting": "entropy"},
    {"normalization": "sample"},
    {"causal": True},
    {"count_padding": True},
    {"projection_bias": False},
    {"lambda_dsa": 0.0},
    {"lambda_hid": 0.0},
    {"dsa_method": "gram"},
    {"dsa_method": "pairwise"},
    {"granularity": "word"},
    {"granularity": "phrase"},
    {"student_pooling": "own", "weighting": "entropy", "normalization": "sample"},
]
WIDTHS = {1: 24, 3: 24, 4: 24}, {2: 40, 6: 40, 8: 40}
TEXTS = ["The old keeper climbed the stairs, because a storm broke the lamp.", "Naïve tea 🐈 in Zürich.", "One"]


@case
def mta_loss() -> Found:
    pairs = ((1, 2), (3, 6), (4, 8))
    for backend, layout, changes in itertools.product(("reference", "cpp"), LAYOUTS, ABLATIONS):
        if layout == "packed" and changes.get("count_padding"):
            continue
        torch.manual_seed(13)
        batch, short = make_batch(layout), {"backend": backend, "layer_pairs": pairs}
        config = MTAConfig(**({"granularity": ("word", "phrase", "phrase")} | short | changes))
        loss = MTALoss(config, 24, 40)
        spans = {"word": batch.spans, "phrase": batch.spans}
        student, teacher = (
            {layer: batch.lay([r.float() for r in random_rows(batch.lengths, d)], 0.5) for layer, d in side.items()}
            for side in WIDTHS
        )
        for state in student.values():
            state.requires_grad_()
        entropy = torch.rand(batch.spans.rows.shape) if config.weighting == "entropy" else None
        output = loss(student, teacher, spans, entropy_weights=entropy)
        inputs = [*student.values(), *loss.parameters()]
        yield (
            f"{backend}, {layout}, {changes}",
            [
                *output[:3],
                *output.per_layer,
                *grads_of(output.loss, *inputs),
                loss.denominators(teacher, spans, entropy_weights=entropy),
            ],
        )


@case
def public_scripts_calls() -> Found:
    from types import SimpleNamespace

    from mta_fast import compat

    for layout, entropy in itertools.product(("right", "left"), (False, True)):
        torch.manual_seed(18)
        batch = make_batch(layout)
        states = [
            [batch.lay([r.float() for r in random_rows(batch.lengths, d)], 0.5) for _ in range(5)] for d in (12, 20)
        ]
        for state in states[0]:
            state.requires_grad_()
        spans = [[(3 * first, 3 * last - 2) for first, last in row] for _, row in EDGE_ROWS]
        offsets = batch.lay([torch.stack([3 * torch.arange(n), 3 * torch.arange(n) + 1], 1) for n in batch.lengths], 0)
        linears = torch.nn.ModuleList(torch.nn.Linear(12, 20) for _ in range(3))
        args = SimpleNamespace(
            student_layer_mapping=[1, 2, 4], teacher_layer_mapping=[1, 3, 4], split_layer_mapping=[0, 1, 3, 3],
            entropy_weight=entropy,
        )  # fmt: skip
        logits = torch.randn(len(batch.lengths), batch.seq_len, 31)
        call = (linears, batch.mask, None, logits, *map(tuple, states), offsets, spans, spans, args)
        loss = compat.compute_overall_span_loss(*call)
        yield f"{layout}, {entropy}", [loss, *grads_of(loss, *states[0], *linears.parameters())]


@case
def mta_loss_of_two_tokenizers() -> Found:
    words = [[found.span() for found in re.finditer(r"\S+", text)] for text in TEXTS]
    sides = []
    for vocabulary in (300, 512):
        tokenizer = make_tokenizer(vocabulary)
        tokenizer.pad_token = tokenizer.eos_token
        made = tokenizer(TEXTS, return_offsets_mapping=True, padding=True, return_tensors="pt")
        sides.append((made["offset_mapping"], made["attention_mask"]))
    own, other = SpanBatch.pair(words, *sides, texts=TEXTS)
    yield "spans", [own, other]
    for changes in ABLATIONS[:11]:
        torch.manual_seed(14)
        config = MTAConfig(**({"layer_pairs": ((1, 2),), "granularity": "word"} | changes))
        student = {1: torch.randn(*own.shape, 24).requires_grad_()}
        teacher = {2: torch.randn(*other.shape, 40)}
        entropy = torch.rand(other.shape) if config.weighting == "entropy" else None
        loss = MTALoss(config, 24, 40)
        output = loss(
            student, teacher, {"word": own, "phrase": own}, teacher_spans={"word": other, "phrase": other},
            entropy_weights=entropy,
        )  # fmt: skip
        gradients = grads_of(output.loss, student[1], *loss.parameters())
        yield f"{changes}", [*output[:3], *output.per_layer, *gradients]


# --- base methods ------------------------------------------------------------------------------------------------


def logits_and_labels(dtype: torch.dtype, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(15)
    student, teacher = (2 * torch.randn(rows, 9, 31, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(31, (rows, 9))
    labels[:, :3] = -100
    labels[1, 5:] = -100
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


@case
def losses() -> Found:
    options: dict[str, list[dict[str, Any]]] = {
        "skl": [{}, {"alpha": 0.3}, {"detach_mixture": True}],
        "srkl": [{}, {"alpha": 0.3}, {"detach_mixture": True}],
        "jsd": [{}, {"beta": 0.2}],
    }
    for name, (dtype_name, dtype), reduction in itertools.product(
        sorted(public("losses", "BASE_LOSSES")), DTYPES.items(), ("mean", "sum")
    ):
        for option in options.get(name, [{}]):
            student, teacher, labels = logits_and_labels(dtype)
            value = public("losses", "base_loss")(name, **option)(student, teacher, labels, reduction=reduction)
            gradient = grads_of(value, student) if value.requires_grad else ()
            yield f"{name} {option} {dtype_name} {reduction}", [value, *gradient]


@dataclasses.dataclass
class Out:
    logits: Any
    hidden_states: Any = None


@case
def token_methods() -> Found:
    for name in ("forward_kl", "reverse_kl", "skl", "srkl", "jsd", "cross_entropy", "distillm"):
        student, teacher, labels = logits_and_labels(torch.float32)
        method = public("methods", "base_method")(name)
        value = method(Out(student), Out(teacher), {"labels": labels})
        yield name, [value, *grads_of(value, student), method.name, method.counts({"labels": labels})]


@case
def distillm2() -> Found:
    from mta_fast.distill import DistiLLM2

    settings = [{}, {"alpha": 0.05, "beta": 0.5}, {"growing_beta": True}, {"detach_mixture": False}]
    settings += [{"adaptive_alpha": True, "anchor_steps": 2}, {"adaptive_alpha": True, "growing_beta": True}]
    for options in settings:
        method = DistiLLM2(**options)
        for step in range(5):
            method.progress = step / 4
            student, teacher, labels = logits_and_labels(torch.float32, 6)
            scale = 1 + step / 3
            value = method(Out(scale * student), Out(teacher), {"labels": labels})
            yield f"{options} step {step}", [value, *grads_of(value, student), method.beta, method.state_dict()]


@case
def fdd() -> Found:
    from mta_fast.distill import FDD

    student, teacher = make_model("opt-350m", 4, 32), make_model("llama", 6, 48)
    torch.manual_seed(16)
    ids = torch.randint(1, 64, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    for options in ({}, {"tau": 1.0, "loss": "skl", "alpha": 0.2}, {"detach_mixture": True}):
        method = FDD(layer_pairs=[(1, 2), (2, 4), (4, 6)], **options)
        method.attach(student, teacher)
        outs = [m(input_ids=ids, attention_mask=mask, output_hidden_states=True) for m in (student, teacher)]
        value = method(*outs, batch)
        yield f"{options}", [value, *grads_of(value, *student.parameters()), method.counts(batch)]


@case
def distillm_sources() -> Found:
    from mta_fast.distill import DistiLLM

    settings: list[dict[str, Any]] = [
        {"schedule": schedule, "threshold": threshold, "capacity": 4, "seed": seed}
        for schedule, threshold, seed in itertools.product(
            ("decreasing", "constant", "increasing"), (0.0, 0.3, 0.9, 1.0), (42, 7)
        )
    ]
    for options in settings:
        method = DistiLLM(**options)
        drawn: list[Any] = []
        for step in range(200):
            method.progress = step / 200
            source = method.next_source()
            if source == "student":
                method.replay.append({"prompt": f"p{step}", "output": ""})
            drawn += [source, *(method.replayed(3) if source == "replay" else [])]
            if step % 20 == 19:
                method.observe_validation(1.0 + (step % 60) / 40)
                drawn.append(method.threshold)
        yield f"{options}", [drawn, method.state_dict()]


# --- texts -------------------------------------------------------------------------------------------------------


def sample() -> list[dict[str, Any]]:
    from mta_fast.distill.data import load_sample

    return [dict(row) for row in load_sample()]


def with_spans(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    spans = extractor()([row["prompt"] + row["output"] for row in rows])
    return [row | {name: column[i] for name, column in spans.items()} for i, row in enumerate(rows)]


MADE: dict[str, Any] = {}


def extractor() -> SpanExtractor:
    return MADE.setdefault("extractor", SpanExtractor())


def rows() -> list[dict[str, Any]]:
    if "rows" not in MADE:
        MADE["rows"] = with_spans(sample()[:24])
    return MADE["rows"]


def pair_rows() -> list[dict[str, Any]]:
    if "pairs" not in MADE:
        MADE["pairs"] = []
        for row, other in zip(rows(), [*rows()[1:], rows()[0]], strict=True):
            rejected = with_spans([{"prompt": row["prompt"], "output": other["output"]}])[0]
            pair = {"prompt": row["prompt"], "chosen": row["output"], "rejected": other["output"]}
            for name, source in (("chosen", row), ("rejected", rejected)):
                pair |= {f"{name}_{kind}_spans": source[f"{kind}_spans"] for kind in ("word", "phrase")}
            MADE["pairs"].append(pair)
    return MADE["pairs"]


@case
def extraction() -> Found:
    texts = [row["prompt"] + row["output"] for row in sample()]
    found = extractor()(texts)
    yield "sample", {name: [list(map(list, row)) for row in column] for name, column in found.items()}
    two = SpanExtractor(n_process=2, batch_size=16)(texts[:48])
    yield "two processes", {name: [list(map(list, row)) for row in column] for name, column in two.items()}
    own = SpanExtractor(lambda text: {"word": [(0, len(text))]}, granularity="word")(texts[:3])
    yield "a function", own


@case
def span_cache() -> Found:
    from mta_fast.spans.cache import SpanCache

    texts = [row["prompt"] + row["output"] for row in sample()[:30]]
    with tempfile.TemporaryDirectory() as folder:
        cache = SpanCache(extractor(), folder)
        yield "filled", cache.fill(texts[:20])
        found = cache(texts)
        yield "read", {name: [list(map(list, row)) for row in column] for name, column in found.items()}
        yield "kept", [len(cache), cache.path.name, cache.fill(texts)]


@case
def collators() -> Found:
    tokenizer = make_tokenizer()
    for side in ("right", "left"):
        tokenizer.padding_side = side
        for options in ({}, {"max_length": 48}, {"pad_to": "max_length", "max_length": 96}, {"add_eos": False}):
            made = SpanCollator(tokenizer, **options)(rows()[:5])
            yield f"{side} {options}", flat_batch(made)
        two = SpanCollator(tokenizer, teacher_tokenizer=make_tokenizer(300), max_length=96)(rows()[:5])
        yield f"{side}, two tokenizers", flat_batch(two)
        pairs = public("pair collator", "PairCollator")(SpanCollator(tokenizer, max_length=160))(pair_rows()[:4])
        yield f"{side}, pairs", flat_batch(pairs)
    tokenizer.padding_side = "right"


def flat_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.{kind}": value
        for name, part in batch.items()
        for kind, value in (part.items() if isinstance(part, Mapping) else [("", part)])
    }


# --- training ----------------------------------------------------------------------------------------------------

TIMES = ("runtime", "per_second", "mta_share", "seconds", "_time")


def untimed(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
    for name, value in kept.items():
        if isinstance(value, list):
            kept[name] = [untimed(item) if isinstance(item, Mapping) else item for item in value]
    return kept


def make_trainer(folder: Path, *, student: Any = None, teacher: Any = "llama", **options: Any) -> Any:
    from mta_fast.distill import MTATrainer, MTATrainingArguments

    tokenizer = make_tokenizer()
    if student is None:
        student = make_model("gpt2", STUDENT_LAYERS, vocabulary=len(tokenizer))
    if isinstance(teacher, str):
        teacher = make_model(teacher, TEACHER_LAYERS, width=48, vocabulary=len(tokenizer))
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 64,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    named = {name: options.pop(name) for name in tuple(options) if name in NAMED}
    data = named.pop("rows", None) or rows()
    mta = named.pop("mta", CONFIG)
    return MTATrainer(
        student,
        teacher,
        mta,
        MTATrainingArguments(output_dir=str(folder), **settings | options),
        processing_class=tokenizer,
        train_dataset=data[:16],
        eval_dataset=data[16:],
        **named,
    )


NAMED = ("base_loss", "base_loss_options", "span_extractor", "teacher_tokenizer", "rows", "mta")


def trained(**options: Any) -> dict[str, Any]:
    """What six steps and an evaluation leave."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), **options)
        trainer.train()
        evaluated = trainer.evaluate()
        return {
            "weights": dict(trainer.model.state_dict()),
            "log": [untimed(entry) for entry in trainer.state.log_history],
            "evaluation": untimed(evaluated),
        }


def training(name: str, **options: Any) -> None:
    def run() -> Found:
        made = {key: value() if key in LATE else value for key, value in options.items()}
        yield from trained(**made).items()

    CASES[f"training, {name}"] = run


LATE = ("rows", "span_extractor", "student", "teacher_tokenizer", "base_loss_object")
SMALL = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3}
training("srkl and MTA")
training("the base loss alone", mta=None)
training("MTA alone", base_loss=None)
training("options of a base loss", base_loss="jsd", base_loss_options={"beta": 0.2})
training("entropy and own pooling", mta=MTAConfig(CONFIG.layer_pairs, weighting="entropy", student_pooling="own"))
training("rows normalised, gradient norms", mta=MTAConfig(CONFIG.layer_pairs, normalization="sample"),
         log_gradient_norms=True)  # fmt: skip
training("public scripts' settings", mta=MTAConfig(CONFIG.layer_pairs, student_pooling="own", count_padding=True))
training("cross entropy without a teacher", teacher=None, mta=None, base_loss="cross_entropy")
training("two tokenizers", teacher_tokenizer=lambda: make_tokenizer(300), base_loss="cross_entropy")
training("DistiLLM-2", base_loss="distillm2", rows=pair_rows, max_length=160)
training("DistiLLM-2, adaptive", base_loss="distillm2", rows=pair_rows, max_length=160, mta=None,
         base_loss_options={"adaptive_alpha": True, "anchor_steps": 2, "growing_beta": True})  # fmt: skip
training("FDD", base_loss="fdd", max_steps=4)
training("FDD, accumulated", base_loss="fdd", base_loss_options={"layer_pairs": [[1, 2], [4, 8]]}, mta=None, **SMALL)
for how in ("keep", "recompute", "micro_batch"):
    training(f"accumulated, {how}", accumulation=how, **SMALL)
training("DistiLLM-2, accumulated", base_loss="distillm2", rows=pair_rows, max_length=160, **SMALL)
ON_POLICY = {"threshold": 0.9, "schedule": "constant", "capacity": 8, "increase": 0.0}
ON_POLICY |= {"generation": {"max_new_tokens": 8}}
training("DistiLLM on policy", base_loss="distillm", base_loss_options=ON_POLICY, span_extractor=extractor)
training("DistiLLM on policy, accumulated", base_loss="distillm", base_loss_options=ON_POLICY, mta=None, **SMALL)
training("DistiLLM that follows the evaluation", base_loss="distillm", mta=None, eval_strategy="steps", eval_steps=2,
         base_loss_options=ON_POLICY | {"threshold": 0.3, "increase": 0.2, "tolerance": -1.0})  # fmt: skip


def adapted() -> Any:
    import peft

    model = make_model("gpt2", STUDENT_LAYERS, vocabulary=len(make_tokenizer()))
    torch.manual_seed(17)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM"))


training("LoRA", student=adapted)


@case
def resumed_training() -> Found:
    """A run that goes on from its third step ends as one that never stopped; with what a checkpoint holds."""
    cases = {"srkl": {}, "distillm2": {"rows": pair_rows(), "max_length": 160}, "distillm": {"mta": None}}
    options = {"distillm": ON_POLICY, "distillm2": {"adaptive_alpha": True, "anchor_steps": 4}}
    for base, given in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            more: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "base_loss": base, **given}
            more["base_loss_options"] = options.get(base)
            whole = make_trainer(Path(folder), **more)
            whole.train()
            checkpoint = Path(folder) / "checkpoint-3"
            names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
            yield f"{base}: files", names
            progress = json.loads((checkpoint / "progress_0.json").read_text())
            yield f"{base}: progress", untimed(progress)
            again = make_trainer(Path(folder), **more)
            again.train(resume_from_checkpoint=str(checkpoint))
            yield f"{base}: weights", dict(again.model.state_dict())
            ends = [dict(trainer.model.state_dict()) for trainer in (whole, again)]
            yield f"{base}: the same", digest(ends[0]) == digest(ends[1])


# --- commands ----------------------------------------------------------------------------------------------------

YAML = """
output_dir: run
teacher: {path: teacher}
student: {path: student}
data: {train: rows.jsonl, eval: rows.jsonl, max_rows: 12}
spans: {cache: cache}
training:
  max_length: 96
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-3
  logging_steps: 1
  save_steps: 2
  eval_strategy: steps
  eval_steps: 2
  use_cpu: true
  disable_tqdm: true
"""


def several(*values: str) -> list[str]:
    """Values of one option: with commas between them, or one after the other as before."""
    from mta_fast import cli

    return list(values) if hasattr(cli, "_ManyValues") else [",".join(values)]


def run_command(*words: str) -> tuple[int, str]:
    """Exit code and standard output of mta-fast."""
    from mta_fast.__main__ import main

    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        code = main(list(words))
    return code, printed.getvalue()


@case
def commands() -> Found:
    """cut, spans, train, export, generate and eval in a folder of their own, by the files that they leave."""
    from importlib import resources

    former = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            tokenizer = make_tokenizer()
            make_model("gpt2", 8, 48, vocabulary=len(tokenizer)).save_pretrained("teacher")
            tokenizer.save_pretrained("teacher")
            lines = resources.files("mta_fast").joinpath("data/sample.jsonl").read_text("utf-8").splitlines()[:12]
            Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            Path("run.yaml").write_text(YAML)
            yield "cut", run_command("cut", "teacher", "student", "--layers", "4")
            yield "student", files_of(Path("student"), "*.safetensors", "*config.json")
            yield "spans make", run_command("spans", "make", "rows.jsonl", "--cache", "spans")[0]
            yield "train", run_command("train", "run.yaml")[0]
            results = json.loads(Path("run/results.json").read_text())
            yield "results", untimed(results)
            yield "weights", files_of(Path("run"), "student/*.safetensors", "checkpoint-*/*.safetensors",
                                      "checkpoint-*/mta/*")  # fmt: skip
            yield "export", run_command("export", "run/checkpoint-2", "exported")
            yield "exported", files_of(Path("exported"), "*.safetensors", "*config.json")
            texts = Path("prompts.jsonl")
            texts.write_text(
                "".join(json.dumps({"prompt": f"Say {i}. ", "output": f"{i} it is"}) + "\n" for i in range(5))
            )
            short = ("--max-prompt-length", "20", "--max-length", "32", "--batch-size", "2", "--data", "prompts.jsonl")
            made = run_command(
                "generate", "--teacher", "teacher", "--student", "student", "--out", "pairs.jsonl", *short
            )
            yield "generate", [*made, Path("pairs.jsonl").read_bytes()]
            code, printed = run_command("eval", "student", "--seeds", *several("1", "2"), "--out", "scores", *short)
            yield "eval", [code, re.sub(r"\d+ s ", "", printed)]  # the table ends with times
            scores = json.loads(Path("scores/results.json").read_text())
            yield "scores", [untimed(part) for part in scores["data"]]
            answers = files_of(Path("scores"), "**/*.jsonl")
            yield (
                "answers",
                {name: [untimed(json.loads(line)) for line in text.splitlines()] for name, text in answers.items()},
            )
            code, _ = run_command("ablate", "run.yaml", "--rows", *several("base", "full"), "--seeds", "1",
                                  "--override", "output_dir=rows", "--override", "training.max_steps=2")  # fmt: skip
            yield "ablate", [code, files_of(Path("rows"), "**/student/*.safetensors")]
        finally:
            os.chdir(former)


@case
def generation() -> Found:
    model, tokenizer = make_model("gpt2", 4, 48, vocabulary=len(make_tokenizer())), make_tokenizer()
    settings, generate = (public("generation", name) for name in ("GenerationSettings", "generate_texts"))
    prompts = [row["prompt"] for row in sample()[:4]]
    for options in ({}, {"do_sample": False}, {"top_p": 0.7, "temperature": 0.5}, {"top_k": 5}, {"stop": None}):
        for seed in (1, 2):
            made = settings(max_new_tokens=12, **options)
            yield (
                f"{options} {seed}",
                generate(model, tokenizer, prompts, made, seed=seed),
            )


MEASURED = ("student_layer", "teacher_layer", "granularity", "importance", "spans", "salience", "teacher_distances")
MEASURED += ("student_distances", "dsa", "hid", "worst")


@case
def inspection() -> Found:
    from mta_fast.inspection import inspect_text

    sizes = make_tokenizer(512), make_tokenizer(300)
    teacher, student = make_model("gpt2", 6, 48, 512).eval(), make_model("gpt2", 3, 32, 512).eval()
    pairs = {"layer_pairs": ((1, 2), (3, 6)), "granularity": ("word", "phrase")}
    projections = MTALoss(MTAConfig(**pairs), 32, 48).projections
    variants: list[dict[str, Any]] = [{}, {"weighting": "uniform"}, {"weighting": "entropy"}]
    variants += [{"student_pooling": "own"}, {"causal": True}, {"normalization": "sample"}]
    for changes in variants:
        for other, given in ((None, None), (None, projections), (sizes[1], projections)):
            for text in TEXTS[:2]:
                found = attempt(
                    inspect_text, text, teacher, student, sizes[0], MTAConfig(**(pairs | changes)), extractor(),
                    teacher_tokenizer=other, projections=given,
                )  # fmt: skip
                if not isinstance(found, str):
                    kept = [{field: getattr(pair, field) for field in MEASURED} for pair in found.layer_pairs]
                    found = [found.tokens, found.student_tokens, found.spans, found.dropped, found.truncated, kept]
                name = f"{changes}, {'one' if other is None else 'two'}, {given is not None}, {text[:5]}"
                yield name, found


# --- the command -------------------------------------------------------------------------------------------------


def run_cases(only: str, show: bool = True) -> dict[str, str]:
    """A digest of every result by case and name."""
    found: dict[str, str] = {}
    for name, function in CASES.items():
        if only not in name:
            continue
        began = time.perf_counter()
        torch.manual_seed(10)
        try:
            with redirect_stdout(io.StringIO()):  # the Trainer prints what it logs
                made = {f"{name}: {what}": digest(value) for what, value in function()}
        except Exception as error:
            made = {f"{name}: FAILED": f"{type(error).__name__}: {error}"}
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        found |= made
        if show:
            print(f"{name}: {len(made)} results, {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("record", "compare", "triton"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "triton":
        print(json.dumps(triton_results()))
        return 0
    print(f"package: {TREE}", file=sys.stderr)
    found = run_cases(given.only)
    failed = [name for name in found if name.endswith(": FAILED")]
    if given.command == "record":
        given.file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(found)} results in {given.file}, {len(failed)} cases failed")
        return int(bool(failed))
    kept = json.loads(given.file.read_text(encoding="utf-8"))
    expected = {name: value for name, value in kept.items() if given.only in name.partition(": ")[0]}
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    for name in differ:
        print(f"DIFFERS {name}" + ("" if name in found else " (not made)") + ("" if name in expected else " (new)"))
    print(f"{len(expected) - sum(name in expected for name in differ)} of {len(expected)} results are the same")
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
