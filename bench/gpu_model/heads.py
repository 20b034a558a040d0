"""What a base loss through the LM heads moves on a GPU, by the op and by logits: a part of ``bench model``.

Both ways run on tensors without data, SRKL forward and backward, bfloat16 states and heads, every position counted.
What torch's launches and the kernel move is divided by positions x ids: tensors of logits (every pass over them), and
the heads with their gradient, which are read and written once a chunk of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floor import head_flops
from bench.gpu_model.costs import GPUS, cost
from bench.gpu_model.recorder import ARCHITECTURE, Recorder, Work
from bench.report import Entry, entry, markdown_table
from mta_fast import linear_divergence_loss
from mta_fast.kernels._launch import Launch, observe
from mta_fast.ops.linear_divergence import divergence

OP, LOGITS = "linear_divergence", "logits"
TARGET = "<= 40"


@dataclass(frozen=True)
class HeadShape:
    """Widths of the states, ids, and the counted positions of one call."""

    name: str
    student_dim: int
    teacher_dim: int
    ids: int
    positions: int = 8 * 2048


SHAPES = (
    HeadShape("Qwen1.5 0.5B <- 1.8B", 1024, 2048, 151_936),
    HeadShape("SmolLM2 135M <- its cut", 576, 576, 49_152),
)


class _HeadRecorder(Recorder):
    """Counts apart what is moved of tensors that hold logits."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__({})
        self.shape, self.of_logits, self.most = shape, 0, 0

    def launched(self, launch: Launch) -> None:
        made = cost(launch, None)
        self.of_logits += made.bytes
        self.works.append(Work(launch.name, "ieee", made))

    def counted(self, work: Work, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().counted(work, inputs, outputs)
        others = [t for t in (*inputs, *outputs) if not self._holds_logits(t)]
        if len(others) < len(inputs) + len(outputs):
            apart = sum(t.numel() * t.element_size() for t in others)
            self.of_logits += max(work.cost.bytes - apart, 0)

    def _holds_logits(self, tensor: Tensor) -> bool:
        widths = {self.shape.student_dim, self.shape.teacher_dim}
        return self.shape.ids in tensor.shape and not widths & set(tensor.shape)

    def _allocated(self, tensors: Sequence[Tensor]) -> None:
        super()._allocated(tensors)
        self.most = max(self.most, self._held())


def _inputs(shape: HeadShape) -> list[Tensor]:
    """The student's states and head, the teacher's."""
    like: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    sides = [torch.empty(n, d, **like) for d in (shape.student_dim, shape.teacher_dim) for n in _sizes(shape)]
    for learnt in sides[:2]:
        learnt.requires_grad_()
    return sides


def _sizes(shape: HeadShape) -> tuple[int, int]:
    return shape.positions, shape.ids


def _by_op(inputs: Sequence[Tensor]) -> Tensor:
    return linear_divergence_loss(*inputs, backend="triton")


def _by_logits(inputs: Sequence[Tensor]) -> Tensor:
    """Both heads on all positions, the counted ones taken from them, float32, and autograd."""
    student, student_head, teacher, teacher_head = inputs
    index = torch.empty(len(student), dtype=torch.long, device="meta")
    with torch.no_grad():
        log_p = F.linear(teacher, teacher_head)
    log_q = F.log_softmax(F.linear(student, student_head)[index].float(), -1)
    log_p = F.log_softmax(log_p[index].float(), -1)
    return divergence(log_p, log_q, "srkl").mean()


WAYS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {OP: _by_op, LOGITS: _by_logits}


def record(shape: HeadShape, way: str) -> _HeadRecorder:
    """Every launch and allocation of one way, forward and backward."""
    inputs, recorder = _inputs(shape), _HeadRecorder(shape)
    with observe(recorder.launched, execute=False, architecture=ARCHITECTURE), recorder:
        WAYS[way](inputs).backward()
    return recorder


def summarise(shape: HeadShape) -> dict[str, Any]:
    """The figures of one shape."""
    entries = shape.positions * shape.ids
    made: dict[str, Any] = {"shape": asdict(shape)}
    for way in WAYS:
        recorder = record(shape, way)
        moved = sum(work.cost.bytes for work in recorder.works)
        made[way] = {
            "launches": len(recorder.works),
            "flops_over_minimum": sum(work.cost.flops for work in recorder.works)
            / head_flops(shape.ids, shape.student_dim, shape.positions, shape.teacher_dim),
            "bytes_an_entry": recorder.of_logits / entries,
            "bytes_of_heads": (moved - recorder.of_logits) / entries,
            "peak_bytes": recorder.most,
            "ms": {g.name: round(1e3 * sum(max(w.seconds(g)) for w in recorder.works), 3) for g in GPUS},
        }
    return made


def targets(shapes: Sequence[dict[str, Any]]) -> list[Entry]:
    """What the op must reach."""
    first = shapes[0]
    what = f"bytes a (token, vocabulary entry), every pass over logits, {first['shape']['name']}"
    before = f"by logits {first[LOGITS]['bytes_an_entry']:.0f}"
    return [entry(what, [first[OP]["bytes_an_entry"]], "B", TARGET, before)]


TEXT = (
    "SRKL, forward + backward, bfloat16 states and heads, all positions counted; logits: both heads on all positions, "
    "float32 log-softmax, autograd. Bytes a (token, vocabulary entry): of logits, every pass; of the heads and their "
    "gradient, which every chunk of positions reads and writes again. Peak memory: above states and heads, the "
    "gradients included."
)


def table(shapes: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the report's table."""
    lines = []
    for each in shapes:
        shape = HeadShape(**each["shape"])
        for way in WAYS:
            made = each[way]
            lines.append(
                [f"{shape.name}, V = {shape.ids:,}, {shape.positions:,} positions", way, made["launches"]]
                + [f"{made['flops_over_minimum']:.2f}"]
                + [f"{made[name]:.1f}" for name in ("bytes_an_entry", "bytes_of_heads")]
                + [f"{made['peak_bytes'] / 1e9:.2f}", *(f"{ms:.1f}" for ms in made["ms"].values())]
            )
    head = ("shape", "way", "launches", "products / minimum", "bytes of logits", "of heads", "peak memory, GB")
    return markdown_table((*head, *(f"{gpu.name}, ms" for gpu in GPUS)), lines)
