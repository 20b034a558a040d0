"""Streams, lengths and uneven evaluation sets: no row is lost or counted twice, on one rank or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import datasets
from training import TEACHER_LAYERS, logged, make_rows, make_trainer

from mta_fast.distill.training.feeding import (
    FILLER,
    Endless,
    Filler,
    WithoutFillers,
    _FilledRows,
    _FilledStream,
    check_stream,
)
from mta_fast.distill.training.placing import place_teacher
from mta_fast.errors import InputError


def _numbers(count: int, shards: int = 1) -> Any:
    return datasets.Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset(num_shards=shards)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_ranks_share_a_stream_row_by_row(shards: int) -> None:
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    ranks = []
    for rank in range(2):
        loader = DataLoader(Endless(_numbers(10, shards)), batch_size=2, collate_fn=lambda rows: [r["n"] for r in rows])
        shared = prepare_data_loader(
            loader, num_processes=2, process_index=rank, dispatch_batches=False, put_on_device=False
        )
        ranks.append([batch for batch, _ in zip(shared, range(5), strict=False)])
    steps = [[*one, *two] for one, two in zip(*ranks, strict=True)]
    assert [n for step in steps for n in step] == [*range(10), *range(10)]  # five steps of four: two passes


@pytest.mark.parametrize("total", [1, 5, 8, 9])
def test_evaluation_rows_are_shared_out_whole(total: int) -> None:
    collator = WithoutFillers(lambda rows: {"n": [row["n"] for row in rows]})
    rows = [{"n": i} for i in range(total)]
    for filled in (_FilledRows(rows, 4), _FilledStream(rows, 4)):
        laid = list(filled) if isinstance(filled, _FilledStream) else [filled[i] for i in range(len(filled))]
        assert len(laid) % 4 == 0
        assert [row["n"] for row in laid if not isinstance(row, Filler)] == list(range(total))
        batches = [collator(laid[i : i + 2]) for i in range(0, len(laid), 2)]
        assert [n for batch in batches if FILLER not in batch for n in batch["n"]] == list(range(total))


def test_a_batch_of_fillers_adds_nothing_to_an_evaluation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    expected = trainer.evaluate()
    inner = trainer.data_collator
    trainer.data_collator = WithoutFillers(inner)
    rows = [*trainer.eval_dataset, Filler(trainer.eval_dataset[0]), Filler(trainer.eval_dataset[1])]
    found = trainer.evaluate(eval_dataset=rows)
    for name in ("eval_loss", "eval_base", "eval_dsa", "eval_hid"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_stream_trains_as_its_rows_do(tmp_path: Path) -> None:
    rows = make_rows()
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    twice = [*rows[:6], *rows[:6], *rows[:4]]
    plain = make_trainer(tmp_path, rows=twice, train_sampling_strategy="sequential", **options)
    plain.train()
    stream = make_trainer(tmp_path, **options)
    stream.train_dataset = datasets.Dataset.from_list(rows[:6]).to_iterable_dataset()
    stream.train()
    for name in ("loss", "base", "dsa", "hid"):
        assert logged(stream, name) == pytest.approx(logged(plain, name), rel=1e-5)


def test_streams_that_can_not_be_shared_out_are_refused(tmp_path: Path) -> None:
    from datasets.distributed import split_dataset_by_node

    from mta_fast.distill import MTATrainingArguments

    def arguments(**values: Any) -> MTATrainingArguments:
        return MTATrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{"max_steps": 2} | values)

    check_stream(_numbers(4), arguments())
    check_stream([1, 2], arguments(max_steps=-1, save_strategy="epoch"))
    with pytest.raises(InputError, match="train_dataset: expected the whole stream on every rank, got a part of it"):
        check_stream(split_dataset_by_node(_numbers(4, 2), 0, 2), arguments())
    with pytest.raises(InputError, match="max_steps: expected a number of steps, as a stream has no length, got -1"):
        check_stream(_numbers(4), arguments(max_steps=-1))
    with pytest.raises(InputError, match="save_strategy: expected steps, as a stream has no epochs, got 'epoch'"):
        check_stream(_numbers(4), arguments(save_strategy="epoch"))
    with pytest.raises(InputError, match="train_dataset: expected rows, the stream has none"):
        next(iter(Endless(iter([]))))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_are_grouped_by_their_tokens(tmp_path: Path, strategy: str) -> None:
    trainer = make_trainer(tmp_path, train_sampling_strategy=strategy, max_steps=1)
    tokenizer, rows = make_tokenizer(), trainer.train_dataset
    lengths = [min(64, len(tokenizer(row["prompt"] + row["output"])["input_ids"])) for row in rows]
    assert trainer._lengths(rows) == lengths
    order = [i for batch in trainer._get_train_sampler() for i in (batch if isinstance(batch, list) else [batch])]
    assert sorted(order) == list(range(16))
    if strategy == "group_by_length":
        assert lengths[order[0]] == max(lengths)  # the sampler's promise
    trainer.train()
    assert trainer._lengths([{"length": 3}, {"length": 5}]) == [3, 5]
    (pair,) = trainer._lengths([{"prompt": "a ", "chosen": "b", "rejected": "c d"}])  # of a method's own batches
    assert pair == sum(len(tokenizer(text)["input_ids"]) for text in ("a b", "a c d"))
    with pytest.raises(InputError, match=r"row 0: expected its length in the column 'length' \(length_column_name\)"):
        trainer._lengths([{"a": 1}])


# --- teachers that can't be moved --------------------------------------------------------------------------------


def _teacher() -> Any:
    return make_model("llama", TEACHER_LAYERS, width=48, vocabulary=len(make_tokenizer()))


def test_an_off_loaded_teacher_stays_where_it_is(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    plain = make_trainer(tmp_path, max_steps=1)
    plain.train()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(TEACHER_LAYERS)}
    teacher = dispatch_model(_teacher(), places, main_device="cpu", offload_dir=tmp_path / "weights")
    off_loaded = make_trainer(tmp_path, teacher=teacher, max_steps=1)
    off_loaded.train()
    for name in ("base", "dsa", "hid"):
        assert logged(off_loaded, name) == pytest.approx(logged(plain, name), rel=1e-5)


def test_a_quantised_teacher_that_refuses_to_move_stays(tmp_path: Path) -> None:
    teacher = _teacher()

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("`.to` is not supported for `8-bit` models")

    teacher.to = refuse
    with pytest.raises(ValueError, match="is not supported"):
        place_teacher(teacher, torch.device("cpu"))
    teacher.is_loaded_in_8bit = True
    assert place_teacher(teacher, torch.device("meta")) == torch.device("cpu")
    make_trainer(tmp_path, teacher=teacher, max_steps=1).train()
