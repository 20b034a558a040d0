"""Base methods: what a distillation step minimises beside MTA, alone and in the trainer. A file is a method."""

from mta_fast.distill.methods.base import BaseMethod, Batch, ModelOutput, StepBatches, TrainingPlan
from mta_fast.distill.methods.registry import base_method

__all__ = ["BaseMethod", "Batch", "ModelOutput", "StepBatches", "TrainingPlan", "base_method"]
