"""MTATrainingArguments: transformers' TrainingArguments and what MTA adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from mta_fast.choices import check_choice
from mta_fast.errors import InputError
from mta_fast.files import user_source
from mta_fast.projections import RIDGE, STARTS, check_strength
from mta_fast.spans.collate import PAD_TO

PATHS = ("output_dir", "logging_dir", "deepspeed", "fsdp_config", "accelerator_config")
ACCUMULATION = ("keep", "recompute", "micro_batch")

_NO_PREDICTIONS = "evaluation keeps losses, not predictions; mta-fast eval scores what a student writes"
_HALF = "evaluation would leave the student in half precision; bf16 and fp16 hold in evaluation too"
_COMPILED = (
    "the step captures hidden states with hooks. Compile the student itself: student.compile(), or student: "
    "{compile: true} in the YAML"
)
# fields of TrainingArguments that the Trainer of a distillation can't follow: the value they keep, and why
REFUSED: dict[str, tuple[Any, str]] = {
    "torch_compile": (False, _COMPILED),
    "enable_jit_checkpoint": (
        False,
        "it saves in the middle of a step and leaves half a checkpoint where it is killed. mta-fast train saves on "
        "SIGTERM, at the end of the step",
    ),
    "label_smoothing_factor": (0.0, "the base loss compares the models' own distributions; give a base loss"),
    "average_tokens_across_devices": (True, "losses are always those of the whole step, over all ranks"),
    "use_liger_kernel": (False, "its fused loss hides the logits; apply liger's other kernels to the student yourself"),
    "liger_kernel_config": (None, "use_liger_kernel is not followed"),
    "use_cache": (False, "training needs no cache of keys and values"),
    "bf16_full_eval": (False, _HALF),
    "fp16_full_eval": (False, _HALF),
    "include_for_metrics": ([], _NO_PREDICTIONS),
    "batch_eval_metrics": (False, _NO_PREDICTIONS),
    "eval_do_concat_batches": (True, _NO_PREDICTIONS),
    "eval_use_gather_object": (False, _NO_PREDICTIONS),
    "debug": ([], "its hooks stop at a model's masks; torch.autograd.set_detect_anomaly(True) finds what becomes NaN"),
    "label_names": (None, "the collator names the labels; give data_collator=..."),
    "parallelism_config": (None, "spans lie on whole sequences and whole models; shard with FSDP or DeepSpeed"),
    "resume_from_checkpoint": (
        None,
        "the Trainer does not read it; trainer.train(resume_from_checkpoint=...), or --resume",
    ),
}
# arguments of Trainer that MTATrainer does not pass on
REFUSED_OPTIONS: dict[str, str] = {
    "model": "the first argument is the student",
    "model_init": "MTATrainer takes models; make the student first",
    "compute_loss_func": "write a BaseMethod and give base_loss=..., as docs/extending.md shows",
    "compute_metrics": _NO_PREDICTIONS,
    "preprocess_logits_for_metrics": _NO_PREDICTIONS,
}
# of TrainingArguments for scripts that hold the arguments; nothing here reads them
FOR_SCRIPTS = ("do_train", "do_eval", "do_predict", "local_rank")
# what a budget of tokens decides in their place
WITHOUT_BUDGET = (
    "per_device_train_batch_size",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "auto_find_batch_size",
)
OF_RIDGE = ("projection_init_ridge", "projection_init_rows")
# the projections' learning rate is that of a group, which these don't have
WITHOUT_GROUPS = (
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
)
WITHOUT_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse arguments of Trainer that would have no effect.

    Raises:
        InputError: names the argument and what does it instead.
    """
    for name, why in REFUSED_OPTIONS.items():
        if options.get(name) is not None:
            raise InputError(f"{name}: expected none, as MTATrainer does not follow it: {why}")


@dataclass
class MTATrainingArguments(TrainingArguments):
    """Every field of ``TrainingArguments``, and these.

    Attributes:
        max_length: tokens a row is truncated to (by the collator that MTATrainer makes).
        pad_to: "longest": rows are padded to the longest of their batch; "max_length": to that many tokens, as the
            public scripts do. None: the latter where ``MTAConfig.count_padding`` makes the loss depend on it.
        padding_free: the rows of a batch lie one behind the other in [1, T] in place of being padded; for models whose
            attention keeps them apart, which a probe finds out before training. Same losses and gradients.
        max_tokens_per_batch: batches of rows of like length, as many as fit into so many of the student's tokens,
            padding included; in place of per_device_train_batch_size.
        projection_learning_rate: learning rate of the projections of Hid (paper: 5e-4).
        projection_init: where the projections of Hid start. "default": at nn.Linear's random numbers, or as the MTALoss
            that MTATrainer is given has them. "identity": the features that both models have are copied, in their
            order (of unequal widths: as many as the narrower has; further ones get 0). "ridge": where ridge regression
            maps the student's states onto the teacher's, on some training rows (``MTALoss.fit_projections``); the
            order of the data and all random numbers stay those of a run without it. Not with FSDP or DeepSpeed.
        projection_init_ridge: strength r of the latter; projection_init_rows: how many training rows it reads, over all
            ranks, drawn by the seed; of a stream the first.
        accumulation: how "batch" normalisation spans the micro-batches of a step. "keep": exact; the teacher runs
            on all of them first and its outputs are kept (memory: gradient_accumulation_steps times its logits and
            chosen hidden states). "recompute": exact; the teacher runs twice. "micro_batch": each micro-batch by
            itself, then the mean; not the gradient of the big batch. Without accumulation all are the same and
            cost nothing. Several ranks are always exact (one all-reduce of [L, 2] numbers a step).
        log_gradient_norms: at logging steps, also the norm of the gradient that base, lambda_dsa DSA and lambda_hid
            Hid each leave on the student (of this rank's first micro-batch); costs three more backward passes.
        fused_head: make base losses of the states before the LM heads, without logits of all positions, where the
            models' heads can be taken apart (else a warning says why not) and the base method reads them
            (``BaseMethod.reads_heads``; one's own reads logits unless it says so). False: of the logits.
        max_seconds: stop after the step in which so many seconds of training are reached (evaluation and saving not
            counted), for a comparison at equal time. The learning rate then follows the clock, warm-up as a ratio, and
            num_train_epochs is only an upper bound.
    """

    max_length: int = field(default=256, metadata={"help": "tokens a row is truncated to"})
    pad_to: str | None = field(default=None, metadata={"help": f"one of {', '.join(PAD_TO)}"})
    padding_free: bool = field(default=False, metadata={"help": "pack the rows of a batch in place of padding them"})
    max_tokens_per_batch: int | None = field(default=None, metadata={"help": "tokens of a batch, padding included"})
    projection_learning_rate: float = field(default=5e-4, metadata={"help": "learning rate of Hid's projections"})
    projection_init: str = field(default="default", metadata={"help": f"one of {', '.join(STARTS)}"})
    projection_init_ridge: float = field(default=RIDGE, metadata={"help": "strength of projection_init ridge"})
    projection_init_rows: int = field(default=64, metadata={"help": "training rows that projection_init ridge reads"})
    accumulation: str = field(default="keep", metadata={"help": f"one of {', '.join(ACCUMULATION)}"})
    log_gradient_norms: bool = field(default=False, metadata={"help": "log the gradient norm of each term"})
    fused_head: bool = field(default=True, metadata={"help": "make base losses of states and LM heads, without logits"})
    max_seconds: float | None = field(default=None, metadata={"help": "stop after so many seconds of training"})

    def __post_init__(self) -> None:
        for name in PATHS:
            value = getattr(self, name, None)
            if isinstance(value, (str, Path)):
                setattr(self, name, user_source(str(value)))
        super().__post_init__()
        self.remove_unused_columns = False  # the collator reads texts and spans, not the model's arguments
        check_choice("accumulation", self.accumulation, ACCUMULATION)
        self._check_start()
        if self.pad_to is not None:
            check_choice("pad_to", self.pad_to, PAD_TO, "none")
            if self.padding_free:
                raise InputError(f"pad_to: expected none beside padding_free, got {self.pad_to!r}; there is no padding")
        if self.max_tokens_per_batch is not None:
            self._check_budget()
        if self.max_seconds is not None:
            if not self.max_seconds > 0:
                raise InputError(f"max_seconds: expected a time > 0, got {self.max_seconds}")
            if self.warmup_steps >= 1:
                raise InputError(
                    f"warmup_steps: expected a ratio below 1 beside max_seconds, got {self.warmup_steps}; the learning "
                    f"rate follows the clock, not the steps"
                )
        self._refuse_what_has_no_effect()
        if self.n_gpu > 1:
            raise InputError(
                f"GPUs: expected one a process, got {self.n_gpu} in this one; start with torchrun or accelerate "
                f"launch, or set CUDA_VISIBLE_DEVICES"
            )

    def _check_start(self) -> None:
        """Refuse a start of the projections that there is not, and options of one that isn't asked for."""
        check_choice("projection_init", self.projection_init, STARTS)
        check_strength("projection_init_ridge", self.projection_init_ridge)
        rows = self.projection_init_rows
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise InputError(f"projection_init_rows: expected a number of rows >= 1, got {rows!r}")
        for f in fields(self):
            if f.name in OF_RIDGE and self.projection_init != "ridge" and (value := getattr(self, f.name)) != f.default:
                raise InputError(
                    f"{f.name}: expected its default beside projection_init {self.projection_init!r}, which reads no "
                    f"rows, got {_said(value)}; leave it out, or set projection_init to 'ridge'"
                )

    def _check_budget(self) -> None:
        """Refuse a budget below a token, and what it leaves without an effect."""
        if isinstance(self.max_tokens_per_batch, bool) or not self.max_tokens_per_batch >= 1:  # type: ignore[operator]  # asked by who knows it
            raise InputError(f"max_tokens_per_batch: expected a number of tokens, got {self.max_tokens_per_batch!r}")
        for f in fields(self):
            if f.name in WITHOUT_BUDGET and (value := getattr(self, f.name)) != f.default:
                raise InputError(
                    f"{f.name}: expected its default beside max_tokens_per_batch, whose batches are rows of like "
                    f"length in random order, got {_said(value)}; leave it out"
                )

    def _refuse_what_has_no_effect(self) -> None:
        for name, (kept, why) in REFUSED.items():
            value = getattr(self, name, kept)
            if value != kept:
                raise InputError(f"{name}: expected {_said(kept)}, got {_said(value)}; {why}")
        optimizer = str(self.optim.value)
        if optimizer in WITHOUT_GROUPS:
            raise InputError(
                f"optim: expected an optimiser with groups, got {optimizer!r}, in which projection_learning_rate has "
                f"no effect"
            )
        if self.optim_args and optimizer in WITHOUT_OPTIM_ARGS:
            raise InputError(f"optim_args: expected none, got {self.optim_args!r}; {optimizer} reads none")
        if self.optim_target_modules is not None and not optimizer.startswith(("galore", "apollo")):
            raise InputError(
                f"optim_target_modules: expected none, got {self.optim_target_modules!r}; {optimizer} trains all "
                f"modules (galore_* and apollo_* read it)"
            )
        config = self.accelerator_config
        if not config.even_batches:
            raise InputError(
                "accelerator_config: expected even_batches true, got false; ranks with unequal numbers of batches "
                "would wait for each other for ever"
            )
        if config.dispatch_batches:
            raise InputError(
                "accelerator_config: expected dispatch_batches false, got true; batches of unequal lengths can't be "
                "sent in pieces, so every rank reads its own rows"
            )
        config.dispatch_batches = False


def _said(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else repr(value)
    )
