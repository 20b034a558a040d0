"""MTATrainer: transformers' Trainer with a teacher, a base loss and MTA.

Accelerate, DDP, FSDP2, DeepSpeed, mixed precision, accumulation, schedules and reporting are the Trainer's. This
file adds: the teacher's pass, exact denominators over the step, the projections' optimiser group and what is logged;
``saving`` adds checkpoints that are whole or absent.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from mta_fast.config import MTAConfig
from mta_fast.distill.methods.base import BaseMethod, NoBaseLoss, TrainingPlan
from mta_fast.distill.methods.registry import base_method
from mta_fast.distill.teacher.live import TeacherOutput
from mta_fast.distill.training import checkpoints, fingerprint
from mta_fast.distill.training.arguments import MTATrainingArguments, check_options
from mta_fast.distill.training.budget import check_budget
from mta_fast.distill.training.caching import TeacherCache, loss_for, without_spans
from mta_fast.distill.training.feeding import FILLER, WithoutFillers, check_stream, is_stream
from mta_fast.distill.training.fit import check_room
from mta_fast.distill.training.fitness import GradientsArrive, check_models, check_optimizer
from mta_fast.distill.training.joining import (
    check_padding_side,
    distillation_model,
    num_embeddings_of,
    span_collator,
    trimmed_ids,
    with_teacher_ids,
)
from mta_fast.distill.training.log import TERMS, EvaluationSums, StepEnd, TrainingLog
from mta_fast.distill.training.module import DistillationOutput, StepTotals, teacher_side
from mta_fast.distill.training.packing import check_joined
from mta_fast.distill.training.starting import start_at_identity, start_by_ridge, start_of
from mta_fast.distill.training.teaching import TeacherPass
from mta_fast.errors import InputError
from mta_fast.files import user_path
from mta_fast.loss import MTALoss
from mta_fast.spans.batch import SpanBatch
from mta_fast.spans.extract import SpanExtractor
from mta_fast.spans.lazy import LazySpans

CLOCK_TICKS = 10_000  # of a learning-rate schedule that follows the clock
Batch = dict[str, Any]


class MTATrainer(TeacherPass):
    """Distils a student from a teacher with a base loss and MTA.

    Args:
        student: a causal language model of transformers, or one wrapped by PEFT.
        teacher: likewise, of any floating dtype; frozen and moved to the training device. None where nothing of it is
            read (no MTA, and cross_entropy as the base loss), or all of it from ``teacher_cache``.
        mta: an MTAConfig (the widths are then read from the models), an MTALoss, or None for the base loss alone.
        args: MTATrainingArguments.
        processing_class: the student's fast tokenizer, saved beside it.
        teacher_tokenizer: the teacher's, where it differs. The two then see their own tokens, MTA compares spans,
            and the base loss is None or a sequence-level one. Where the student's is the teacher's with fewer tokens
            (``students.vocabulary``), both read the same tokens under their own ids, and every base loss compares the
            two over the student's.
        base_loss: a BaseMethod, its name as in ``methods.registry.base_method``, or None: MTA alone.
        base_loss_options: such as {"alpha": 0.1}.
        teacher_cache: where the teacher's states are read from; rows that are not there are run by ``teacher`` and
            added, or refused where it is None.
        span_extractor: for text that the student writes during training (DistiLLM with MTA); parses in processes of
            its own.
        train_dataset, eval_dataset: rows with "prompt", "output", "word_spans" and "phrase_spans"; for DistiLLM-2 as
            PairCollator reads them.
        data_collator: makes a batch in place of the trainer's SpanCollator; the base method may wrap or refuse it.
        options: passed to ``Trainer``.

    Raises:
        InputError: models, tokenizers and base loss that don't fit together, with the reason.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        mta: MTAConfig | MTALoss | None,
        args: MTATrainingArguments,
        *,
        processing_class: Any,
        teacher_tokenizer: Any = None,
        base_loss: str | BaseMethod | None = "srkl",
        base_loss_options: Mapping[str, Any] | None = None,
        teacher_cache: TeacherCache | None = None,
        span_extractor: SpanExtractor | None = None,
        data_collator: Any = None,
        **options: Any,
    ) -> None:
        check_options(options)
        other_tokenizer, teacher_ids = trimmed_ids(processing_class, teacher_tokenizer)
        if teacher_ids is None:
            teacher_tokenizer = other_tokenizer
        set_seed(args.seed)  # before the projections are made; Trainer sets it again
        method = base_method(base_loss, **(base_loss_options or {})) if isinstance(base_loss, str) else base_loss
        method = NoBaseLoss() if method is None else method
        if method.name is None and mta is None:
            raise InputError(
                "base_loss: expected a base loss or an MTA config, got neither; there is nothing to train on"
            )
        if teacher is None and teacher_cache is not None:
            teacher = teacher_cache.stored_teacher(with_head=method.reads_teacher)
        if teacher is None and (mta is not None or method.reads_teacher):
            raise InputError(
                "teacher: expected a model, got none; without one there is no MTA, and the base loss is cross_entropy"
            )
        check_models(student, teacher, mta)
        if isinstance(mta, MTAConfig):
            assert teacher is not None
            mta = loss_for(student, teacher, mta)
        for side, network in (("student", student), ("teacher", teacher)):
            if network is not None:
                own = teacher_tokenizer if side == "teacher" and teacher_tokenizer is not None else processing_class
                check_room(side, network, own, args.max_length)
        model = distillation_model(student, teacher, mta, method, processing_class, other_tokenizer, teacher_ids)
        kinds = sorted(set(mta.config.granularity)) if mta is not None else ()
        if data_collator is None:
            known = num_embeddings_of(student, teacher if teacher_tokenizer is None else None)
            data_collator = span_collator(processing_class, other_tokenizer, mta, args, num_embeddings=known)
        data_collator = with_teacher_ids(data_collator, teacher_ids)
        check_joined(args.padding_free, None if mta is None else mta.config, method, data_collator)
        check_padding_side(student, teacher, processing_class, other_tokenizer)
        collator = method.collator(data_collator)
        self._unaligned = method.collator(without_spans(data_collator))  # of a cache's rows
        self._batches = method.batches(collator, span_extractor if kinds else None)
        self.model_fingerprint = fingerprint.of_models(student, teacher, method, teacher_tokenizer)
        options["data_collator"] = WithoutFillers(collator) if args.world_size > 1 else collator
        check_stream(options.get("train_dataset"), args)
        if args.max_tokens_per_batch is not None:
            check_budget(method, self._batches, collator, streamed=is_stream(options.get("train_dataset")))
        check_optimizer(options.get("optimizers", (None, None))[0], student, mta)
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        super().__init__(model=model, args=args, processing_class=processing_class, **options)
        self.args: MTATrainingArguments = args
        if args.log_gradient_norms and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError(
                "log_gradient_norms: expected whole gradients, got sharded ones (FSDP or DeepSpeed); set it to false"
            )
        sharded, evaluates = self.is_fsdp_enabled or self.is_deepspeed_enabled, args.eval_strategy.value != "no"
        start = start_of(mta, args, sharded=sharded)
        if start == "identity" and mta is not None:
            start_at_identity(mta)
        self._starts_by_ridge = start == "ridge"
        self._batches.check(
            TrainingPlan(student, kinds, self.train_dataset, self.eval_dataset, evaluates=evaluates, sharded=sharded)
        )
        method.reduce = self._sum_over_ranks
        if teacher_cache is not None:
            self.model_fingerprint["teacher_cache"] = teacher_cache.dtype
        self._totals: StepTotals | None = None
        self._teacher_outputs: deque[TeacherOutput] = deque()
        self._prepare_teacher(teacher_cache)
        self._log = TrainingLog(args.device)
        self._evaluated: EvaluationSums | None = None
        self._module.stopwatch = self._log.mta
        self.add_callback(StepEnd(self._log, self._seconds_of_all))
        if not sharded:
            self.add_callback(GradientsArrive(student, mta))

    # --- one optimisation step -----------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Fetch the micro-batches of a step and find what their losses are divided by."""
        self._log.begin_step()
        module = self._module
        module.base.progress = self._progress(further=int(module.base.counts_step))
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        with self.accelerator.autocast():
            batches = [
                self._batches.batch(module.student, batch, self._micro_batch_seed(i), device)
                for i, batch in enumerate(batches)
            ]
        if not batches:
            return batches, torch.zeros((), device=device)
        counts = torch.stack([module.counts(batch) for batch in batches]).sum(0)
        base = self._sum_over_ranks(counts.to(device))
        totals = StepTotals(base, reduce=self._sum_over_ranks, scale=float(self.args.world_size))
        self._teacher_outputs.clear()
        if len(batches) > 1 and self._module.mta is not None:
            if self.args.accumulation == "micro_batch":
                totals.mta_scale = 1 / len(batches)
            else:
                totals.mta = self._step_denominators(batches)
        self._totals = totals
        return batches, totals.base.sum()

    def _progress(self, further: int = 0) -> float:
        """How much of the training is done: steps, or time where that is what ends it; after so many further steps."""
        done = self.state.global_step
        if self.args.max_seconds is not None:  # a step is as long as the mean of those before
            return min(1.0, self._seconds_of_all() * (1 + further / max(1, done)) / self.args.max_seconds)
        return (done + further) / max(1, self.state.max_steps)

    def _seconds_of_all(self) -> float:
        """The mean of the ranks' clocks: what all of them stop by and take their learning rate from."""
        own = torch.tensor(self._log.total_seconds, dtype=torch.float64, device=self.args.device)
        return float(self._sum_over_ranks(own)) / self.args.world_size

    def _micro_batch_seed(self, micro_batch: int) -> int:
        """Of what is drawn for a micro-batch: the same in a run that was resumed."""
        place = (self.state.global_step * self.args.gradient_accumulation_steps + micro_batch) * self.args.world_size
        return (self.args.seed << 32) + place + self.args.process_index

    def _step_denominators(self, batches: list[Batch]) -> Tensor:
        """[L, 2] summed over the micro-batches and ranks; the teacher runs on all of them first."""
        mta = self._module.mta
        assert mta is not None
        keep = self.args.accumulation == "keep"
        sums: list[Tensor] = []
        for batch in batches:
            batch = self._prepare_inputs(batch)
            if keep:
                teacher = self._teach(batch)
                self._log.mta.start()
            else:  # this pass is there for MTA alone
                self._log.mta.start()
                teacher = self._teach(batch)
            sums.append(mta.denominators(**teacher_side(_with_spans(batch), teacher)))
            self._log.mta.stop()
            if keep:
                self._teacher_outputs.append(teacher)
        return self._sum_over_ranks(torch.stack(sums).sum(0))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's share of the step's loss; over micro-batches and ranks it sums to the whole."""
        totals = self._totals
        if totals is None or not model.training:
            totals = StepTotals(self._module.counts(inputs), reduce=lambda own: own)
        kept = model.training and self._teacher_outputs
        teacher = self._teacher_outputs.popleft() if kept else self._teach(inputs)
        inputs = _with_spans(inputs)  # after the teacher's pass: what is parsed meanwhile is ready
        output: DistillationOutput = model(inputs, teacher, totals)
        if model.training:
            self._log.add(output)
            if self.args.log_gradient_norms and self._log.wants_norms(self.state, self.args):
                self._log.norms = self._gradient_norms(output)
        return (output.loss, output) if return_outputs else output.loss

    def _gradient_norms(self, output: DistillationOutput) -> dict[str, float]:
        """Norm of the gradient of each weighted term on the student's parameters."""
        module = self._module
        config = None if module.mta is None else module.mta.config
        weights = (1.0, config.lambda_dsa, config.lambda_hid) if config is not None else (1.0, 0.0, 0.0)
        parameters = [p for p in module.student.parameters() if p.requires_grad]
        self._log.mta.pause()
        norms = {}
        for name, term, weight in zip(TERMS, (output.base, output.dsa, output.hid), weights, strict=True):
            gradients: tuple[Tensor | None, ...] = ()
            if weight and term.requires_grad:
                gradients = torch.autograd.grad(weight * term, parameters, retain_graph=True, allow_unused=True)
            squares = [g.float().square().sum() for g in gradients if g is not None]
            norms[f"grad_norm_{name}"] = torch.stack(squares).sum().sqrt().item() if squares else 0.0
        self._log.mta.resume()
        return norms

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on every rank; with one process the values themselves."""
        return self.accelerator.reduce(values, reduction="sum")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the projections in groups of their own learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        mta = self._module.mta
        if not made or mta is None or not hasattr(optimizer, "add_param_group"):
            return optimizer
        projections = set(mta.parameters())
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if p in projections]
            if own:
                group["params"] = [p for p in group["params"] if p not in projections]
                optimizer.add_param_group({**group, "params": own, "lr": self.args.projection_learning_rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The Trainer's schedule; it follows the clock where that is what ends the training."""
        if self.args.max_seconds is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = super().create_scheduler(CLOCK_TICKS, optimizer)
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            raise InputError(
                f"lr_scheduler_type: expected a schedule that is a function of the progress beside max_seconds, got "
                f"{self.args.lr_scheduler_type!r}; linear and cosine are"
            )
        schedule.lr_lambdas = [functools.partial(self._at_the_clock, rate) for rate in schedule.lr_lambdas]
        return schedule

    def _at_the_clock(self, rate: Callable[[int], float], step: int) -> float:
        """What a schedule of CLOCK_TICKS steps gives now, whatever the step."""
        return rate(int(CLOCK_TICKS * self._progress()))

    # --- logging -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also the three terms (unweighted means over the logged steps) and the share of MTA in the step's time."""
        if "loss" in logs and self._log.steps:
            logs |= self._log.drain(self._sum_over_ranks)
            logs |= self._batches.logs()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """The Trainer's; the base method sees the loss that it follows."""
        metrics: dict[str, float] = super().evaluate(*args, **options)
        own = not args and options.get("eval_dataset") is None
        if own and "eval_base" in metrics:
            self._module.base.observe_validation(metrics.get("eval_validation", metrics["eval_base"]))
        return metrics

    @property
    def train_seconds(self) -> float:
        """Wall-clock time of all steps so far, a resumed run's earlier ones too; without evaluation and saving."""
        return self._log.total_seconds

    def final_losses(self) -> dict[str, float]:
        """eval_loss, eval_base, eval_dsa and eval_hid of the student as it is; none without an evaluation set."""
        if self.eval_dataset is None:
            return {}
        step, best = self.state.global_step, self.state.best_global_step
        shown = [entry for entry in self.state.log_history if entry["step"] == step and "eval_loss" in entry]
        other = self.args.load_best_model_at_end and best != step  # in memory is the best checkpoint
        metrics = shown[-1] if shown and not other else self.evaluate()
        return {name: metrics[name] for name in ("eval_loss", *(f"eval_{term}" for term in TERMS)) if name in metrics}

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **options: Any) -> Any:
        """The Trainer's loop; the losses are those of the whole set, whatever the batch size and number of ranks."""
        prefix = options.get("metric_key_prefix", "eval")
        self._evaluated = EvaluationSums()
        try:
            output = super().evaluation_loop(dataloader, description, *args, **options)
            config = None if self._module.mta is None else self._module.mta.config
            terms = self._evaluated.terms(config, self._sum_over_ranks)
        finally:
            self._evaluated = None
        output.metrics.update({f"{prefix}_{name}": value for name, value in terms.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The losses of one batch; predictions are not kept."""
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
            if self._evaluated is not None:
                self._evaluated.add(output, counts=FILLER not in inputs)
        return loss.detach(), None, None

    def _prepare_input(self, data: Any) -> Any:
        """Onto the device, which the Trainer's own leaves spans out of."""
        if isinstance(data, SpanBatch | LazySpans):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _mta_inputs(self, rows: Sequence[Any]) -> Batch:
        """The arguments of ``MTALoss.forward`` of some rows, by name; of the student in eval mode, without a graph."""
        batch = self._prepare_inputs(self.data_collator(rows))
        teacher = self._teach(batch)
        with self.accelerator.autocast():
            states = self._module.student_states(batch)
        return {"student_hidden": states, **teacher_side(_with_spans(batch), teacher)}

    # --- a run ---------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *, allow_changes: bool = False, **options: Any
    ) -> Any:
        """Train, from the start or from a checkpoint (True: the last one in ``output_dir``).

        Args:
            resume_from_checkpoint: its files are compared with its manifest, and this run with the one that made it.
            allow_changes: go on though arguments, data or models changed; only the projections must be the same.
            options: passed to ``Trainer.train``.

        Raises:
            InputError: a checkpoint that is damaged or of another run, with every file or value that differs.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoints.last_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir}: expected a checkpoint to resume from, there is none")
        self.stopped = False
        if resume_from_checkpoint:
            self._starts_by_ridge = False
            resume_from_checkpoint = str(user_path(resume_from_checkpoint))
            self.check_checkpoint(Path(resume_from_checkpoint), allow_changes=allow_changes)
            self._load_progress(Path(resume_from_checkpoint))
            if self._is_finished(Path(resume_from_checkpoint)):  # the Trainer would take one more step
                self._load_from_checkpoint(resume_from_checkpoint)
                return None
        with self._batches, self._filling():
            mta, dataset = self._module.mta, self.train_dataset
            if self._starts_by_ridge and mta is not None and dataset is not None:
                start_by_ridge(mta, dataset, self.args, self._mta_inputs, self._sum_over_ranks)
            self._starts_by_ridge = False  # a second call goes on from what the first has trained
            if self._module.base.wants_validation:
                self.evaluate()
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)

    def _is_finished(self, checkpoint: Path) -> bool:
        """Whether nothing is left to train after a checkpoint; then its state is taken up."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        try:
            state, args = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)), self.args
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{checkpoint / TRAINER_STATE_NAME}: expected the state of a run, it can't be read: {error}"
            ) from None
        if args.max_seconds is not None:
            finished = self._seconds_of_all() >= args.max_seconds
        elif args.max_steps > 0:
            finished = state.global_step >= args.max_steps
        else:
            finished = state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs
        if finished:
            self.state = state
        return finished

    def _save_rng_state(self, output_dir: str) -> None:
        """Called on every rank, which all have a state of their own: with the random numbers, this run's progress."""
        super()._save_rng_state(output_dir)
        progress = {
            "seconds": self._log.total_seconds,
            "method": self._module.base.name,
            "base": self._batches.state_dict(),
        }
        checkpoints.save_progress(Path(output_dir), self.args.process_index, progress)

    def _load_progress(self, checkpoint: Path) -> None:
        progress = checkpoints.load_progress(checkpoint, self.args.process_index)
        if progress is not None:
            method = self._module.base
            if progress["method"] != method.name:
                raise InputError(
                    f"{checkpoint}: expected a checkpoint trained with the base loss {method.name}, it has "
                    f"{progress['method']}; resume with the settings it was made with, or start another output_dir"
                )
            self._log.finished_seconds = progress["seconds"]
            if progress["base"]:
                method.load_state_dict(progress["base"])


def _with_spans(batch: Mapping[str, Any]) -> Batch:
    """The batch with the spans that it was waiting for."""
    return {name: value.result() if isinstance(value, LazySpans) else value for name, value in batch.items()}
