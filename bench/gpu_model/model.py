"""What the Triton backend moves, multiplies and launches, and the time data sheets allow for it: nothing is timed.

``python -m bench model``. A forward and backward pass of MTALoss on tensors without data (device "meta") records every
launch. ``costs`` turns each of the package's own into operations and bytes; GEMMs and torch's other launches are
counted from the shapes of their tensors. Reading a value on the host (``.item()``, ``.cpu()``, ``nonzero``)
raises on such tensors, so that a pass that ends has no synchronisation.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.gpu_model import heads
from bench.gpu_model.costs import GPUS, Batch
from bench.gpu_model.recorder import ARCHITECTURE, GEMM, OTHER, Recorder, Work, storage_key
from bench.report import Entry, Report, Section, entry, markdown_table
from bench.workload import COVERED_SHARE, standard_spans
from mta_fast import MTAConfig, MTALoss, __version__
from mta_fast.errors import BackendUnavailableError
from mta_fast.kernels._launch import INTERPRETED, observe


@dataclass(frozen=True)
class Shape:
    """Rows, tokens a row, widths and layer pairs of one loss call."""

    name: str
    batch: int
    seq_len: int
    student_dim: int
    teacher_dim: int
    pairs: int


SHAPES = (
    Shape("GPT-2 120M <- 1.5B", 16, 256, 768, 1600, 3),
    Shape("Qwen1.5 0.5B <- 1.8B", 32, 512, 1024, 2048, 6),
    Shape("OPT 1.3B <- 6.7B", 64, 1024, 2048, 4096, 5),
    Shape("long context", 1, 131072, 2048, 4096, 3),
)


def record(shape: Shape) -> Recorder:
    """Every launch and allocation of a forward and backward pass: bf16 states and projections, paper preset."""
    batches: dict[int, Batch] = {}
    spans = {}
    for kind, made in standard_spans(shape.batch, shape.seq_len).spans.items():
        spans[kind] = made.to("meta")
        index = [*spans[kind].index_tensors(), spans[kind].rows.table]
        batches |= dict.fromkeys((storage_key(t) for t in index), Batch.of(made))
    layers = range(shape.pairs)
    config = MTAConfig.paper(
        layer_pairs=tuple((layer, layer) for layer in layers),
        granularity=("word", *("phrase",) * (shape.pairs - 1)),
        backend="triton",
    )
    like: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    loss = MTALoss(config, shape.student_dim, shape.teacher_dim).to(**like)
    student, teacher = (
        {layer: torch.empty(shape.batch, shape.seq_len, dim, **like) for layer in layers}
        for dim in (shape.student_dim, shape.teacher_dim)
    )
    for hidden in student.values():
        hidden.requires_grad_()
    recorder = Recorder(batches)
    with observe(recorder.launched, execute=False, architecture=ARCHITECTURE), recorder:
        loss(student, teacher, spans).loss.backward()
    return recorder


# --- report ------------------------------------------------------------------------------------------------------

IMPORTANCE = ("strips", "statistics", "sums")
TRAFFIC = ("pool", "pool_gradient", "align")
SCRATCH_OPS = ("layer_weights", "layer_pairs", "hidden_alignment")
ASSUMPTIONS = (
    "Time of a launch: the longer of products / dense peak and bytes / memory bandwidth of the data sheet, launch "
    "latency left out; launches run one after another, and none finds its inputs in a cache.",
    "Products: 2 M N K of whole tiles, padding of a row's last tile and of the width included. Matmul precision "
    '"highest": products of float32 are three of TF32, and count three times in the time, once in GFLOP. Other '
    "arithmetic (exponentials, float64 sums) is left out.",
    "Bytes: every distinct byte that a launch reads or writes once; further reads, by other programs too, come from "
    "L2. Beside that, each access of a kernel to its own unfinished results (importance: the partials). Minimum: every "
    "input once, every output once.",
    f"Launch parameters of {ARCHITECTURE} on every GPU. No padding in the batch; bf16 states and projections.",
    "No value is read on the host: on tensors without data that raises, and the pass ended.",
)


def _kernels(works: Sequence[Work]) -> dict[str, dict[str, Any]]:
    """The figures of each kernel, in the order of their first launches; of GEMMs, and of torch's other launches."""
    found = {}
    names = dict.fromkeys(work.name for work in works)
    for name in (*(name for name in names if name not in (GEMM, OTHER)), GEMM, OTHER):
        made = [work for work in works if work.name == name]
        times = {gpu.name: [work.seconds(gpu) for work in made] for gpu in GPUS}
        products = {gpu: sum(p for p, m in pairs if p > m) for gpu, pairs in times.items()}
        total = {gpu: sum(map(max, pairs)) for gpu, pairs in times.items()}
        found[name] = {
            "kernel": name,
            "products": ", ".join(sorted({work.precision for work in made if work.cost.flops})),
            "launches": len(made),
            "flops": sum(work.cost.flops for work in made),
            "bytes": sum(work.cost.bytes for work in made),
            "minimum_bytes": sum(work.cost.minimum for work in made),
            "shared_bytes": sum(work.cost.shared for work in made),
            "ms": {gpu: round(1e3 * seconds, 6) for gpu, seconds in total.items()},
            "bound": {gpu: "products" if 2 * products[gpu] > total[gpu] else "memory" for gpu in total},
        }
    return found


def _forbidden(shape: Shape, recorder: Recorder) -> int:
    """Allocations of the size of a row's scores, of all its pairs of spans, or of the teacher's states."""
    spans = [int(COVERED_SHARE * shape.seq_len) // tokens for tokens in (1, 2)]
    squares = {(side, side) for side in (shape.seq_len, *spans, *(shape.batch * count for count in spans))}
    states = shape.batch * shape.seq_len, shape.teacher_dim
    made = [sizes for _, sizes, _ in recorder.allocations if len(sizes) > 1]
    return sum(sizes[-2:] in squares or (math.prod(sizes[:-1]), sizes[-1]) == states for sizes in made)


def summarise(shape: Shape, recorder: Recorder) -> dict[str, Any]:
    """The figures of one shape."""
    kernels, scratch = _kernels(recorder.works), recorder.scratch
    own = [each for name, each in kernels.items() if name not in (GEMM, OTHER)]
    launches = {name: kernels[name]["launches"] for name in ("align", GEMM, OTHER)}
    launches = {"kernels": sum(each["launches"] for each in own) - launches["align"], **launches}
    products = sum(each["flops"] for each in own if each["kernel"] in IMPORTANCE)
    moved = [kernels[name] for name in TRAFFIC]
    over = {each["kernel"]: each["bytes"] / each["minimum_bytes"] for each in moved}
    without = {each["kernel"]: (each["bytes"] + each["shared_bytes"]) / each["minimum_bytes"] for each in moved}
    parts = {"kernels": own, "GEMMs": [kernels[GEMM]], "torch": [kernels[OTHER]], "all": [*kernels.values()]}
    return {
        "shape": asdict(shape),
        "launches_per_pair": {name: count / shape.pairs for name, count in launches.items()},
        "importance_products": products / (2 * shape.pairs * shape.batch * shape.seq_len**2 * shape.teacher_dim),
        "bytes_over_minimum": over,
        "bytes_over_minimum_without_l2": without,
        "forbidden_allocations": _forbidden(shape, recorder),
        "largest_allocation": dict(zip(("bytes", "shape", "dtype"), max(recorder.allocations), strict=True)),
        "scratch_bytes": dict(scratch),
        "importance_scratch_per_row": scratch["layer_weights"] // shape.batch,
        "ms": {
            part: {gpu.name: round(sum(each["ms"][gpu.name] for each in of), 6) for gpu in GPUS}
            for part, of in parts.items()
        },
        "kernels": [*kernels.values()],
    }


def targets(shapes: Sequence[dict[str, Any]]) -> list[Entry]:
    """What the kernels must reach."""
    made = []
    for each in shapes:
        seq_len = each["shape"]["seq_len"]
        most = 1.0 if seq_len <= 256 else 1 + 128 / seq_len
        what = f"importance products / one S x S x d_T product, {each['shape']['name']}"
        made.append(entry(what, [each["importance_products"]], target=f"<= {most:g}"))
    for name in TRAFFIC:
        worst = max(each["bytes_over_minimum"][name] for each in shapes)
        made.append(entry(f"bytes / minimum, {name}, worst shape", [worst], target="<= 1.3"))
    first = shapes[0]
    ms = {part: on["H100"] for part, on in first["ms"].items()}
    what = f"{first['shape']['name']} on H100, all pairs: own kernels and GEMMs (torch's other launches: {ms['torch']})"
    launches = max(
        each["launches_per_pair"]["kernels"] for each in shapes[:2]
    )  # larger ones are done in groups of rows
    forbidden = sum(each["forbidden_allocations"] for each in shapes)
    return [
        *made,
        entry(what, [round(ms["kernels"] + ms["GEMMs"], 6)], "ms", "< 0.4"),
        entry("own launches per layer pair beside align, first two shapes", [launches], "launches", "<= 14"),
        entry("tensors [S, S], [spans, spans] or [tokens, d_T] made", [forbidden], "tensors", "<= 0"),
    ]


def _markdown(content: dict[str, Any], reached: Sequence[Entry]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in content["about"].items())
    lines = ["# Modelled, not measured", "", f"{versions}.", "", *(f"- {text}" for text in ASSUMPTIONS)]
    lines += [f"- {gpu.name}: {gpu.sheet}." for gpu in GPUS]
    judged = [[each.what, each.target, f"{each.median:.4g} {each.unit}", each.verdict] for each in reached]
    lines += ["", "## Targets", "", *markdown_table(("figure", "target", "modelled", "reached"), judged), ""]
    lines += ["## Shapes", "", *_shape_tables(content["shapes"])]
    lines += ["## Base loss through the LM heads", "", heads.TEXT, "", *heads.table(content["heads"]), ""]
    for made in content["shapes"]:
        lines += [f"## {made['shape']['name']}", "", *_kernel_table(made), ""]
    return "\n".join(lines)


def _shape_tables(shapes: Sequence[dict[str, Any]]) -> list[str]:
    work, memory, times = [], [], []
    for made in shapes:
        name, *sizes = made["shape"].values()
        counts = (f"{made['launches_per_pair'][part]:g}" for part in ("kernels", "align", GEMM, OTHER))
        over = zip(*(made[f"bytes_over_minimum{l2}"].values() for l2 in ("", "_without_l2")), strict=True)
        traffic = (f"{with_l2:.2f} ({without:.2f})" for with_l2, without in over)
        work.append([name, *sizes, *counts, f"{made['importance_products']:.4f}", *traffic])
        scratch = (f"{made['scratch_bytes'][op] / 1e6:.2f}" for op in SCRATCH_OPS)
        size, *kind = made["largest_allocation"].values()
        largest = f"{kind[0]} {kind[1]}, {size / 1e6:.1f}"
        memory.append([name, *scratch, f"{made['importance_scratch_per_row']:,}", largest])
        times += [[name, part, *(f"{value:.3f}" for value in ms.values())] for part, ms in made["ms"].items()]
    head = "shape", "B", "S", "d_S", "d_T", "pairs", "own launches a pair", "align", "GEMMs", "torch launches beside"
    over_minimum = (f"{name}: bytes / minimum (without L2)" for name in TRAFFIC)
    scratch_head = (f"scratch of {op}, MB" for op in SCRATCH_OPS)
    memory_head = ("shape", *scratch_head, "importance scratch, bytes a row", "largest tensor made, MB")
    lines = [*markdown_table((*head, "importance products", *over_minimum), work), ""]
    lines += [*markdown_table(memory_head, memory), ""]
    return [*lines, *markdown_table(("shape", "ms, modelled", *(gpu.name for gpu in GPUS)), times), ""]


def _kernel_table(made: dict[str, Any]) -> list[str]:
    lines = [
        [each["kernel"], each["products"], each["launches"], f"{each['flops'] / 1e9:.2f}"]
        + [f"{each[name] / 1e6:.1f}" for name in ("bytes", "minimum_bytes")]
        + [f"{ms:.4f} {each['bound'][gpu]}" for gpu, ms in each["ms"].items()]
        for each in made["kernels"]
    ]
    head = ("kernel", "products in", "launches", "GFLOP", "MB", "minimum MB", *(f"{gpu.name}, ms" for gpu in GPUS))
    return markdown_table(head, lines)


def measure() -> Report:
    """Every shape.

    Raises:
        BackendUnavailableError: the kernels are interpreted.
    """
    if INTERPRETED:
        raise BackendUnavailableError(
            "bench model: expected the kernels as they are compiled, got TRITON_INTERPRET=1; unset it"
        )
    shapes = [summarise(shape, record(shape)) for shape in SHAPES]
    of_heads = [heads.summarise(shape) for shape in heads.SHAPES]
    reached = [*targets(shapes), *heads.targets(of_heads)]
    about = {"mta_fast": __version__, "torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    gpus, rows = ([asdict(each) for each in of] for of in (GPUS, reached))
    content = {"about": about, "gpus": gpus, "rows": rows, "shapes": shapes, "heads": of_heads}
    sections = [Section("Targets", reached)]
    return Report("mta-fast bench model", about, sections, content=content, text=_markdown(content, reached))
