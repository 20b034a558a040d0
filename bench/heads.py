"""Both LM heads and SRKL, forward + backward, through the heads and by logits: ``python -m bench heads``.

The shape of SmolLM2: 2,048 positions, of which 1,168 are counted, two heads of 49,152 ids and 576 features. Before:
both heads on all positions, the counted ones taken from their logits, and autograd. Liger's fused loss has no SRKL, so
that its Jensen-Shannon divergence stands beside this package's.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peak
from bench.floor import SIZES, GemmRate, check_floor, head_flops
from bench.harness import Call, Effort, Tensors, alternate, check_parity
from bench.ops.cases import results
from bench.report import Entry, Report, Section, entry, machine, markdown_table, milliseconds, number, skipped
from bench.workload import cpu_backends
from mta_fast import linear_divergence_loss
from mta_fast.distill.methods.losses import skewed_reverse_kl
from mta_fast.ops.linear_divergence import divergence
from mta_fast.spans.collate import IGNORED_LABEL

BEFORE, COUNTED, LIGER = "logits of all positions", "logits of counted positions", "Liger's fused JSD"
TRL = "TRL's chunked loss"
NO_TRL = "trl 1.13 alone had a fused JSD, Liger's code; other versions chunk log-probabilities of labels, no divergence"
BEFORE_TARGET, FLOOR_TARGET, MEMORY_TARGET = "<= 0.25", "<= 1.2", "<= 160"


@dataclass(frozen=True)
class Size:
    """Positions, those of them that are counted, ids of the heads, and features of both models' states."""

    positions: int = 2048
    counted: int = 1168
    ids: int = 49_152
    width: int = 576


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    size: Size
    effort: Effort
    gemm_sizes: Sequence[tuple[int, int, int]]


FULL = Plan(Size(), Effort(7, 240), SIZES[:2])
QUICK = Plan(Size(24, 10, 96, 16), Effort(2), ((32, 32, 32),))
TINY = asdict(QUICK.size)


@dataclass(frozen=True)
class Inputs:
    """States of all positions, heads, and labels of one row."""

    student: Tensor  # [S, d]
    student_head: Tensor  # [V, d]
    teacher: Tensor  # [S, d]
    teacher_head: Tensor  # [V, d]
    labels: Tensor  # [S]

    @property
    def counted(self) -> Tensor:
        """[M] positions whose next label counts."""
        return (self.labels[1:] != IGNORED_LABEL).nonzero()[:, 0]

    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States at the counted positions, and heads."""
        at = self.counted
        return self.student[at], self.student_head, self.teacher[at], self.teacher_head


def make(size: Size) -> Inputs:
    """Random states; logits of about unit variance times 3."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(size.positions, size.width, generator=generator) for _ in range(2)]
    heads = [3 * torch.randn(size.ids, size.width, generator=generator) / size.width**0.5 for _ in range(2)]
    labels = torch.randint(size.ids, (size.positions,), generator=generator)
    labels[: size.positions - size.counted] = IGNORED_LABEL
    return Inputs(states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1], labels)


# --- sides -------------------------------------------------------------------------------------------------------


def _op(inputs: Inputs, backend: str, kind: str = "srkl") -> Tensors:
    loss = linear_divergence_loss(*inputs.sides(), divergence=kind, backend=backend)
    return results(loss, [inputs.student, inputs.student_head])


def _before(inputs: Inputs) -> Tensors:
    """As the trainer did where its models made logits."""
    with torch.no_grad():
        teacher = F.linear(inputs.teacher, inputs.teacher_head)[None]
    student = F.linear(inputs.student, inputs.student_head)[None]
    return results(skewed_reverse_kl(student, teacher, inputs.labels[None]), [inputs.student, inputs.student_head])


def _counted(inputs: Inputs, kind: str = "srkl") -> Tensors:
    """Plain torch that multiplies counted positions alone."""
    student, student_head, teacher, teacher_head = inputs.sides()
    with torch.no_grad():
        log_p = F.linear(teacher, teacher_head).log_softmax(-1)
    log_q = F.linear(student, student_head).log_softmax(-1)
    return results(divergence(log_p, log_q, kind).mean(), [inputs.student, inputs.student_head])


def liger_jsd(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused loss of counted positions, [M, d], [V, d] of each side, and labels [M] that it wants beside."""
    fused = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    made = fused(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    loss: Tensor = made(student, student_head, teacher, teacher_head, labels)
    return loss


def _liger(inputs: Inputs) -> Tensors:
    labels = inputs.labels[1:][inputs.counted]
    return results(liger_jsd(*inputs.sides(), labels), [inputs.student, inputs.student_head])


def sides_of(inputs: Inputs, names: Sequence[str]) -> dict[str, Call]:
    """SRKL by every backend, and by logits."""
    ours: Mapping[str, Call] = {name: partial(_op, inputs, name) for name in names}
    return {**ours, BEFORE: partial(_before, inputs), COUNTED: partial(_counted, inputs)}


@lru_cache(maxsize=1)
def _cached(size: Size) -> Inputs:
    return make(size)


def call(side: str, **size: int) -> Call:
    """A side from names and numbers, for ``bench.peak``."""
    inputs = _cached(Size(**size))
    others: dict[str, Callable[[Inputs], Tensors]] = {BEFORE: _before, COUNTED: _counted, LIGER: _liger}
    return partial(others[side], inputs) if side in others else partial(_op, inputs, side)


# --- figures -----------------------------------------------------------------------------------------------------


def measure(backends: Sequence[str] | None = None, rounds: int | None = None, quick: bool = False) -> Report:
    """Every side's time against before and against the floor, and its peak memory."""
    plan, names = QUICK if quick else FULL, cpu_backends(backends)
    inputs, size = make(plan.size), plan.size
    peer, why = _peer(inputs)
    sides = sides_of(inputs, names) | peer

    def check(made: dict[str, Tensors]) -> None:
        for name in (*names, COUNTED):
            check_parity(f"heads, {name} against {BEFORE}", made[name], made[BEFORE], PARITY)

    rate = GemmRate(plan.gemm_sizes)
    times = alternate({"machine": rate, **sides}, plan.effort.asked(rounds), check)
    flops = head_flops(size.ids, size.width, size.counted, size.width)
    floor = [flops / each for each in rate.last(len(times.pop("machine")))]
    entries, first, judged = list[Entry](), names[0], not quick
    over = {side: [t / f for t, f in zip(times[side], floor, strict=True)] for side in times}
    for name in names:
        if judged:
            check_floor(f"heads, {name}", over[name])
        target = BEFORE_TARGET if judged and name == first else ""
        entries.append(entry(f"{name}: time / {BEFORE}", times.ratio(name, BEFORE), target=target))
        target = FLOOR_TARGET if judged and name == first else ""
        entries.append(entry(f"{name}: time / floor, GEMM rate of the same round", over[name], target=target))
    entries += [entry(f"{first}: time / {COUNTED}", times.ratio(first, COUNTED))]
    own = f"{first}, JSD"
    entries += [entry(f"{own}: time / {LIGER}", times.ratio(own, LIGER))] if peer else [skipped(LIGER, why)]
    entries += [skipped(TRL, NO_TRL), *_peaks(plan.size, [*names, BEFORE, COUNTED], first, quick)]
    lines = []
    for side, values in times.items():
        time, spread = milliseconds("", values), number(statistics.median(over[side]), "x")
        lines.append([side, time.cell, f"{number(time.p10)} to {number(time.p90)}", spread])
    table = markdown_table(("side", "time", "p10 to p90, ms", "time / floor"), lines)
    title = f"{size.counted:,} counted of {size.positions:,} positions, {size.ids:,} ids, {size.width} features"
    sections = [Section("Both heads and SRKL", entries, f"{title}. {TEXT}"), Section("Times", (), TEXT_TIMES, table)]
    about = machine(sizes=title)
    return Report("mta-fast bench heads", about, sections, {"seconds": times, "floor": floor})


PARITY = 1e-3  # float32 gradients of logits are themselves 2e-4 off float64 at this size, those of the op 9e-6
TEXT = "Forward + backward; value and gradients compared before. Peak memory: above inputs and returned gradients."
TEXT_TIMES = "Floor: 8 M V d operations at the GEMM rate of the same round."


def _peer(inputs: Inputs) -> tuple[dict[str, Call], str]:
    """Liger's loss and this package's in the same divergence, or why it is left out."""
    try:
        made = _liger(inputs)
    except ImportError as error:
        return {}, f"liger-kernel is not installed ({error})"
    backend = cpu_backends()[0]
    own = _op(inputs, backend, "jsd")
    check_parity(f"heads, {LIGER} against {backend}", made, own, PARITY)
    return {f"{backend}, JSD": partial(_op, inputs, backend, "jsd"), LIGER: partial(_liger, inputs)}, ""


def _peaks(size: Size, sides: Sequence[str], first: str, quick: bool) -> list[Entry]:
    if quick or peak.why_not():
        return [skipped(f"{side}: peak memory", peak.why_not() or "tiny sizes") for side in sides]
    probes = [peak.Probe("bench.heads:call", {"side": side, **asdict(size)}, TINY) for side in sides]
    return [
        entry(f"{side}: peak memory", [found], "MB", MEMORY_TARGET if side == first else "")
        for side, found in zip(sides, peak.peaks(probes), strict=True)
    ]
