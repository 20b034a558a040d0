"""Batches by a budget of tokens: what fits, in an order that follows from seed and epoch, resumed and on two ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import datasets
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from training import logged, make_pairs, make_rows, make_trainer

from mta_fast import SpanCollator
from mta_fast.distill.methods import StepBatches, base_method
from mta_fast.distill.training.budget import TokenBudgetBatches, check_budget
from mta_fast.errors import InputError

LENGTHS = [random.Random(3).randint(1, 60) for _ in range(200)]
BUDGET: dict[str, Any] = {"max_tokens_per_batch": 256, "per_device_train_batch_size": 8, "max_length": 64}


def _batches(epoch: int = 0, *, padded: Callable[[int], int] | None = None, ranks: int = 1, seed: int = 1) -> Any:
    made = TokenBudgetBatches(LENGTHS, 128, padded, ranks=ranks, seed=seed)
    made.set_epoch(epoch)
    assert len(list(made)) == len(made)
    return list(made)


@pytest.mark.parametrize("padded", [None, lambda longest: longest, lambda longest: -(-longest // 8) * 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_once_within_the_budget(padded: Any, ranks: int) -> None:
    batches = _batches(padded=padded, ranks=ranks)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert len(batches) % ranks == 0
    lengths = [[LENGTHS[row] for row in batch] for batch in batches]
    tokens = [sum(each) if padded is None else len(each) * padded(max(each)) for each in lengths]
    assert max(tokens) <= 128
    assert sum(tokens) / len(tokens) > 90  # and they are full


def test_orders_follow_from_seed_and_epoch() -> None:
    assert _batches(2) == _batches(2)
    assert len({str(_batches(epoch, seed=seed)) for epoch in (0, 1) for seed in (0, 1)}) == 4
    assert {frozenset(batch) for batch in _batches(0)} != {frozenset(batch) for batch in _batches(1)}


def test_a_row_above_the_budget_is_refused() -> None:
    assert list(TokenBudgetBatches([3, 5], 5, None, ranks=1, seed=0)) in ([[0], [1]], [[1], [0]])
    with pytest.raises(InputError, match="max_tokens_per_batch: expected at least 5, which the longest row takes, got"):
        TokenBudgetBatches([3, 5], 4, None, ranks=1, seed=0)
    with pytest.raises(InputError, match="expected at least 8"):
        TokenBudgetBatches([3, 5], 7, lambda longest: 8, ranks=1, seed=0)


@pytest.mark.parametrize("padding_free", [False, True])
def test_batches_of_a_training(tmp_path: Path, padding_free: bool) -> None:
    trainer = make_trainer(tmp_path, padding_free=padding_free, max_steps=-1, num_train_epochs=2, **BUDGET)
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    assert max(batch["input_ids"].numel() for batch in batches) <= 256
    assert (padding_free and 1) or max(len(batch["input_ids"]) for batch in batches) > 1
    collator = SpanCollator(make_tokenizer(), max_length=64)
    lengths = [int(collator([row])["attention_mask"].sum()) for row in trainer.train_dataset]
    assert collator.lengths(trainer.train_dataset) == lengths
    real = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
    assert real == sum(lengths)
    trainer.train()
    assert trainer.state.global_step == 2 * len(batches)
    assert len(logged(trainer, "loss")) == 2 * len(batches)


def test_a_resumed_run_has_the_same_batches(tmp_path: Path) -> None:
    options = BUDGET | {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    options["max_tokens_per_batch"] = 200
    whole = make_trainer(tmp_path, **options)
    assert len(whole.get_train_dataloader()) in (4, 5, 6)  # 2 or 3 steps an epoch: 4 is in the middle of the second
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed, "loss")[-1] == logged(whole, "loss")[-1]
    assert len(set(logged(whole, "loss"))) == 5


def test_two_ranks_share_the_batches_and_resume_in_an_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, **BUDGET | {"max_tokens_per_batch": 128})
    shares = []
    for rank in range(2):
        trainer.accelerator.prepare = lambda loader, rank=rank: prepare_data_loader(
            loader, num_processes=2, process_index=rank, put_on_device=False
        )
        loader = trainer.get_train_dataloader()
        loader.set_epoch(1)
        own = [batch["input_ids"].tolist() for batch in loader]
        later = skip_first_batches(loader, 1)
        later.set_epoch(1)
        later.batch_sampler.batch_sampler.set_epoch(1)  # as the Trainer does
        assert [batch["input_ids"].tolist() for batch in later] == own[1:]
        shares.append(own)
    assert len(shares[0]) == len(shares[1])
    assert not [batch for batch in shares[0][:-1] if batch in shares[1]]


def test_lengths_that_rows_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, **BUDGET)
    known = SpanCollator(make_tokenizer(), max_length=64).lengths(trainer.train_dataset)
    expected = [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]
    rows = [row | {"length": length} for row, length in zip(trainer.train_dataset, known, strict=True)]
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(SpanCollator, "lengths", lambda *_: pytest.fail("they are known"))
    assert [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()] == expected


def test_a_stream_has_no_budget() -> None:
    method = base_method("srkl")
    with pytest.raises(InputError, match="max_tokens_per_batch: expected rows of a known number, got a stream"):
        check_budget(method, StepBatches(method), SpanCollator(make_tokenizer()), streamed=True)


def test_what_a_budget_has_no_place_for(tmp_path: Path) -> None:
    for option, value in {
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": True,
        "auto_find_batch_size": True,
    }.items():
        with pytest.raises(InputError, match=f"{option}: expected its default beside max_tokens_per_batch"):
            make_trainer(tmp_path, **BUDGET | {option: value})
    with pytest.raises(InputError, match="max_tokens_per_batch: expected a number of tokens, got 0"):
        make_trainer(tmp_path, **BUDGET | {"max_tokens_per_batch": 0})
    with pytest.raises(InputError, match="max_tokens_per_batch: expected rows of one response, those of DistiLLM2"):
        make_trainer(tmp_path, base_loss="distillm2", rows=make_pairs(make_rows()[:3]), **BUDGET)
    with pytest.raises(InputError, match="max_tokens_per_batch: expected batches of the data's rows, DistiLLM makes"):
        make_trainer(tmp_path, base_loss="distillm", mta=None, **BUDGET)
    with pytest.raises(InputError, match="max_tokens_per_batch: expected batches of a SpanCollator, got function"):
        make_trainer(tmp_path, data_collator=lambda rows: {}, **BUDGET)
