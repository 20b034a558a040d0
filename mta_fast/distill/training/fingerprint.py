"""What a run is made of, in every checkpoint, so that one that goes on does so with the same.

A fingerprint is a flat mapping of keys, such as ``training.learning_rate``, to numbers, texts and checksums. Some
values may change without changing what is trained: how often something is logged, saved or evaluated, and how the same
numbers are computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mta_fast.distill.manifest import FINGERPRINT_FILE, STATE_FILE
from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.teacher.cached import StoredTeacher
from mta_fast.errors import InputError
from mta_fast.layers import unwrap

Fingerprint = dict[str, Any]

# they change what is written, shown or computed where, never what is trained
FREE = (
    *("output_dir", "spans.n_process", "spans.cache", "spans.skip_unparsable", "student.compile", "data.skip_bad_rows"),
    *("data.eval", "data.eval_split", "eval_dataset*", "mta.backend", "mta.dsa_method"),
    *("training.logging_*", "training.log_*", "training.disable_tqdm", "training.report_to", "training.run_name"),
    *("training.project", "training.trackio_*", "training.save_*", "training.push_to_hub", "training.hub_*"),
    *("training.eval_*", "training.per_device_eval_batch_size", "training.prediction_loss_only"),
    *("training.include_for_metrics", "training.include_num_input_tokens_seen", "training.batch_eval_metrics"),
    *("training.bf16_full_eval", "training.fp16_full_eval", "training.dataloader_num_workers"),
    *("training.dataloader_pin_memory", "training.dataloader_persistent_workers", "training.dataloader_prefetch_*"),
    *("training.dataloader_multiprocessing_context", "training.gradient_checkpointing*", "training.ddp_*"),
    *("training.activation_checkpointing*", "training.torch_empty_cache_steps", "training.use_cpu", "training.debug"),
    *("training.skip_memory_metrics", "training.do_*", "training.resume_from_checkpoint", "training.local_rank"),
    *("training.output_dir", "training.label_names", "training.full_determinism", "training.use_cache"),
    *("training.restore_callback_states_from_checkpoint", "training.enable_jit_checkpoint"),
)
# free too, but where the training follows the evaluation: DistiLLM's threshold, the best checkpoint
EVALUATION = ("data.eval*", "eval_dataset*", "training.eval_*", "training.bf16_full_eval", "training.fp16_full_eval")
# how long a run is, which a schedule that does not fall does not ask
LENGTH = ("training.max_steps", "training.num_train_epochs")
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")
SECRET = ("training.*token*", "training.hub_*", "training.trackio_*", "training.resume_from_checkpoint")
# of a model's or an adapter's config: where it came from and what training aligns with the tokenizer
UNSAID = (
    *("_name_or_path", "transformers_version", "*_token_id", "dtype", "torch_dtype", "architectures", "use_cache"),
    *("*_attn_implementation*", "*_experts_implementation*", "return_dict", "output_*", "auto_mapping", "revision"),
    *("base_model_name_or_path", "inference_mode", "peft_version"),
)
SAMPLED_VALUES, SAMPLED_ROWS = 64, 1000
SHOWN = 60  # characters of a value in a message


class Difference(NamedTuple):
    """A key whose value was ``old`` and is ``new``; ``matters``: it changes what is trained."""

    key: str
    old: Any
    new: Any
    matters: bool

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any], *, finished: bool = False) -> list[Difference]:
    """The keys of both whose values differ; a key that only one has belongs to another version.

    ``finished``: the old run has come to its end, and may be made longer.
    """
    differing = [key for key in old if key in new and old[key] != new[key]]
    free = free_keys(old, new)
    if finished:
        return [Difference(key, old[key], new[key], key not in LENGTH and not free(key)) for key in differing]
    return [Difference(key, old[key], new[key], not free(key)) for key in differing]


def free_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a key may change between these two runs, as a function of it."""
    runs = (old, new)
    follows = any(each.get("training.load_best_model_at_end") or each.get("follows_evaluation") for each in runs)
    endless = not any(each.get("follows_progress") or _falls(each) for each in runs)
    by_steps = all((each.get("training.max_steps") or 0) > 0 for each in runs)

    def free(key: str) -> bool:
        if key in LENGTH and (endless or (by_steps and key == "training.num_train_epochs")):
            return True
        if follows and any(fnmatch(key, pattern) for pattern in EVALUATION):
            return False
        if key == "training.dataloader_num_workers" and "streamed" in (run.get("train_dataset.rows") for run in runs):
            return False  # each worker reads its own part
        if key == "teacher.cache":  # where it is; that it is there changes how the states are rounded
            return None not in (old[key], new[key])
        if key == "training.accumulation":  # two ways to the same numbers
            return {old[key], new[key]} == {"keep", "recompute"}
        return any(fnmatch(key, pattern) for pattern in FREE)

    return free


def _falls(run: Mapping[str, Any]) -> bool:
    """Whether the learning rate depends on how long the run is."""
    schedule, warmup = run.get("training.lr_scheduler_type"), run.get("training.warmup_steps") or 0
    return schedule not in ENDLESS_SCHEDULES or 0 < warmup < 1 or run.get("training.max_seconds") is not None


def refuse(where: Path | str, differences: Iterable[Difference]) -> None:
    """Refuse to go on with what changes the run.

    Raises:
        InputError: names every such key, its old and its new value.
    """
    wrong = [str(each) for each in differences if each.matters]
    if wrong:
        count = f"{len(wrong)} value{' differs' if len(wrong) == 1 else 's differ'}"
        raise InputError(
            f"{where}: expected the run that it is of, {count} (old -> new): {'; '.join(wrong)}; go on with the old, "
            f"start another output_dir, or mean it with --allow-changes (train(allow_changes=True))"
        )


def _short(value: Any) -> str:
    text = "null" if value is None else str(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


# --- in a checkpoint ---------------------------------------------------------------------------------------------


def save(folder: Path, run: Fingerprint, settings: Mapping[str, Any] | None) -> None:
    """Write a run's fingerprint, and the settings of ``mta-fast train`` where it was started by them."""
    text = json.dumps({"run": run, "settings": settings}, indent=1)
    (folder / FINGERPRINT_FILE).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Fingerprint | None, dict[str, Any] | None]:
    """What ``save`` wrote; (None, None) in a checkpoint of an earlier version."""
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        return None, None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["run"], found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected the fingerprint of a run, it can't be read ({error})") from None


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint is of the last step of its run."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return bool(state["global_step"] >= state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):  # refused where the state is read
        return False


# --- of the parts ------------------------------------------------------------------------------------------------


def of_models(student: nn.Module, teacher: nn.Module | None, method: BaseMethod, teacher_tokenizer: Any) -> Fingerprint:
    """Of what a run compares; taken before the models are wrapped or sharded, and the method has seen a batch.

    The student's own weights come from the checkpoint; under an adapter those of its base do not.
    """
    own: Any = unwrap(student)
    run = of_config("student", own.config) if hasattr(own, "config") else {}
    dtypes = sorted({str(each.dtype) for each in student.parameters()})
    run |= {"student.dtype": dtypes, **of_method(method), "teacher": None, "teacher_cache": None}
    adapters: Any = getattr(student, "peft_config", None)
    run["student.adapters"] = sorted(adapters) if isinstance(adapters, Mapping) else None
    for name, config in adapters.items() if isinstance(adapters, Mapping) else ():
        run |= of_config(f"student.{name}", config)
        run["student.base"] = of_weights(student, trained=False)
    if teacher is not None:
        run["teacher"] = teacher.weights if isinstance(teacher, StoredTeacher) else of_weights(teacher)
    return (
        run
        | of_tokenizer("teacher_tokenizer", teacher_tokenizer)
        | {
            "follows_evaluation": method.follows_evaluation,
            "follows_progress": method.follows_progress,
        }
    )


def of_arguments(args: Any) -> Fingerprint:
    """TrainingArguments as they were resolved, tokens and names on the hub left out."""
    values = {f"training.{name}": value for name, value in args.to_dict().items()}
    kept = {key: plain(value) for key, value in values.items() if not any(fnmatch(key, each) for each in SECRET)}
    return kept | {"world_size": args.world_size}


def of_config(name: str, config: Any) -> Fingerprint:
    """A model's or an adapter's config, key by key."""
    values = config.to_dict().items()
    return {f"{name}.{key}": plain(value) for key, value in values if not any(fnmatch(key, each) for each in UNSAID)}


def of_method(method: BaseMethod) -> Fingerprint:
    """A base method's name and the plain values that it was made with; as it is before the training."""
    return {f"base.{name}".rstrip("."): plain(value) for name, value in method.settings().items()}


def of_weights(model: nn.Module, *, trained: bool | None = None) -> str | None:
    """A checksum over the names, shapes, dtypes and some values of every weight; ``trained``: only those, or the rest.

    A model that was trained further differs in nearly all values, so that 64 of each weight tell it.
    """
    digest, parts = hashlib.blake2b(digest_size=16), []
    for name, value in model.named_parameters():
        if trained is not None and value.requires_grad != trained:
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        own = value.detach()
        if own.device.type != "meta" and own.numel():
            own = own.reshape(-1)
            parts.append(own[:: max(1, own.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES].to(torch.float64))
    if not parts:
        return None
    digest.update(torch.cat([part.cpu() for part in parts]).numpy().tobytes())
    return digest.hexdigest()


def of_rows(name: str, rows: Any) -> Fingerprint:
    """How many rows, and a checksum of each column: of all rows of a list or a ``datasets.Dataset``, of some of others.

    Streamed rows have none: reading them would use them up.
    """
    if isinstance(rows, Mapping):
        return {key: of for part in rows for key, of in of_rows(f"{name}.{part}", rows[part]).items()}
    if rows is None or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return {f"{name}.rows": None if rows is None else "streamed"}
    digests: dict[str, Any] = {}
    for row in _read(rows):
        for column, value in row.items() if isinstance(row, Mapping) else [("row", row)]:
            digest = digests.setdefault(str(column), hashlib.blake2b(digest_size=16))
            digest.update(json.dumps(value, default=plain, sort_keys=True).encode() + b"\n")
    columns = {f"{name}.{column}": digest.hexdigest() for column, digest in digests.items()}
    return {f"{name}.rows": len(rows), f"{name}.columns": sorted(digests), **columns}


def _read(rows: Any) -> Iterable[Any]:
    if hasattr(rows, "with_format") and hasattr(rows, "iter"):  # a datasets.Dataset
        for batch in rows.with_format(None).iter(SAMPLED_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    elif isinstance(rows, (list, tuple)):
        yield from rows
    else:
        yield from (rows[i] for i in range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS)))


def of_tokenizer(name: str, tokenizer: Any) -> Fingerprint:
    """A checksum of a tokenizer's vocabulary."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return {f"{name}.vocabulary": None}
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {f"{name}.vocabulary": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "value", value)  # of an enumeration of texts
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(each) for each in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # arrays and tensors
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return f"{type(value).__module__}.{type(value).__qualname__}"
