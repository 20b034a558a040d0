"""Where the projections of Hid start in a training: ridge regression over rows of its data, before the first step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mta_fast.distill.training.arguments import MTATrainingArguments
from mta_fast.distill.training.feeding import Row, is_stream
from mta_fast.errors import InputError
from mta_fast.loss import LayerPairTerms, MTALoss

Inputs = Callable[[Sequence[Row]], Mapping[str, Any]]
Reduce = Callable[[Tensor], Tensor]


def start_of(mta: MTALoss | None, args: MTATrainingArguments, *, sharded: bool) -> str:
    """``projection_init``; "default" without Hid, as there is nothing to start.

    Raises:
        InputError: ridge, where FSDP or DeepSpeed shard the student that it must run.
    """
    if mta is None or not len(mta.projections):
        return "default"
    if args.projection_init == "ridge" and sharded:
        raise InputError(
            "projection_init: expected default or identity with FSDP or DeepSpeed, whose student is in no place whole, "
            "got 'ridge'; give MTATrainer an MTALoss whose projections MTALoss.fit_projections has started"
        )
    return args.projection_init


def start_at_identity(mta: MTALoss) -> None:
    """Start every projection there."""
    for projection in mta.projections:
        projection.start_at_identity()  # type: ignore[operator]  # ModuleList knows modules alone


def start_by_ridge(mta: MTALoss, dataset: Any, args: MTATrainingArguments, inputs: Inputs, reduce: Reduce) -> None:
    """Fit the projections on ``projection_init_rows`` rows, and say what Hid is of other rows before and after.

    The rows are drawn by the seed, whatever the sampler, ranks and batches; a stream's are its first. No random number
    of the training is used up.

    Args:
        dataset: the training's.
        inputs: the arguments of ``MTALoss.forward`` of some rows, by name.
        reduce: sums a tensor over the ranks.

    Raises:
        InputError: a stream that can be read only once; rows that nothing can be fitted on.
    """
    size, count = args.train_batch_size * args.world_size, args.projection_init_rows
    seed = args.seed if args.data_seed is None else args.data_seed

    def shares(rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
        for first in range(0, len(rows), size):
            own = rows[first : first + size][args.process_index :: args.world_size]
            if own:
                yield inputs(own)

    with _same_random_numbers(args.device):
        rows = _drawn(dataset, size + count, seed)
        others, fitted = rows[:size], rows[size:]
        kind = "other"
        if not fitted:  # no more than a batch
            others, fitted, kind = rows[:count], rows[:count], "the same"
        judged = list(shares(others))
        before = _hid(mta, judged, reduce)
        mta.fit_projections(shares(fitted), strength=args.projection_init_ridge, reduce=reduce)
        after = _hid(mta, judged, reduce)
    if args.process_index == 0:
        print(
            f"projections: ridge ({args.projection_init_ridge:g}) on {len(fitted)} rows; Hid of {len(others)} {kind} "
            f"rows, by layer pair: {before} -> {after}",
            flush=True,
        )


def _hid(mta: MTALoss, batches: Sequence[Mapping[str, Any]], reduce: Reduce) -> str:
    """Hid of each layer pair over these batches of all ranks."""
    terms = torch.zeros(len(LayerPairTerms._fields), len(mta.projections), dtype=torch.float64)
    total = terms.to(next(mta.parameters()).device)
    with torch.no_grad():
        for batch in batches:
            total += torch.stack(mta(**batch).per_layer)
    hid = LayerPairTerms(*reduce(total)).quotients()[1]
    return " ".join(f"{value:.3f}" for value in hid.tolist())


def _drawn(dataset: Any, count: int, seed: int) -> list[Row]:
    """So many rows, or all."""
    if not is_stream(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        return [dataset[i] for i in order[:count].tolist()]
    stream = iter(dataset)
    if iter(dataset) is stream:
        raise InputError(
            "projection_init: expected a stream that can be read from its beginning again, as ridge reads its first "
            "rows and the training all, got an iterator; give the data set that makes it, or take 'default'"
        )
    return list(itertools.islice(stream, count))


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Within it random numbers may be drawn; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
