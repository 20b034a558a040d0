"""MTATrainingArguments: transformers' TrainingArguments and what MTA adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from mta_fast.errors import InputError

ACCUMULATION = ("keep", "recompute", "micro_batch")


@dataclass
class MTATrainingArguments(TrainingArguments):
    """Every field of ``TrainingArguments``, and these.

    Attributes:
        max_length: tokens a row is truncated to (by the collator that MTATrainer makes).
        projection_learning_rate: learning rate of the projections of Hid (paper: 5e-4).
        accumulation: how "batch" normalisation spans the micro-batches of a step. "keep": exact; the teacher runs
            on all of them first and its outputs are kept (memory: gradient_accumulation_steps times its logits and
            chosen hidden states). "recompute": exact; the teacher runs twice. "micro_batch": each micro-batch by
            itself, then the mean; not the gradient of the big batch. Without accumulation all are the same and
            cost nothing. Several ranks are always exact (one all-reduce of [L, 2] numbers a step).
        log_gradient_norms: at logging steps, also the norm of the gradient that base, lambda_dsa DSA and lambda_hid
            Hid each leave on the student (of this rank's first micro-batch); costs three more backward passes.
        max_seconds: stop after the step in which so many seconds of training are reached (evaluation and saving not
            counted), for a comparison at equal time. The learning rate then follows the clock, warm-up as a ratio, and
            num_train_epochs is only an upper bound.
    """

    max_length: int = field(default=256, metadata={"help": "tokens a row is truncated to"})
    projection_learning_rate: float = field(default=5e-4, metadata={"help": "learning rate of Hid's projections"})
    accumulation: str = field(default="keep", metadata={"help": f"one of {', '.join(ACCUMULATION)}"})
    log_gradient_norms: bool = field(default=False, metadata={"help": "log the gradient norm of each term"})
    max_seconds: float | None = field(default=None, metadata={"help": "stop after so many seconds of training"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False  # the collator reads texts and spans, not the model's arguments
        if self.accumulation not in ACCUMULATION:
            raise InputError(f"accumulation: expected one of {', '.join(ACCUMULATION)}, got {self.accumulation!r}")
        if self.max_seconds is not None:
            if not self.max_seconds > 0:
                raise InputError(f"max_seconds: expected a time > 0, got {self.max_seconds}")
            if self.warmup_steps >= 1:
                raise InputError(
                    f"warmup_steps: expected a ratio below 1 beside max_seconds, got {self.warmup_steps}; the learning "
                    f"rate follows the clock, not the steps"
                )
        if self.enable_jit_checkpoint:
            raise InputError(
                "enable_jit_checkpoint: expected false, got true; it saves in the middle of a step and leaves half a "
                "checkpoint where it is killed. mta-fast train saves on SIGTERM, at the end of the step"
            )
        if self.torch_compile:
            raise InputError(
                "torch_compile: expected false, got true; the step captures hidden states with hooks. Compile the "
                "student itself: student.compile(), or student: {compile: true} in the YAML"
            )
        if self.n_gpu > 1:
            raise InputError(
                f"GPUs: expected one a process, got {self.n_gpu} in this one; start with torchrun or accelerate "
                f"launch, or set CUDA_VISIBLE_DEVICES"
            )
