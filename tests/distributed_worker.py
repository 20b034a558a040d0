"""One rank of a training run: ``torchrun distributed_worker.py ddp|fsdp OUT [METHOD [CHECKPOINT]]``, or ``start``."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def let_fsdp_run_on_cpus() -> None:
    """accelerate shards on GPUs only; for it these processes are of the kind it shards."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    made = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def main(mode: str, out: str, method: str = "srkl", checkpoint: str | None = None) -> None:
    """Train four steps on 16 rows, evaluate, save and export; what each rank saw goes to OUT/rank-N.json.

    ``method`` is a base method; "distillm" writes in every step, "clock" is SRKL that a second ends, "stream" is SRKL
    on a stream of ten rows in three parts, evaluated on seven, "stop" SRKL where the last rank alone gets SIGTERM in
    step 3, "ridge" SRKL whose projections start on seven rows, "cache" SRKL with the teacher's states in OUT's parent,
    where the first run puts them.
    """
    if mode == "fsdp":
        let_fsdp_run_on_cpus()
    from training import make_pairs, make_trainer, uneven_rows
    from transformers import TrainerCallback

    from mta_fast import SpanExtractor
    from mta_fast.distill.methods.distillm import DistiLLM
    from mta_fast.distill.training.interrupt import FinishStep

    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {"base_loss": method, "rows": uneven_rows()}
    if method == "distillm2":
        options["rows"] = make_pairs(uneven_rows())
    elif method == "distillm":
        generation = {"max_new_tokens": 6}
        options["base_loss"] = DistiLLM(threshold=1.0, schedule="constant", capacity=4, generation=generation)
        options["span_extractor"] = SpanExtractor()
    elif method == "clock":
        options |= {"base_loss": "srkl", "max_seconds": 1.0, "max_steps": 1000, "eval_strategy": "no"}
    elif method == "cache":
        from mta_fast.distill.training.caching import TeacherCache

        options |= {"base_loss": "srkl", "teacher_cache": TeacherCache(Path(out).parent / "states", "float32")}
        if not (Path(out).parent / "states").exists():  # a later run reads what this one keeps
            from models import make_model, make_tokenizer

            options["teacher"] = make_model("llama", 8, width=48, vocabulary=len(make_tokenizer()))
    elif method in ("stream", "stop"):
        options["base_loss"] = "srkl"
    elif method == "ridge":
        options |= {"base_loss": "srkl", "projection_init": "ridge", "projection_init_rows": 7}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if mode == "fsdp" else {}
    trainer = make_trainer(
        Path(out),
        family="llama",
        **{
            "per_device_train_batch_size": 4 // world,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            **sharded,
            **options,
        },
    )
    if method == "stream":
        import datasets

        trainer.train_dataset = datasets.Dataset.from_list(uneven_rows()[:10]).to_iterable_dataset(num_shards=3)
        trainer.eval_dataset = uneven_rows()[16:23]
    with FinishStep() as finish:
        finish.watch(trainer)
        if method == "stop" and trainer.args.process_index == world - 1:
            trainer.add_callback(Killed())
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.export_student(Path(out) / "student", overwrite=True)
    told = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "steps": trainer.state.global_step,
        "fused_head": trainer._module.head is not None,
        "rate": trainer.lr_scheduler.get_last_lr()[0],
    }
    (Path(out) / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(told), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def start(
    rank: int, world: int, rendezvous: str, log: str, arguments: Sequence[str], rows: Sequence[dict[str, Any]]
) -> None:
    """A rank in a process that has been forked: what torchrun would set, then ``main`` on rows that are parsed."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    places |= {"OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in places.items()} | {"TOKENIZERS_PARALLELISM": "false"}
    import torch
    import training

    training.make_rows = lambda: list(rows)  # type: ignore[assignment]  # it has a cache
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
