"""A pass on tensors without data, and every launch and allocation in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.gpu_model.costs import GEMMS, Batch, Cost, Gpu, cost, is_half, precision, torch_cost
from mta_fast.kernels._launch import Launch
from mta_fast.ops._operator import FUNCTIONS

ARCHITECTURE = "sm_90"  # whose launch parameters are modelled on every GPU


@dataclass(frozen=True)
class Work:
    """One launch: whose it is, what it multiplies in, and what it costs."""

    name: str
    precision: str
    cost: Cost

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """What the products and what the bytes take."""
        return self.cost.flops / gpu.peak(self.precision), self.cost.bytes / gpu.bandwidth


GEMM, OTHER = "GEMM", "torch"  # names of what is not the package's own
NO_LAUNCH = {"empty", "new_empty", "empty_like", "squeeze_"}


class Recorder(TorchDispatchMode):
    """Records torch's launches and allocations, and runs the package's ops on tensors without data.

    torch would take the shapes of an op's results from its fake implementation; here the op itself runs.
    """

    def __init__(self, batches: dict[int, Batch]) -> None:
        super().__init__()
        self.batches = batches  # by the storage of an index tensor
        self.works: list[Work] = []
        self.allocations: list[tuple[int, tuple[int, ...], str]] = []  # bytes, shape, dtype
        self.scratch: Counter[str] = Counter()  # by op: most bytes that a call holds at once and does not return
        self._live: list[tuple[StorageWeakRef, int]] = []
        self._peak = 0

    def launched(self, launch: Launch) -> None:
        """Observer of the package's own launches."""
        tensors = [a for a in launch.arguments.values() if isinstance(a, Tensor)]
        batch = next((self.batches[storage_key(t)] for t in tensors if storage_key(t) in self.batches), None)
        self.works.append(Work(launch.name, precision(launch), cost(launch, batch)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count one of torch's operators, or open one of the package's ops."""
        kwargs = kwargs or {}
        if func.namespace == "mta_fast":
            return self._run_op(func, args, kwargs)
        with self:  # what torch composes of others, such as matmul, arrives whole where autograd is off
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        target = kwargs.pop("out", None)  # written, not read
        inputs, outputs = _device_tensors((args, kwargs)), _device_tensors(out)
        known = {storage_key(t) for t in (*inputs, *_device_tensors(target))}
        self._allocated([t for t in outputs if storage_key(t) not in known])
        if outputs and not func.is_view and func._opname not in NO_LAUNCH:
            name = GEMM if func._opname in GEMMS else OTHER
            kind = "bfloat16" if is_half(inputs[-1] if inputs else None) else "ieee"
            self.counted(Work(name, kind, torch_cost(func._opname, inputs, outputs)), inputs, outputs)
        return out

    def counted(self, work: Work, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """One of torch's launches, with the tensors that it read and wrote."""
        self.works.append(work)

    def _run_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        before = self._peak = self._held()
        with self:
            out = FUNCTIONS[func._opname](*args, **kwargs)
        returned = sum(t.untyped_storage().nbytes() for t in _device_tensors(out))
        self.scratch[func._opname] = max(self.scratch[func._opname], self._peak - before - returned)
        return out

    def _allocated(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live.append((StorageWeakRef(storage), storage.nbytes()))
            self.allocations.append((storage.nbytes(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
        self._peak = max(self._peak, self._held())

    def _held(self) -> int:
        self._live = [(ref, size) for ref, size in self._live if not ref.expired()]
        return sum(size for _, size in self._live)


def _device_tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_meta and t.numel()]


def storage_key(tensor: Tensor) -> int:
    """What all views of one storage share."""
    return tensor.untyped_storage()._cdata
