"""Distillation around the MTA loss: base methods, the training, generated responses, data and models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mta_fast.distill._moved import find_moved

if TYPE_CHECKING:
    from mta_fast.distill.methods.base import BaseMethod
    from mta_fast.distill.methods.distillm import DistiLLM
    from mta_fast.distill.methods.distillm2 import DistiLLM2
    from mta_fast.distill.methods.fdd import FDD
    from mta_fast.distill.training.arguments import MTATrainingArguments
    from mta_fast.distill.training.caching import TeacherCache
    from mta_fast.distill.training.trainer import MTATrainer

__all__ = ["FDD", "BaseMethod", "DistiLLM", "DistiLLM2", "MTATrainer", "MTATrainingArguments", "TeacherCache"]
_HOMES = {
    "BaseMethod": "mta_fast.distill.methods.base",
    "DistiLLM": "mta_fast.distill.methods.distillm",
    "DistiLLM2": "mta_fast.distill.methods.distillm2",
    "FDD": "mta_fast.distill.methods.fdd",
    "MTATrainer": "mta_fast.distill.training.trainer",
    "MTATrainingArguments": "mta_fast.distill.training.arguments",
    "TeacherCache": "mta_fast.distill.training.caching",
}
find_moved()


def __getattr__(name: str) -> Any:
    """Import transformers' Trainer, which takes seconds, only when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
