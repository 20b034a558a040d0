"""Does an installed wheel work where there are only torch and NumPy? Standard library only: no pytest.

    python -I tests/smoke.py              # a wheel with the C++ kernels
    python -I tests/smoke.py --pure       # one without: says how to build them, and runs on the reference

Run it with the Python of a bare environment; -I keeps the checkout off its path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

import mta_fast
from mta_fast import MTAConfig, MTALoss, SpanBatch, _extension
from mta_fast.backends import BACKENDS
from mta_fast.doctor import report
from mta_fast.errors import BackendUnavailableError
from mta_fast.spans import align

TEXT = "The old keeper climbed the stairs."
OFFSETS = [[(0, 3), (3, 7), (7, 14), (14, 22), (22, 26), (26, 33), (33, 34)]]
SPANS = {"word": [[(0, 3), (4, 7), (8, 14), (15, 22)]], "phrase": [[(0, 14), (15, 33)]]}


def spans(backend: str) -> dict[str, SpanBatch]:
    """Words and phrases of the text."""
    return {
        kind: SpanBatch.from_char_spans(rows, OFFSETS, texts=[TEXT], backend=backend) for kind, rows in SPANS.items()
    }


def loss(backend: str) -> tuple[float, torch.Tensor]:
    """The loss of fixed hidden states, and its gradient."""
    torch.manual_seed(0)
    config = MTAConfig([(1, 2), (2, 4)], granularity=["word", "phrase"], backend=backend)
    mta = MTALoss(config, student_dim=16, teacher_dim=24)
    student = {layer: torch.randn(1, 7, 16, requires_grad=True) for layer in (1, 2)}
    teacher = {layer: torch.randn(1, 7, 24) for layer in (2, 4)}
    output = mta(student, teacher, spans("auto"))
    output.loss.backward()
    return output.loss.item(), torch.cat([state.grad for state in student.values()])


def expect(condition: bool, what: str) -> None:
    """Stop with ``what`` unless the condition holds."""
    if not condition:
        sys.exit(f"smoke: expected {what}")


def main(pure: bool) -> None:
    where = Path(mta_fast.__file__)
    expect("site-packages" in where.parts, f"the installed package, got {where}")
    found = [name for name in ("transformers", "spacy", "triton", "pytest") if importlib.util.find_spec(name)]
    expect(not found or found == ["triton"], f"a bare environment, got {found}")  # CUDA builds of torch bring triton
    reason = _extension.why_missing()
    expect((reason is not None) == pure, "no C++ kernels" if pure else f"the C++ kernels, got {reason}")
    said = report()
    print(said)
    expect(("cpp: ready for cpu" in said) != pure, "doctor to say whether the C++ kernels are there")
    expect(("pip install --no-build-isolation ." in said) == pure, "doctor to say how to build what is missing")

    ready = [name for name in BACKENDS if name != "triton" and not (pure and name == "cpp")]
    value, gradient = loss("reference")
    for name in ready:
        other, other_gradient = loss(name)
        print(f"loss {name}: {other:.6f}")
        expect(abs(other - value) < 1e-4 * value, f"a loss of {value} from {name}, got {other}")
        expect(torch.allclose(other_gradient, gradient, rtol=1e-3, atol=1e-5), f"the gradient of reference from {name}")
    for name in align.BACKENDS if not pure else ("reference",):
        ranges = [batch.ranges.tolist() for batch in spans(name).values()]
        print(f"alignment {name}: {ranges}")
        expect(ranges == [[[0, 1], [1, 2], [2, 3], [3, 4]], [[0, 3], [3, 6]]], "these token ranges")
    if pure:
        for call in (loss, spans):
            try:
                call("cpp")
            except BackendUnavailableError:
                continue
            sys.exit("smoke: expected backend 'cpp' to be refused")
    print("smoke: passed")


if __name__ == "__main__":
    main(pure="--pure" in sys.argv[1:])
