"""What every part of a GPU day is given, and how its rows are made and survive a failure."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_day import clock
from bench.gpu_model.model import SHAPES, Shape
from bench.harness import Call
from bench.report import Entry, entry, milliseconds, skipped
from bench.workload import Workload, standard_workload

Made = Entry | Mapping[str, Any]  # a row, or samples for the JSON file
QUICK_SHAPES = (Shape("tiny", 2, 6, 8, 16, 1), Shape("tiny, second", 1, 9, 16, 32, 2))
SHARE = 0.15  # of five processes that warm up; the rest is for the part that is measured beside them
DRY = "a dry run has no device memory"


@dataclass(frozen=True)
class Day:
    """Where and how large a part measures.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        quick: tiny sizes, once each.
        warm: only call what compiles, and return: another process fills the compilers' caches meanwhile.
    """

    device: str
    quick: bool = False
    warm: bool = False

    @property
    def shapes(self) -> Sequence[Shape]:
        """The model's, from the shortest loss to the longest."""
        return QUICK_SHAPES if self.quick else SHAPES

    @property
    def backend(self) -> str:
        """What is timed; a dry run needs no interpreter where the kernels' numbers are not what is looked at."""
        return "triton" if self.device != "cpu" else "reference"

    def workload(self, shape: Shape, backend: str | None = None) -> Workload:
        """bfloat16 states and projections, by a backend."""
        dims = shape.student_dim, shape.teacher_dim
        made = standard_workload(shape.batch, shape.seq_len, dims, shape.pairs, device=self.device)
        return made.to(self.device, torch.bfloat16).with_backend(backend or self.backend)

    def share(self) -> None:
        """Take no more of the device's memory than leaves some to the others that run at the same time."""
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(SHARE)

    def rounds(self, once: float, most: int = 20) -> int:
        """As many as fit into a second, at least 3."""
        return 1 if self.quick else max(3, min(most, round(1 / max(once, 1e-6))))

    def times(self, call: Call, clock_of: Callable[[Call, str], float] = clock.device_seconds) -> list[float]:
        """Seconds of a call, round by round, warmed up."""
        for _ in range(1 if self.quick else clock.WARM_UP - 1):
            call()
        once = clock.device_seconds(call, self.device)
        return [clock_of(call, self.device) for _ in range(self.rounds(once))]

    def time(self, what: str, call: Call, clock_of: Callable[[Call, str], float] = clock.device_seconds) -> Entry:
        """A row of it."""
        return milliseconds(what, self.times(call, clock_of))

    def ratio(self, what: str, other: Call, ours: Call, target: str = ">= 1") -> Entry:
        """other / ours, the two in turn within each round; tiny sizes are not judged."""
        for call in (other, ours):
            call()
        rounds = self.rounds(clock.device_seconds(other, self.device))
        pairs = [[clock.device_seconds(call, self.device) for call in (other, ours)] for _ in range(rounds)]
        return entry(what, [theirs / mine for theirs, mine in pairs], target="" if self.quick else target)

    def peak(self, what: str, call: Callable[[], Sequence[Tensor]]) -> Entry:
        """Peak memory above inputs and results."""
        made = clock.peak_megabytes(call, self.device)
        return skipped(what, DRY) if made is None else entry(what, [made], "MB")


def failed(what: str, why: object) -> Entry:
    """A row without a figure that counts as missed, and why."""
    return Entry(what, "", "", None, None, None, 0, False, f"failed: {' '.join(str(why).split())[:400]}")


def attempt(what: str, rows: Callable[[], Iterable[Made]], *, fits: bool = True) -> Iterator[Made]:
    """The rows of ``rows()``; where it raises, those before and one with the error, so that others go on.

    Args:
        fits: whether it has to fit into the device's memory; else a row says that it doesn't.
    """
    try:
        yield from rows()
    except torch.OutOfMemoryError as error:
        yield failed(what, error) if fits else skipped(what, "it does not fit into the device's memory")
    except (Exception, SystemExit) as error:  # parity ends a benchmark with SystemExit
        print(f"--- {what}", file=sys.stderr)
        traceback.print_exc()
        yield failed(what, f"{type(error).__name__}: {error}")
    finally:
        clock.free("cuda" if torch.cuda.is_available() else "cpu")
