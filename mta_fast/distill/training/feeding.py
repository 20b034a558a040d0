"""How rows reach MTATrainer: streams without an end, lengths for samplers, evaluation sets over several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler, get_worker_info
from transformers import TrainingArguments
from transformers.trainer_utils import has_length, seed_worker

from mta_fast.distill.training.budget import TokenBudgetBatches
from mta_fast.distill.training.saving import WholeCheckpoints
from mta_fast.errors import InputError

Row = Mapping[str, Any]
LOADER_OPTIONS = (
    *("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order"),
)
FILLER = "filler"  # key of a batch that counts for nothing


class RowFeeding(WholeCheckpoints):
    """A Trainer whose data loaders lose no row and count none twice.

    Training on a stream (an IterableDataset) begins anew where the stream ends, in the middle of a batch too; every
    rank reads all of it and collates its own rows. An evaluation set is shared out whole, however many ranks there are.
    """

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **options: Any) -> DataLoader[Any]:
        ranks, drop_last = self.args.world_size, self.args.dataloader_drop_last
        if is_training:
            budget = getattr(self.args, "max_tokens_per_batch", None)
            if budget is not None:
                return self._budgeted(dataset, budget)
            dataset = Endless(dataset) if is_stream(dataset) else dataset
            return super()._get_dataloader(dataset, *args, is_training=True, **options)
        if ranks > 1:
            multiple = ranks * self.args.eval_batch_size
            dataset = _FilledStream(dataset, multiple) if is_stream(dataset) else _FilledRows(dataset, multiple)
        self.args.dataloader_drop_last = False  # of training: the losses are those of the whole set
        try:
            return super()._get_dataloader(dataset, *args, is_training=False, **options)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _budgeted(self, dataset: Any, budget: int) -> DataLoader[Any]:
        """Training batches by ``max_tokens_per_batch``; each rank takes every so many of them."""
        args, given = self.args, self.data_collator
        collator: Any = given.collator if isinstance(given, WithoutFillers) else given
        lengths = self._column(dataset) or collator.lengths(_without_spans(dataset))
        lengths = [min(length, collator.max_length) for length in lengths]
        seed = args.seed if args.data_seed is None else args.data_seed
        padded = None if collator.flatten else collator.padded
        batches = TokenBudgetBatches(lengths, budget, padded, ranks=args.world_size, seed=seed)
        names = [name for name in LOADER_OPTIONS if hasattr(args, f"dataloader_{name}")]
        loader: DataLoader[Any] = self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_sampler=batches,
                collate_fn=self.data_collator,
                worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
                **{name: getattr(args, f"dataloader_{name}") for name in names},
            )
        )
        if loader.batch_sampler is not batches:  # accelerate's, which takes this rank's batches
            loader.batch_sampler.set_epoch = batches.set_epoch  # type: ignore[union-attr]  # else a resumed epoch isn't told
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        """The Trainer's; the rows' lengths, where it asks for them, are those of their tokens."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy in ("group_by_length", "batch_rebalance") and has_length(dataset):
            name = self.processing_class.model_input_names[0]
            dataset = [{name: range(length)} for length in self._lengths(dataset)]
        return super()._get_train_sampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[Any] | None:
        alone = self.args.world_size <= 1 and has_length(eval_dataset)
        return SequentialSampler(eval_dataset) if alone else None

    def _lengths(self, dataset: Any) -> list[int]:
        """Tokens of each row: its column ``length_column_name``, else those of its texts."""
        known = self._column(dataset)
        if known is not None:
            return known
        rows, column = list(_without_spans(dataset)), self.args.length_column_name
        responses = self._module.base.responses
        texts = [_texts(i, row, column, responses) for i, row in enumerate(rows)]
        longest = getattr(self.args, "max_length", None)
        lengths = iter(
            len(ids)
            for ids in self.processing_class(
                [text for parts in texts for text in parts], truncation=longest is not None, max_length=longest
            )["input_ids"]
        )
        return [max(1, sum(next(lengths) for _ in parts)) for parts in texts]

    def _column(self, dataset: Any) -> list[int] | None:
        """Lengths that the rows bring."""
        column = self.args.length_column_name
        if column in (getattr(dataset, "column_names", None) or ()):
            return [int(length) for length in dataset[column]]
        if hasattr(dataset, "column_names"):
            return None
        lengths = [row.get(column) for row in dataset]
        return None if None in lengths else [int(length) for length in lengths]


def _without_spans(dataset: Any) -> Any:
    """A ``datasets.Dataset`` without its columns of spans, which take long to read; others as they are."""
    names = [name for name in getattr(dataset, "column_names", None) or () if name.endswith("_spans")]
    return dataset.remove_columns(names) if names and hasattr(dataset, "remove_columns") else dataset


def _texts(i: int, row: Row, column: str, responses: Sequence[str]) -> list[str]:
    for names in (responses, ("output",), ("chosen", "rejected")):  # a method's own batches may read other rows
        if {"prompt", *names} <= row.keys():
            return [row["prompt"] + row[name] for name in names]
    if "text" in row:
        return [row["text"]]
    raise InputError(
        f"row {i}: expected its length in the column {column!r} (length_column_name), or "
        f"{', '.join(map(repr, ('prompt', *responses)))} to count it from, got {sorted(row)}"
    )


# --- streams -----------------------------------------------------------------------------------------------------


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning to its end."""
    return isinstance(dataset, IterableDataset) or (
        dataset is not None and hasattr(dataset, "__iter__") and not has_length(dataset)
    )


def check_stream(dataset: Any, args: TrainingArguments) -> None:
    """Refuse a stream to train on that has been shared out already, or settings that need its length.

    Raises:
        InputError: with the reason.
    """
    if not is_stream(dataset):
        return
    if getattr(dataset, "_distributed", None) is not None:
        raise InputError(
            "train_dataset: expected the whole stream on every rank, got a part of it (split_dataset_by_node); give it "
            "whole, the ranks share it out"
        )
    if args.max_steps <= 0:
        raise InputError(f"max_steps: expected a number of steps, as a stream has no length, got {args.max_steps}")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name).value == "epoch":
            raise InputError(f"{name}: expected steps, as a stream has no epochs, got 'epoch'")


class Endless(IterableDataset[Any]):
    """A stream that begins anew where it ends, so that no step and no rank is left with a part of its rows."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Row]:
        for epoch in count():
            if hasattr(self._stream, "set_epoch"):  # it shuffles anew
                self._stream.set_epoch(epoch)
            row = None
            for row in self._stream:
                yield row
            if row is None:  # a loader's worker may have no part in the stream, an iterator can be read only once
                if epoch == 0 and get_worker_info() is None:
                    raise InputError("train_dataset: expected rows, the stream has none")
                return


# --- evaluation on several ranks ---------------------------------------------------------------------------------


class Filler(dict[str, Any]):
    """A row that makes the last batches of all ranks equally many; it counts for nothing."""


class WithoutFillers:
    """A collator that leaves fillers out; a batch of nothing else has FILLER as a key."""

    def __init__(self, collator: Callable[[Sequence[Row]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch."""
        real = [row for row in rows if not isinstance(row, Filler)]
        return self.collator(real) if real else self.collator(rows) | {FILLER: True}


class _FilledRows(Dataset[Row]):
    def __init__(self, rows: Any, multiple: int) -> None:
        self._rows, self._multiple = rows, multiple

    def __len__(self) -> int:
        return -(-len(self._rows) // self._multiple) * self._multiple

    def __getitem__(self, i: int) -> Row:
        total = len(self._rows)
        return self._rows[i] if i < total else Filler(self._rows[i % total])


class _FilledStream(IterableDataset[Any]):
    def __init__(self, stream: Any, multiple: int) -> None:
        self._stream, self._multiple = stream, multiple

    def __iter__(self) -> Iterator[Row]:
        total, row = 0, None
        for total, row in enumerate(self._stream, 1):  # noqa: B007  # read after the loop
            yield row
        if row is not None:
            for _ in range(-total % self._multiple):
                yield Filler(row)
