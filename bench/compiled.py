"""The reference compiled by inductor, as a backend: what torch makes of the formulas by itself.

``mta_fast/reference.py`` is loaded a second time, and the functions that do the work of a row or a call are
compiled; the loops over rows stay in Python (traced whole, 16 rows would be 16 copies of the code, and every new
batch size a new graph). Compilation happens in the warm-up and is not timed.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mta_fast import backends, reference

NAME = "compiled reference"
_MODULE = "bench._compiled_reference"
_COMPILED = (
    "_row_importance",
    "pool_spans_gradient",
    "_unit",
    "_pairwise",
    "_gram",
    "hidden_alignment",
    "divergence",
    "logit_gradient",
)


@contextmanager
def compiled_reference() -> Iterator[str]:
    """Within it, ``backend="compiled reference"`` is one that can be asked for by name."""
    if _MODULE not in sys.modules:
        sys.modules[_MODULE] = _load()
    made = backends.Backend(NAME, _MODULE, lambda op, tensors: [], lambda op, tensors: ["it is here to be compared"])
    backends.BACKENDS[NAME] = made
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's own deprecations
            yield NAME
    finally:
        del backends.BACKENDS[NAME]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location(_MODULE, reference.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in _COMPILED:
        setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
    return module
