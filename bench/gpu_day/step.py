"""A whole training step with MTA and without: random GPT-2- and Qwen2-like models, a live teacher, AdamW."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_day import clock
from bench.gpu_day.day import Day, Made, attempt
from bench.report import Entry, entry, milliseconds, skipped
from bench.workload import standard_spans
from mta_fast import MTAConfig, MTALoss, SpanBatch, capture_layers, linear_divergence_loss

TEXT = (
    "Teacher forward, student forward, SRKL of half of the positions through the heads, MTA (or not), backward and "
    "AdamW; bfloat16, weights random, no checkpointing. Step: wall clock, the device waited for at its end. Host: "
    "nothing is waited for. The step is host-bound where the host takes most of it (x near 1). With / without: in turn "
    "within each round. Peak memory: all that the process holds, models included."
)
HOST_BOUND = 0.9
ROUNDS = 7
WITH, WITHOUT = "with MTA", "without"


@dataclass(frozen=True)
class Pair:
    """Teacher and student of one family: width, layers, heads of each; and the batch.

    Attributes:
        layer_pairs: how many MTA aligns, spread over the depths.
    """

    name: str
    family: str
    student: tuple[int, int, int]
    teacher: tuple[int, int, int]
    ids: int
    batch: int
    seq_len: int
    layer_pairs: int


PAIRS = (
    Pair("GPT-2 120M <- 1.5B", "gpt2", (768, 12, 12), (1600, 48, 25), 50_257, 16, 256, 3),
    Pair("Qwen 0.5B <- 1.8B", "qwen2", (1024, 24, 16), (2048, 24, 16), 151_936, 32, 512, 6),
)
QUICK = (
    Pair("tiny GPT-2", "gpt2", (16, 2, 2), (24, 3, 2), 37, 2, 12, 2),
    Pair("tiny Qwen2", "qwen2", (16, 2, 2), (32, 2, 2), 37, 2, 12, 1),
)


def measure(day: Day) -> Iterator[Made]:
    """The first two shapes."""
    try:
        import transformers
    except ImportError:
        yield skipped("training step", "transformers is not installed")
        return
    for pair in QUICK if day.quick else PAIRS:
        yield from attempt(pair.name, partial(_of_pair, day, pair, transformers))


def _model(pair: Pair, sizes: tuple[int, int, int], device: str, transformers: Any) -> nn.Module:
    width, layers, heads = sizes
    with torch.device(device):
        if pair.family == "gpt2":
            ends = {"bos_token_id": 0, "eos_token_id": 0}
            config = transformers.GPT2Config(
                vocab_size=pair.ids, n_embd=width, n_layer=layers, n_head=heads, n_positions=pair.seq_len, **ends
            )
            made = transformers.GPT2LMHeadModel(config)
        else:
            depths = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
            config = transformers.Qwen2Config(
                vocab_size=pair.ids, hidden_size=width, intermediate_size=11 * width // 4, **depths
            )
            made = transformers.Qwen2ForCausalLM(config)
    made.config.use_cache = False
    return made.to(device, torch.bfloat16)


def _layers(depth: int, count: int) -> list[int]:
    return [depth * (k + 1) // count for k in range(count)]


class Stepper:
    """Models, batch and optimiser of one pair."""

    def __init__(self, pair: Pair, day: Day, transformers: Any) -> None:
        device, self.backend = day.device, day.backend
        torch.manual_seed(0)
        self.pair = pair
        self.student = _model(pair, pair.student, device, transformers).train()
        self.teacher = _model(pair, pair.teacher, device, transformers).eval().requires_grad_(False)
        depths = (pair.student[1], pair.teacher[1])
        self.layers = [_layers(depth, pair.layer_pairs) for depth in depths]
        kinds: Any = ("word", *["phrase"] * (pair.layer_pairs - 1))
        config = MTAConfig(tuple(zip(*self.layers, strict=True)), kinds, backend=day.backend)
        self.mta = MTALoss(config, pair.student[0], pair.teacher[0]).to(device, torch.bfloat16)
        made = standard_spans(pair.batch, pair.seq_len)
        self.spans: dict[str, SpanBatch] = {kind: spans.to(device) for kind, spans in made.spans.items()}
        self.ids = torch.randint(pair.ids, (pair.batch, pair.seq_len), device=device)
        index = torch.arange(pair.batch * pair.seq_len, device=device).reshape(pair.batch, pair.seq_len)
        self.counted = index[:, pair.seq_len // 2 :].flatten()
        fused: dict[str, Any] = {"fused": True} if device != "cpu" else {}
        learnt = [*self.student.parameters(), *self.mta.parameters()]  # those without a gradient are passed over
        self.optimizer = torch.optim.AdamW(learnt, lr=1e-5, **fused)

    def _states(self, model: Any, layers: Sequence[int], capture: bool) -> tuple[Tensor, dict[int, Tensor]]:
        """Last states at the counted positions, and those of the chosen layers."""
        body = model.base_model
        if not capture:
            return body(self.ids).last_hidden_state.flatten(0, 1)[self.counted], {}
        with capture_layers(body, layers) as hidden:
            last = body(self.ids).last_hidden_state
        return last.flatten(0, 1)[self.counted], dict(hidden)

    def step(self, way: str) -> None:
        """One optimisation step."""
        with_mta = way == WITH
        with torch.no_grad():
            teacher, teacher_hidden = self._states(self.teacher, self.layers[1], with_mta)
        student, student_hidden = self._states(self.student, self.layers[0], with_mta)
        heads = [model.get_output_embeddings().weight for model in (self.student, self.teacher)]  # type: ignore[operator]
        loss = linear_divergence_loss(student, heads[0], teacher, heads[1], backend=self.backend)
        if with_mta:
            loss = loss + self.mta(student_hidden, teacher_hidden, self.spans).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _of_pair(day: Day, pair: Pair, transformers: Any) -> Iterator[Made]:
    stepper = Stepper(pair, day, transformers)
    ways = {way: partial(stepper.step, way) for way in (WITH, WITHOUT)}
    for call in ways.values():
        for _ in range(1 if day.warm or day.quick else clock.WARM_UP):
            call()
    if day.warm:
        return
    rounds = 1 if day.quick else ROUNDS
    wall = [{way: _wall(call, day.device) for way, call in ways.items()} for _ in range(rounds)]
    for way, call in ways.items():
        yield milliseconds(f"{pair.name}, {way}: step", [times[way] for times in wall])
        host = [clock.host_seconds(call, day.device) for _ in range(1 if day.quick else 3)]
        yield milliseconds(f"{pair.name}, {way}: host", host)
        share = sorted(host)[len(host) // 2] / sorted(times[way] for times in wall)[rounds // 2]
        bound = "host-bound" if share >= HOST_BOUND else "device-bound"
        yield entry(f"{pair.name}, {way}: host / step ({bound})", [share])
        yield _held(f"{pair.name}, {way}: peak memory", call, day.device)
    ratios = [times[WITH] / times[WITHOUT] for times in wall]
    yield entry(f"{pair.name}: step with MTA / without", ratios)


def _wall(call: partial, device: str) -> float:
    clock.wait(device)
    begun = time.perf_counter()
    call()
    clock.wait(device)
    return time.perf_counter() - begun


def _held(what: str, call: partial, device: str) -> Entry:
    if device == "cpu":
        return skipped(what, "a dry run has no device memory")
    clock.free(device)
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return entry(what, [torch.cuda.max_memory_allocated() / 1e6], "MB")
