"""What the host does for a step: how many ops, launches and calls of torch it makes, as each takes its microseconds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mta_fast import MTAConfig, MTALoss, contract

pytest.importorskip("triton")

from bench.workload import standard_spans
from mta_fast.kernels._launch import INTERPRETED, Launch, observe
from mta_fast.ops._operator import FUNCTIONS


class _Calls(TorchDispatchMode):
    """The package's ops and, also of what they call, torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.of_torch: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mta_fast":
            self.ops.append(func._opname)
            with self:
                return FUNCTIONS[func._opname](*args, **kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:  # nothing that is composed of others
            self.of_torch.append(func._opname)
            out = func(*args, **kwargs)
        return out


@pytest.mark.skipif(not INTERPRETED, reason="launches on CPU tensors, which are not executed")
@pytest.mark.parametrize(
    ("pairs", "launches", "of_torch", "ops"), [(1, 12, 111, 5), (3, 36, 275, 9)], ids=["one", "three"]
)
def test_a_step_asks_no_more_of_the_host(
    pairs: int, launches: int, of_torch: int, ops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of MTALoss; fewer are welcome and then the figures here."""
    monkeypatch.setattr(contract, "_readable", lambda tensor: False)  # as on a GPU
    spans = standard_spans(2, 64).spans
    kinds = ("word", *("phrase",) * (pairs - 1))
    config = MTAConfig.paper(layer_pairs=tuple((i, i) for i in range(pairs)), granularity=kinds, backend="triton")
    like: dict[str, Any] = {"dtype": torch.bfloat16}
    loss = MTALoss(config, 32, 48).to(**like)
    student = {i: torch.zeros(2, 64, 32, requires_grad=True, **like) for i in range(pairs)}
    teacher = {i: torch.zeros(2, 64, 48, **like) for i in range(pairs)}
    seen: list[Launch] = []
    with observe(seen.append, execute=False), _Calls() as calls:
        loss(student, teacher, spans).loss.backward()
    assert len(calls.ops) == ops
    assert len(seen) == launches
    assert len(calls.of_torch) <= of_torch, Counter(calls.of_torch)
