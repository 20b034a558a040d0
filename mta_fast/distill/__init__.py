"""Distillation around the MTA loss: data, base losses, models, the trainer and what it leaves on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mta_fast.distill.arguments import MTATrainingArguments
    from mta_fast.distill.distillm import DistiLLM
    from mta_fast.distill.distillm2 import DistiLLM2
    from mta_fast.distill.fdd import FDD
    from mta_fast.distill.methods import BaseMethod
    from mta_fast.distill.trainer import MTATrainer

__all__ = ["FDD", "BaseMethod", "DistiLLM", "DistiLLM2", "MTATrainer", "MTATrainingArguments"]
_HOMES = {
    "BaseMethod": "mta_fast.distill.methods",
    "DistiLLM": "mta_fast.distill.distillm",
    "DistiLLM2": "mta_fast.distill.distillm2",
    "FDD": "mta_fast.distill.fdd",
    "MTATrainer": "mta_fast.distill.trainer",
    "MTATrainingArguments": "mta_fast.distill.arguments",
}


def __getattr__(name: str) -> Any:
    """Import transformers' Trainer, which takes seconds, only when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
