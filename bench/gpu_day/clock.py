"""A device's clocks and memory. On a CPU, for dry runs, the wall clock, and a graph whose replay is another call."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.harness import Call, seconds

WARM_UP = 3
HOST_CALLS = 5  # in a row without waiting: their launches stay below the 1,024 that a stream holds
LONG_CALL = 0.05  # seconds: such a one is not repeated within a round


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def device_seconds(call: Call, device: str) -> float:
    """Seconds of one call, on the device's own clock where there is one."""
    if device == "cpu":
        return seconds(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(call: Call, device: str) -> float:
    """Seconds that the host needs for a call while the device has others to do: nothing waits between the calls."""
    wait(device)
    begun = time.perf_counter()
    call()
    wait(device)
    calls = 1 if time.perf_counter() - begun > LONG_CALL else HOST_CALLS
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    taken = (time.perf_counter() - begun) / calls
    wait(device)
    return taken


def captured(call: Callable[[], Sequence[Tensor]], device: str) -> tuple[Call, Sequence[Tensor]]:
    """A CUDA graph's replay, and the tensors that it writes; on a CPU the call again, into the same tensors."""
    if device == "cpu":
        made = [tensor.clone() for tensor in call()]

        def again() -> None:
            for kept, new in zip(made, call(), strict=True):
                kept.copy_(new)

        return again, made
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def peak_megabytes(call: Callable[[], Sequence[Tensor]], device: str) -> float | None:
    """Peak of a call above its inputs and what it returns, in MB (10^6 bytes); None on a CPU."""
    if device == "cpu":
        return None
    free(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = call()
    torch.cuda.synchronize()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
    return (torch.cuda.max_memory_allocated() - before - sum(storages.values())) / 1e6


def free(device: str) -> None:
    """Give back what no tensor holds."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
