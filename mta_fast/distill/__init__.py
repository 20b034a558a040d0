"""Distillation around the MTA loss: data, base losses, models, the trainer and what it leaves on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mta_fast.distill.arguments import MTATrainingArguments
    from mta_fast.distill.trainer import MTATrainer

__all__ = ["MTATrainer", "MTATrainingArguments"]
_HOMES = {"MTATrainer": "mta_fast.distill.trainer", "MTATrainingArguments": "mta_fast.distill.arguments"}


def __getattr__(name: str) -> Any:
    """Import transformers' Trainer, which takes seconds, only when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
