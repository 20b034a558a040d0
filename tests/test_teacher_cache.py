"""Teachers on disk: cached against live, and what goes wrong with files."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import make_batch, random_rows
from models import make_model, make_tokenizer
from processes import LIMIT
from safetensors.torch import load_file
from test_heads import _flat, _losses
from test_run import run_folder  # noqa: F401  # a fixture
from training import CONFIG, make_pairs, make_rows, make_trainer

from mta_fast import MTALoss, SpanCollator, SpanExtractor, token_importance
from mta_fast.__main__ import main
from mta_fast.distill.methods.losses import TokenMethod
from mta_fast.distill.methods.registry import base_method
from mta_fast.distill.teacher.contents import Contents
from mta_fast.distill.teacher.quantize import dequantize, quantize
from mta_fast.distill.teacher.rows import teacher_rows
from mta_fast.distill.teacher.store import TeacherStore
from mta_fast.distill.training import run
from mta_fast.distill.training.caching import TeacherCache
from mta_fast.errors import InputError
from mta_fast.files import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:labels:UserWarning")
TESTS = Path(__file__).parent
Record = dict[str, torch.Tensor]


def _model(layers: int = 8) -> Any:
    return make_model("llama", layers, width=48, vocabulary=len(make_tokenizer()))


def _trainer(out: Path, folder: Path | None = None, dtype: str = "float32", **options: Any) -> Any:
    """A trainer; with a folder its teacher is that one's, and the one given where rows are missing."""
    cache = None if folder is None else TeacherCache(folder, dtype)
    return make_trainer(out, teacher_cache=cache, **options)


# --- cached against live -----------------------------------------------------------------------------------------

RUNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("srkl", {}, {}),
    ("forward_kl", {}, {"mta": None}),
    ("fdd", {}, {}),
    ("distillm2", {"adaptive_alpha": True, "anchor_steps": 1}, {}),
    ("cross_entropy", {}, {}),
    ("srkl", {}, {"mta": replace(CONFIG, weighting="entropy")}),
    ("srkl", {}, {"mta": replace(CONFIG, causal=True), "fused_head": False}),
    ("srkl", {}, {"mta": replace(CONFIG, layer_pairs=((1, 2), (2, 4), (3, 6)))}),  # not the last layer
    ("srkl", {}, {"padding_free": True, "family": "llama"}),
]


@pytest.mark.parametrize(("method", "options", "arguments"), RUNS, ids=str)
def test_cached_equals_live(tmp_path: Path, method: str, options: Any, arguments: Any) -> None:
    rows, folder = make_pairs(make_rows()) if method == "distillm2" else make_rows(), tmp_path / "states"

    def trainer(*where: Path, teacher: Any = None) -> Any:
        made = base_method(method, **options)
        return _trainer(tmp_path, *where, teacher=teacher, base_loss=made, rows=rows, **arguments)

    live = trainer(teacher=_model())
    trainer(folder, teacher=_model()).fill_teacher_cache()
    cached = trainer(folder)
    for left, right in zip(_flat(_losses(cached)), _flat(_losses(live)), strict=True):
        assert (left - right).norm() <= 1e-5 * right.norm() + 1e-7
    assert cached.model_fingerprint["teacher"] == live.model_fingerprint["teacher"]


def test_two_tokenizers(tmp_path: Path) -> None:
    own = make_tokenizer(300)
    common = {"teacher_tokenizer": own, "base_loss": "cross_entropy", "mta": CONFIG}
    model = make_model("llama", 8, width=48, vocabulary=len(own))
    live = _trainer(tmp_path, teacher=model, **common)
    _trainer(tmp_path, tmp_path / "states", teacher=model, **common).fill_teacher_cache()
    cached = _trainer(tmp_path, tmp_path / "states", **common)
    for left, right in zip(_flat(_losses(cached)), _flat(_losses(live)), strict=True):
        assert (left - right).norm() <= 1e-5 * right.norm() + 1e-7


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 2e-2), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_rounded_states(tmp_path: Path, dtype: str, limit: float) -> None:
    """Filled in while training, in the first epoch, and then read: both are rounded alike."""
    live = _trainer(tmp_path, teacher=_model())
    filling = _trainer(tmp_path, tmp_path / "states", dtype, teacher=_model())
    expected, first = _flat(_losses(live)), _flat(_losses(filling))
    filling.fill_teacher_cache()
    read = _flat(_losses(_trainer(tmp_path, tmp_path / "states", dtype)))
    for left, right in zip(first, expected, strict=True):
        assert (left - right).norm() <= limit * right.norm() + 1e-6
    for left, right in zip(read, first, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-6
    assert any(not torch.equal(left, right) for left, right in zip(read, expected, strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("fused", [True, False])
def test_fdd_reads_a_stored_head_as_the_teacher_does(
    tmp_path: Path, fused: bool, dtype: torch.dtype, limit: float
) -> None:
    """Logit scale included, with logits and without; a half-precision head beside float32 states."""
    from mta_fast.distill import FDD

    def trainer(*where: Path, teacher: Any = None) -> Any:
        method = FDD([(2, 2), (4, 4)])
        return _trainer(tmp_path, *where, teacher=teacher, base_loss=method, mta=None, fused_head=fused)

    def teacher() -> Any:
        return make_model("cohere", vocabulary=len(make_tokenizer())).to(dtype)

    live = trainer(teacher=teacher())
    trainer(tmp_path / "states", teacher=teacher()).fill_teacher_cache()
    for left, right in zip(_flat(_losses(trainer(tmp_path / "states"))), _flat(_losses(live)), strict=True):
        assert (left - right).norm() <= limit * right.norm() + 1e-6


class _Everywhere(TokenMethod):
    """A base method that reads the teacher's logits where it likes."""

    reads_heads = False


def test_what_a_cache_can_t_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a base loss that reads its teacher at counted positions"):
        _trainer(tmp_path, tmp_path / "states", teacher=_model(), base_loss=_Everywhere())
    _trainer(tmp_path, tmp_path / "words", teacher=_model(), base_loss="cross_entropy")
    with pytest.raises(InputError, match="expected a cache with the LM head and the states that it reads"):
        _trainer(tmp_path, tmp_path / "words", base_loss="srkl")
    _trainer(tmp_path, tmp_path / "states", teacher=_model())
    with pytest.raises(InputError, match="expected the states of every row, 24 of 24 are not there"):
        _trainer(tmp_path, tmp_path / "states").train()


def test_a_missing_head_file_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    _trainer(tmp_path, folder, teacher=_model()).fill_teacher_cache()
    (head,) = folder.glob("head-*")
    head.unlink()
    assert not TeacherStore(folder).has_head_file
    _trainer(tmp_path, folder, teacher=_model())
    assert TeacherStore(folder).has_head_file


def test_the_steps_denominators_are_those_of_the_teacher(tmp_path: Path) -> None:
    """They follow from importance alone, which int8 does not round."""
    trainers = [_trainer(tmp_path, *where, teacher=_model()) for where in ((), (tmp_path / "states", "int8"))]
    trainers[1].fill_teacher_cache()
    made = []
    for trainer in trainers:
        batches = [dict(batch) for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
        made.append(trainer._step_denominators(batches))
    torch.testing.assert_close(*made, rtol=1e-6, atol=0)


def test_filled_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer(tmp_path, tmp_path / "states", teacher=_model(), max_steps=2)
    trainer.train()
    assert len(TeacherStore(tmp_path / "states")) == 8
    assert "teacher: 0 of 24 rows in" in capsys.readouterr().out
    again = _trainer(tmp_path, tmp_path / "states", teacher=_model(), max_steps=2)
    again._cached.live = SimpleNamespace(run=lambda *_: pytest.fail("the teacher ran"))
    again.train()
    assert [each.stat().st_size for each in (tmp_path / "states").glob("rows-*")]


def test_a_run_that_reads_less_fills_in_all(tmp_path: Path) -> None:
    """A cache holds the same of every row, also where a run that fills it reads neither logits nor entropy."""
    mta = replace(CONFIG, weighting="entropy")
    folder, rows = tmp_path / "states", make_rows()
    _trainer(tmp_path, folder, teacher=_model(), mta=mta, rows=rows[:20]).fill_teacher_cache()
    _trainer(tmp_path, folder, teacher=_model(), base_loss=None, rows=rows).fill_teacher_cache()
    assert len(TeacherStore(folder)) == 24
    live, cached = _trainer(tmp_path, teacher=_model(), mta=mta), _trainer(tmp_path, folder, mta=mta)
    assert cached.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-5)


def test_what_is_not_stored_is_not_read(tmp_path: Path) -> None:
    """Padding, and last states of positions that don't count: NaN in their place changes nothing."""
    mta = replace(CONFIG, layer_pairs=((1, 2), (2, 4), (3, 6)))
    _trainer(tmp_path, tmp_path / "states", teacher=_model(), mta=mta).fill_teacher_cache()
    cached = _trainer(tmp_path, tmp_path / "states", mta=mta)
    expected = _flat(_losses(cached))
    make = cached._teacher_pass

    def poisoned(batch: Any) -> Any:
        output = make(batch)
        for states in (*output.hidden_states.values(), output.head.states):
            states[states.abs().sum(-1) == 0] = torch.nan
        return output

    cached._teacher_pass = poisoned
    assert all(torch.equal(left, right) for left, right in zip(_flat(_losses(cached)), expected, strict=True))


def test_rows_that_the_student_writes(tmp_path: Path) -> None:
    """DistiLLM's rows are not the data's: the teacher runs, and they are not kept; refused where it isn't loaded."""

    def trainer(teacher: Any) -> Any:
        method = base_method(
            "distillm", threshold=0.9, increase=0, schedule="constant", generation={"max_new_tokens": 4}
        )
        extractor = SpanExtractor()
        return _trainer(
            tmp_path, tmp_path / "states", teacher=teacher, base_loss=method, span_extractor=extractor, max_steps=2
        )

    made = trainer(_model())
    made.train()
    stored = len(TeacherStore(tmp_path / "states"))
    assert stored <= 8  # of two steps of the data, and none of the student's
    made.fill_teacher_cache()
    assert len(TeacherStore(tmp_path / "states")) == 24
    with pytest.raises(InputError, match="expected a model that runs, as DistiLLM trains on rows"):
        trainer(None).train()


def test_keys_don_t_know_padding() -> None:
    tokenizer = make_tokenizer()
    rows = make_rows()[:3]
    alone = [teacher_rows(SpanCollator(tokenizer)([row]))[0] for row in rows]
    together = SpanCollator(tokenizer, pad_to_multiple_of=64)(rows)
    shifted = copy.deepcopy(tokenizer)
    shifted.padding_side = "left"
    left = SpanCollator(shifted)(rows)
    assert [row.key for row in teacher_rows(together)] == [row.key for row in alone]
    assert [row.key for row in teacher_rows(left)] == [row.key for row in alone]
    labels = together["labels"].clone()
    labels[0, int(labels[0].ne(-100).nonzero()[0])] = -100
    other = {**together, "labels": labels}
    assert [row.key for row in teacher_rows(other)] != [row.key for row in alone]
    flat = {name: torch.cat([together[name][b][together["attention_mask"][b] == 1] for b in range(3)])[None]
            for name in ("input_ids", "labels")}  # fmt: skip
    lengths = together["attention_mask"].sum(1).tolist()
    flat["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    assert [row.key for row in teacher_rows(flat)] == [row.key for row in alone]


def test_given_importance_is_used_and_checked() -> None:
    batch = make_batch("right")
    states, student = (
        {layer: batch.lay(random_rows(batch.lengths, 6, dtype=torch.float32)) for layer in (1, 2)} for _ in range(2)
    )
    loss = MTALoss(replace(CONFIG, layer_pairs=((1, 1), (2, 2)), granularity=("word", "phrase")), 6, 6)
    made, mask = {"word": batch.spans, "phrase": batch.spans}, batch.mask
    importance = {layer: token_importance(state, mask) for layer, state in states.items()}
    expected = loss(student, states, made).loss
    torch.testing.assert_close(loss(student, states, made, teacher_importance=importance).loss, expected)
    other = {layer: values**2 for layer, values in importance.items()}
    assert not torch.isclose(loss(student, states, made, teacher_importance=other).loss, expected)
    assert not torch.equal(loss.denominators(states, made, teacher_importance=other), loss.denominators(states, made))
    with pytest.raises(InputError, match=r"teacher_importance: expected that of layer 2, got layers \[1\]"):
        loss(student, states, made, teacher_importance={1: importance[1]})
    with pytest.raises(InputError, match=r"teacher_importance\[1\]: expected shape \(6, 35\)"):
        loss(student, states, made, teacher_importance={1: importance[1][:1], 2: importance[2]})


# --- int8 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 31, 32, 33, 96])
def test_int8(width: int) -> None:
    states = torch.randn(5, width) * torch.logspace(-3, 3, width)
    codes, scales = quantize(states)
    assert (codes.shape, scales.shape) == ((5, width), (5, -(-width // 32)))
    largest = torch.nn.functional.pad(states, (0, -width % 32)).unflatten(1, (-1, 32)).abs().amax(-1)
    bound = (largest / 127).repeat_interleave(32, 1)[:, :width]
    assert ((dequantize(codes, scales) - states).abs() <= 0.51 * bound + 1e-9).all()
    assert not dequantize(*quantize(torch.zeros(2, width))).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_states_that_can_t_be_stored_are_refused(value: float, dtype: str) -> None:
    states = torch.zeros(3, 8)
    states[1, 2] = value
    if value == 1e30 and dtype == "bfloat16":
        assert Contents(dtype, {1: 8}).encode({1: states}, {}, None, None, torch.tensor([0]))
        return
    with pytest.raises(InputError, match=f"expected finite states that {dtype} can hold, its hidden state 1"):
        Contents(dtype, {1: 8}).encode({1: states}, {}, None, None, torch.tensor([0]))


# --- files -------------------------------------------------------------------------------------------------------

CONTENTS = Contents("int8", {1: 40, 2: 8}, importance=(1,), last=8, shared=2)


def _store(folder: Path, rows: int = 3, contents: Contents = CONTENTS) -> TeacherStore:
    """A cache of some rows, one shard each."""
    store = TeacherStore.create(folder, {"identity": {}, "contents": contents.to_dict(), "source": None}, {})
    store.lock()
    for row in range(rows):
        store.add(bytes([row]) * 16, _record(row, contents))
        store.flush()
    store.close()
    return TeacherStore(folder)


def _record(row: int, contents: Contents = CONTENTS, tokens: int = 4) -> Record:
    torch.manual_seed(row)
    states = {layer: torch.randn(tokens, width) for layer, width in contents.layers.items()}
    last = states.get(contents.shared) if contents.shared is not None else torch.randn(tokens, contents.last)
    return contents.encode(states, {1: torch.rand(tokens)}, last, torch.rand(tokens), torch.tensor([1, 2]))


def test_rows_come_back(tmp_path: Path) -> None:
    for i, contents in enumerate(
        (CONTENTS, replace(CONTENTS, shared=None, entropy=9), replace(CONTENTS, dtype="float32"))
    ):
        store = _store(tmp_path / str(i), contents=contents)
        assert len(store) == 3
        for row in range(3):
            expected = _record(row, contents)
            read = store.read(bytes([row]) * 16)
            assert read.keys() == expected.keys()
            assert all(torch.equal(read[name], value) for name, value in expected.items())
            assert sum(value.nbytes for value in read.values()) == contents.size(4, 2)


@pytest.mark.parametrize("damage", ["truncated", "header", "flipped"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    _store(tmp_path)
    shard = sorted(tmp_path.glob("rows-*"))[1]
    data = bytearray(shard.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    if damage == "header":
        data[0] ^= 0xFF
    shard.write_bytes(data[:-7] if damage == "truncated" else data)
    with pytest.raises(
        InputError, match=f"{shard.name}: expected the teacher's states as they were written, got other"
    ):
        [TeacherStore(tmp_path).read(bytes([row]) * 16) for row in range(3)]
    shard.unlink()
    assert len(TeacherStore(tmp_path)) == 2  # teach makes its rows again


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        InputError, match="expected a free name or a cache of a teacher's states, got a folder with thesis"
    ):
        _store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="expected a cache of a teacher's states, there is none; mta-fast teach"):
        TeacherStore(tmp_path)
    _store(tmp_path / "states")
    (tmp_path / "states/teacher.json").write_text("{")
    with pytest.raises(InputError, match=r"teacher.json: expected the description of a teacher's cache, it can't be"):
        TeacherStore(tmp_path / "states")


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mta_fast.distill.teacher import store as module

    trainer = _trainer(tmp_path, tmp_path / "states", teacher=_model())
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(
            InputError, match="expected room for 8.. KB of teacher states, 1 KB are free there; make room"
        ):
            trainer.fill_teacher_cache()
    assert not list((tmp_path / "states").glob("rows-*"))

    def full(self: Path, data: bytes) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(CheckpointError, match="expected to write 8.. KB of teacher states, got: .*No space left"):
            trainer.fill_teacher_cache()
    assert not list((tmp_path / "states").glob("rows-*"))
    trainer.fill_teacher_cache()
    announced = trainer._cached.store.contents
    stored = sum(path.stat().st_size for path in (tmp_path / "states").glob("rows-*"))
    rows = [row for each in (trainer.train_dataset, trainer.eval_dataset) for row in each]
    sizes = [(len(row.tokens), len(row.counted)) for row in teacher_rows(trainer._unaligned(rows))]
    assert announced.size(*map(sum, zip(*sizes, strict=True))) == pytest.approx(stored, rel=0.02)


def test_another_teacher_and_other_layers(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    mta = replace(CONFIG, layer_pairs=((2, 4), (4, 8)), granularity=("word", "phrase"))
    _trainer(tmp_path, folder, teacher=_model(), mta=mta).fill_teacher_cache()
    other = _model()
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[5, 7] += 1e-3
    for teacher, options, message in (
        (other, {"mta": mta}, r"they differ in \(stored -> now\) teacher: [0-9a-f]* -> [0-9a-f]*; give another"),
        (_model().bfloat16(), {"mta": mta}, r"dtype: \['float32'\] -> \['bfloat16'\]"),
        (
            None,
            {"mta": replace(mta, causal=True)},
            "expected a cache with importance with causal=True, it has causal=False",
        ),
        (None, {"mta": CONFIG}, r"expected layers \[4, 6, 8\], it has \[4, 8\]; run"),
        (_model(), {"mta": CONFIG}, r"expected a cache with layers \[4, 6, 8\], it has \[4, 8\]"),
        (None, {"mta": mta, "bf16": True}, "autocast: None -> bfloat16"),
        (
            None,
            {"mta": replace(mta, weighting="entropy")},
            "expected a cache with entropy weights, over ids: 512, it has none",
        ),
        (None, {"mta": mta, "dtype": "int8"}, "expected a cache with cache_dtype int8, it has float32"),
    ):
        with pytest.raises(InputError, match=message):
            _trainer(tmp_path, folder, teacher=teacher, **options)
    _trainer(tmp_path, folder, mta=replace(mta, layer_pairs=((2, 4),), granularity=("word",)))  # less than it has
    head = _model()
    torch.nn.init.normal_(head.lm_head.weight)
    with pytest.raises(InputError, match="expected the LM head of this teacher, it has another one"):
        _trainer(tmp_path, folder, teacher=head, mta=mta)
    (file,) = folder.glob("head-*")
    file.unlink()
    with pytest.raises(
        InputError, match="expected the teacher's LM head, there is none; mta-fast teach writes it again"
    ):
        _trainer(tmp_path, folder, mta=mta)
    _trainer(tmp_path, folder, teacher=_model(), mta=mta)
    assert file.is_file()


def test_what_has_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected count_padding=False, got True .*public"):
        _trainer(tmp_path, tmp_path / "states", teacher=_model(), mta=replace(CONFIG, count_padding=True))
    with pytest.raises(InputError, match="expected a run that reads its teacher, got none"):
        _trainer(tmp_path, tmp_path / "states", teacher=_model(), mta=None, base_loss="cross_entropy")
    with pytest.raises(InputError, match="cache_dtype"):
        TeacherCache(tmp_path, "int4")
    with pytest.raises(InputError, match="teacher_cache: expected one to fill, got none"):
        _trainer(tmp_path, teacher=_model()).fill_teacher_cache()


# --- the command -------------------------------------------------------------------------------------------------

# teaches into shards of a few rows, and stops for ever once two are there and a third is half written
_TEACH = """
import os, sys
from pathlib import Path
from processes import hold
from mta_fast.__main__ import main
from mta_fast.distill.teacher import store

store.SHARD_BYTES, written, write = 4000, [], Path.write_bytes

def write_bytes(self, data):
    if len(written) < 2:
        written.append(self)
        return write(self, data)
    write(self, data[: len(data) // 2])
    print("half", flush=True)
    hold(int(sys.argv[1]))

def atomic(self, data):
    return write_bytes(self, data) if self.name.startswith("rows-") else write(self, data)

Path.write_bytes = atomic
sys.exit(main(["teach", sys.argv[2]]))
"""


def test_teach_survives_a_kill_and_a_second_process(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """One process fills the cache, another reads what is there; the first is killed, and its rows made by a third."""
    config, states = run_folder / "run.yaml", run_folder / "states"
    config.write_text(
        config.read_text().replace("/teacher}", f"/teacher, cache: {states}, cache_dtype: float32}}")
        + "  per_device_eval_batch_size: 2\n  logging_strategy: 'no'\n"
    )
    command = [sys.executable, "-c", _TEACH, str(os.getpid()), str(config)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any(line == "half\n" for line in process.stdout)
            whole = sorted(path.name for path in states.glob("rows-*.safetensors"))
            assert len(whole) == 2
            assert main(["teach", str(config)]) == 2
            assert f"expected no process at work in it, process {process.pid}" in capsys.readouterr().err
            training = [
                "train",
                str(config),
                "--override",
                "training.max_steps=2",
                "--override",
                "training.eval_strategy=no",
            ]
            assert main(training) == 0
            assert "teacher: its states are not kept: " in capsys.readouterr().out
            assert sorted(path.name for path in states.glob("rows-*.safetensors")) == whole
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(LIMIT)
    assert list(states.glob("*.partial"))
    assert main(["teach", str(config)]) == 0
    assert f"of 12 rows in {states}; the others take" in capsys.readouterr().out
    assert not list(states.glob("*.partial"))
    assert set(whole) < {path.name for path in states.glob("rows-*.safetensors")}
    assert len(TeacherStore(states)) == 12
    # training loads nothing of the teacher
    again = [*training, "--override", f"output_dir={run_folder / 'again'}"]
    with pytest.MonkeyPatch.context() as patched:
        loaded = run.load_model
        patched.setattr(
            run, "load_model", lambda name, **o: pytest.fail(name) if "teacher" in name else loaded(name, **o)
        )
        assert main(again) == 0
    assert f"teacher: 12 of 12 rows in {states}\n" in capsys.readouterr().out
    first, second = (
        load_file(each / "student/model.safetensors") for each in (run_folder / "run", run_folder / "again")
    )
    assert all(torch.allclose(value, second[name], atol=1e-5) for name, value in first.items())


def test_teach_says_what_it_needs(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    config = str(run_folder / "run.yaml")
    assert main(["teach", config]) == 2
    assert "teacher.cache: expected a folder for the teacher's states, got none" in capsys.readouterr().err
    assert main(["teach", config, "--override", f"teacher.cache={run_folder}"]) == 2
    assert "expected a target apart from what is read" in capsys.readouterr().err
    assert main(["teach", config, "--override", "teacher.cache_dtype=int4"]) == 2
    assert (
        "teacher.cache_dtype: expected one of int8, bfloat16, float16, float32, got 'int4'" in capsys.readouterr().err
    )
