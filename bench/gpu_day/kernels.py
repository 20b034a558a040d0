"""Each kernel's own device time by torch.profiler, beside what ``bench model`` says, and the card's two ceilings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from bench.gpu_day import clock
from bench.gpu_day.day import Day, Made, attempt, failed
from bench.gpu_model import model
from bench.gpu_model.model import Shape
from bench.gpu_model.recorder import GEMM, OTHER
from bench.harness import Call
from bench.report import entry, milliseconds, number
from bench.workload import loss_and_gradients
from mta_fast.kernels._launch import Launch, observe

TEXT = (
    "Device time of a forward + backward pass, all launches of a kernel together, by torch.profiler. Modelled: what "
    "bench model says for an H100, on any card. Shares: counted bytes and products over that time, of the card's own "
    "copy and bfloat16 matmul, measured first; float32 products in three of TF32 count once."
)
SHEET = "H100"
STEPS = 3
MATMUL, QUICK_MATMUL = 8192, 64
COPY, QUICK_COPY = 2**30, 2**12  # bytes
GEMM_NAMES = ("gemm", "cutlass", "nvjet", "cublas", "xmma", "splitk", "gemv")
Device = Mapping[str, tuple[int, float]]  # launches and seconds of a step, by name


def measure(day: Day) -> Iterator[Made]:
    """The ceilings, then every shape."""
    size, length = (QUICK_MATMUL, QUICK_COPY) if day.quick else (MATMUL, COPY)
    left, right = (torch.randn(size, size, device=day.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.ones(length // 4, device=day.device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / min(day.times(partial(torch.mm, left, right, out=out)))
    bandwidth = 2 * length / min(day.times(partial(target.copy_, source)))
    del left, right, out, source, target
    clock.free(day.device)
    yield entry(f"bfloat16 matmul, {size} x {size} x {size}", [flops / 1e12], "TFLOP/s")
    yield entry(f"device-to-device copy of {length:,} bytes, read + written", [bandwidth / 1e9], "GB/s")
    for shape in day.shapes:
        yield from attempt(f"{shape.name}: kernels", partial(_of_shape, day, shape, flops, bandwidth))


def _of_shape(day: Day, shape: Shape, flops: float, bandwidth: float) -> Iterator[Made]:
    try:
        counted = {each["kernel"]: each for each in model.summarise(shape, model.record(shape))["kernels"]}
    except Exception as error:  # times are worth having without the model
        counted = {}
        yield failed(f"{shape.name}: model", f"{type(error).__name__}: {error}")
    workload = day.workload(shape, "triton")
    call = partial(loss_and_gradients, workload, workload.loss)
    found = launches(call)
    measured = by_kernel(dry_events(found) if day.device == "cpu" else events(call), dict(found))
    for name in sorted({name for _, name in found} - set(measured)):
        yield failed(f"{shape.name}: {name}", "launched, but the profiler shows no kernel of this name")
    samples = {}
    for name, (count, seconds) in measured.items():
        cost = counted.get(name)
        notes = [f"{count} launches"]
        if cost is None:
            notes.append("not modelled")
        else:
            modelled = cost["ms"][SHEET]
            shares = {"bandwidth": cost["bytes"] / seconds / bandwidth, "products": cost["flops"] / seconds / flops}
            notes.append(f"modelled {number(modelled)} ms")
            if modelled:
                notes.append(f"measured / modelled {number(1e3 * seconds / modelled)}")
            notes += [f"{100 * share:.0f} % of {peak}" for peak, share in shares.items()]
            samples[name] = {"modelled_ms": modelled, **shares}
        samples.setdefault(name, {}).update(launches=count, ms=1e3 * seconds)
        yield milliseconds(f"{shape.name}: {name} ({', '.join(notes)})", [seconds])
    total = sum(seconds for _, seconds in measured.values())
    yield milliseconds(f"{shape.name}: all, device busy", [total])
    if counted:
        modelled = sum(each["ms"][SHEET] for each in counted.values())
        yield entry(f"{shape.name}: all, measured / modelled for {SHEET}", [1e3 * total / modelled])
    yield {shape.name: {"shape": asdict(shape), "kernels": samples}}


def launches(call: Call) -> list[tuple[str, str]]:
    """Of every launch of the package's own in a call: what a profiler calls it, and its name in the table."""
    made: list[tuple[str, str]] = []

    def launched(launch: Launch) -> None:
        made.append((_function(launch.kernel), launch.name))

    with observe(launched):
        call()
    return made


def _function(kernel: Any) -> str:
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel.__name__


def events(call: Call) -> list[tuple[str, float]]:
    """Name and seconds of everything that the device did in ``STEPS`` calls."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    made = [each for each in profiler.events() or [] if each.device_type.name == "CUDA"]
    return [(each.name, each.time_range.elapsed_us() / 1e6) for each in made]


def dry_events(found: Sequence[tuple[str, str]]) -> list[tuple[str, float]]:
    """The same where there is no device: a millisecond for every launch, a GEMM and a fill."""
    return STEPS * [(name, 1e-3) for name in (*(function for function, _ in found), "a vendor's gemm", "fill")]


def by_kernel(found: Sequence[tuple[str, float]], own: Mapping[str, str]) -> Device:
    """Launches and seconds of one step: the package's kernels by name, GEMMs, and torch's others."""
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    kind: Callable[[str], str] = partial(_kind, own)
    for name, taken in found:
        counts[kind(name)] += 1
        seconds[kind(name)] += taken  # type: ignore[assignment]  # a Counter of seconds
    order = sorted(counts, key=lambda name: (name in (GEMM, OTHER), -seconds[name]))
    return {name: (round(counts[name] / STEPS), seconds[name] / STEPS) for name in order}


def _kind(own: Mapping[str, str], name: str) -> str:
    if name in own:
        return own[name]
    return GEMM if any(part in name.lower() for part in GEMM_NAMES) else OTHER
