"""What this installation can do: versions, devices, backends, and why something is missing.

Runs without the command line's packages too: ``python -m mta_fast.doctor``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

import numpy as np
import torch

from mta_fast import _extension
from mta_fast._version import __version__
from mta_fast.backends import BACKENDS, OPS, Backend
from mta_fast.packages import install_command
from mta_fast.spans import align
from mta_fast.spans.extract import DEFAULT_MODEL, DEFAULT_MODEL_ON_PYPI

# package -> the extra that brings it, and what needs it
OPTIONAL = {
    "transformers": ("train", "layer capture and tokenizers"),
    "spacy": ("spacy", "span extraction"),
    "datasets": ("train", "data sets"),
    "accelerate": ("train", "the trainer"),
    "peft": ("train", "LoRA students"),
    "tensorboard": ("train", "report_to: tensorboard"),
    "yaml": ("train", "settings in YAML"),
    "typer": ("train", "the command line"),
    "matplotlib": ("train", "pictures"),
    "rouge_score": ("train", "mta-fast eval"),
    "scipy": ("train", "intervals of mta-fast ablate"),
    "triton": ("triton", "fused GPU kernels"),
}
_DISTRIBUTIONS = {"yaml": "pyyaml", "rouge_score": "rouge-score"}


def report() -> str:
    """The whole report, one fact a line."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield f"mta_fast {__version__}"
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} CPU threads"
    yield from _devices()
    if info := _extension.build_info():
        yield f"C++ kernels {info}"
    yield "backends"
    for name, backend in BACKENDS.items():
        yield f"  {name}: {_state(backend)}"
    yield f"span alignment: {align.choose()}"
    yield "packages"
    for package, (extra, purpose) in OPTIONAL.items():
        yield f"  {package}: {_version(package) or f'missing ({purpose}); {install_command(extra)}'}"
    yield f"  spaCy model: {_spacy_model()}"


def _state(backend: Backend) -> str:
    """The devices that a backend is ready for, or why it is ready for none."""
    ready: list[str] = []
    reasons: list[str] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        sample = [torch.empty(0, device=device)]
        against = {reason for op in OPS for reason in backend.reasons_against(op, sample)}
        avoided = {reason for op in OPS for reason in backend.reasons_to_avoid(op, sample)}
        if against:
            reasons += sorted(against - set(reasons))
        else:
            ready.append(f"{device} tensors" + "".join(f" (by name only: {why})" for why in sorted(avoided)))
    return f"ready for {', '.join(ready)}" if ready else "; ".join(reasons)


def _devices() -> Iterator[str]:
    if torch.cuda.is_available():
        kind = "ROCm" if torch.version.hip else "CUDA"
        for index in range(torch.cuda.device_count()):
            yield f"device {kind} {index}: {torch.cuda.get_device_name(index)}"
    elif torch.version.cuda or torch.version.hip:
        yield "device: CPU only (torch is built for GPUs, but no device or driver answers)"
    else:
        yield "device: CPU only (this torch is built without CUDA and ROCm)"


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:  # from a distribution of another name, as ROCm's triton
        version: str = importlib.import_module(package).__version__
        return version


def _spacy_model() -> str:
    for name in (DEFAULT_MODEL, DEFAULT_MODEL_ON_PYPI):
        if importlib.util.find_spec(name) is not None:
            return f"{name} {importlib.metadata.version(name)}"
    return f"missing; python -m spacy download {DEFAULT_MODEL}, or {install_command('spacy')}"


if __name__ == "__main__":
    print(report())
