"""Where the projections of Hid start: identity, and ridge regression against NumPy's least squares in float64."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import EDGE_ROWS, LAYOUTS, make_batch
from torch import Tensor

from mta_fast import MTAConfig, MTALoss
from mta_fast.errors import InputError
from mta_fast.loss import MTAExplanation

PAIRS, KINDS, STUDENT_DIM, TEACHER_DIM = ((1, 2), (3, 5)), ("word", "phrase"), 5, 7
ROWS = {"word": [(n, [(j, j + 1) for j in range(n)]) for n, _ in EDGE_ROWS], "phrase": EDGE_ROWS}


def make_loss(**changes: Any) -> MTALoss:
    return MTALoss(MTAConfig(PAIRS, KINDS, **changes), STUDENT_DIM, TEACHER_DIM).double()


def inputs(layout: str = "right", rows: slice = slice(None), **changes: Any) -> dict[str, Any]:
    """The arguments of MTALoss.forward for some of the edge rows; the same states in every layout."""
    batches = {kind: make_batch(layout, of[rows]) for kind, of in ROWS.items()}
    generator = torch.Generator().manual_seed(7)

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = (
        {layer: batches["word"].lay([states(n, dim) for n, _ in EDGE_ROWS][rows]) for layer in layers}
        for dim, layers in ((STUDENT_DIM, (1, 3)), (TEACHER_DIM, (2, 5)))
    )
    entropy = batches["word"].lay([torch.rand(n, generator=generator).double() for n, _ in EDGE_ROWS][rows])
    made = {"student_hidden": student, "teacher_hidden": teacher}
    made["spans"] = {kind: batch.spans for kind, batch in batches.items()}
    return made | ({"entropy_weights": entropy} if changes.get("weighting") == "entropy" else {})


def with_two_tokenizers(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"teacher_spans": {kind: copy.copy(spans) for kind, spans in batch["spans"].items()}}


def expected(loss: MTALoss, batches: list[dict[str, Any]], strength: float) -> list[np.ndarray]:
    """Each P' as the least-squares solution of [sqrt(w) A; sqrt(r tr(A'wA)/d_S) I] P' = [sqrt(w) B; 0]."""
    made = []
    for i, ((own, other), kind) in enumerate(zip(PAIRS, loss.config.granularity, strict=True)):
        rows_a, rows_b, weights = [], [], []
        for batch in batches:
            explained = loss(**batch, explain=True)
            assert isinstance(explained, MTAExplanation)
            pair = explained.layer_pairs[i]
            if "teacher_spans" in batch:
                assert pair.student_spans is not None
                assert pair.teacher_spans is not None
                a, b = pair.student_spans.states, pair.teacher_spans.states
            else:
                covered = batch["spans"][kind].covered.long()
                a = batch["student_hidden"][own].reshape(-1, STUDENT_DIM)[covered]
                b = batch["teacher_hidden"][other].reshape(-1, TEACHER_DIM)[covered]
            rows_a.append(a.numpy())
            rows_b.append(b.numpy())
            weights.append(pair.hid_weights.double().numpy())  # type: ignore[union-attr]  # Hid is on
        a, b, w = np.concatenate(rows_a), np.concatenate(rows_b), np.concatenate(weights)[:, None] ** 0.5
        a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
        ridge = (strength * ((w * a) ** 2).sum() / STUDENT_DIM) ** 0.5 * np.eye(STUDENT_DIM)
        zeros = np.zeros((STUDENT_DIM, TEACHER_DIM))
        made.append(np.linalg.lstsq(np.vstack([w * a, ridge]), np.vstack([w * b, zeros]), rcond=None)[0].T)
    return made


def assert_fitted(loss: MTALoss, wanted: list[np.ndarray], tolerance: float = 1e-10) -> None:
    for projection, weight in zip(loss.projections, wanted, strict=True):
        torch.testing.assert_close(projection.weight.detach(), torch.tensor(weight), rtol=tolerance, atol=tolerance)
        assert projection.bias is None or projection.bias.eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ridge_is_the_least_squares_solution(layout: str) -> None:
    loss = make_loss()
    wanted = expected(loss, [inputs(layout)], 0.25)
    before = loss(**inputs(layout)).hid
    loss.fit_projections([inputs(layout)], strength=0.25)
    assert_fitted(loss, wanted)
    assert loss(**inputs(layout)).hid < before


@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "uniform"},
        {"weighting": "entropy"},
        {"normalization": "sample"},
        {"lambda_dsa": 0.0},
        {"projection_bias": False},
        {"student_pooling": "own"},
    ],
    ids=str,
)
@pytest.mark.parametrize("two_tokenizers", [False, True])
def test_the_weights_are_those_of_hid(changes: dict[str, Any], two_tokenizers: bool) -> None:
    loss, batch = make_loss(**changes), inputs(**changes)
    batch = with_two_tokenizers(batch) if two_tokenizers else batch
    wanted = expected(loss, [batch], 0.1)
    loss.fit_projections(iter([batch]), strength=0.1)
    assert_fitted(loss, wanted)


def test_batches_are_summed() -> None:
    whole, parts, ranks = make_loss(), make_loss(), make_loss()
    pieces = [inputs(rows=slice(0, 2)), inputs(rows=slice(2, 4)), inputs(rows=slice(4, 6))]  # the second without spans
    wanted = expected(whole, pieces, 0.1)
    whole.fit_projections([inputs()], strength=0.1)
    parts.fit_projections(pieces, strength=0.1)
    assert_fitted(whole, wanted)
    assert_fitted(parts, wanted)
    ranks.fit_projections([inputs()], strength=0.1, reduce=lambda own: 3 * own)  # all of them the same rows
    assert_fitted(ranks, wanted)


def test_fewer_tokens_than_features() -> None:
    """A'wA is singular then; the strength makes it solvable, the smallest too."""
    loss, batch = make_loss(), inputs(rows=slice(1, 2))  # one token
    for strength in (1e-9, 0.1, 1e6):
        wanted = expected(loss, [batch], strength)
        loss.fit_projections([batch], strength=strength)
        assert_fitted(loss, wanted, 1e-6)
    batch["student_hidden"][1][:] = 0
    with pytest.raises(InputError, match="with states other than 0, got none for layer pair 0 of 2"):
        loss.fit_projections([batch])
    assert_fitted(loss, wanted, 1e-6)  # as before


def test_states_of_any_length() -> None:
    """Vectors count by their direction, in half precision and far beyond float32's squares too."""
    loss, batch = make_loss(), inputs()
    wanted = expected(loss, [batch], 0.1)
    scaled = {layer: state * 1e200 for layer, state in batch["student_hidden"].items()}
    half = {layer: state.bfloat16() for layer, state in batch["teacher_hidden"].items()}
    explained = loss(**batch | {"teacher_hidden": half}, explain=True).layer_pairs  # type: ignore[union-attr]
    assert all(pair.compared.teacher.dtype == torch.bfloat16 for pair in explained)
    loss.fit_projections([batch | {"student_hidden": scaled}], strength=0.1)
    assert_fitted(loss, wanted)
    loss.fit_projections([batch | {"teacher_hidden": half}], strength=0.1)
    assert_fitted(loss, wanted, 0.05)


def test_the_optimiser_keeps_the_projections() -> None:
    loss = make_loss()
    held = list(loss.parameters())
    loss.fit_projections([inputs()])
    assert all(one is other for one, other in zip(held, loss.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in held)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(InputError, match="lambda_hid: expected a number > 0, as only Hid has projections, got 0"):
        make_loss(lambda_hid=0.0).fit_projections([inputs()])
    for strength in (0, -1.0, float("nan"), float("inf"), True, "0.1"):
        with pytest.raises(InputError, match="strength: expected a finite number >= 1e-9, got"):
            make_loss().fit_projections([inputs()], strength=strength)  # type: ignore[arg-type]  # on purpose
    loss = make_loss()
    held = [p.detach().clone() for p in loss.parameters()]
    for batches in ([], [inputs(rows=slice(2, 4))]):
        with pytest.raises(InputError, match="expected tokens that spans cover.* got none for layer pair 0 of 2; give"):
            loss.fit_projections(batches if not batches else [phrases_alone(batches[0])])
    broken = inputs()
    broken["student_hidden"][3][0, 1] = torch.nan
    with pytest.raises(InputError, match="expected finite hidden states, got NaN or infinite ones at layer pair 1 of"):
        loss.fit_projections([inputs(), broken])
    assert all(torch.equal(one, other) for one, other in zip(held, loss.parameters(), strict=True))


def phrases_alone(batch: dict[str, Any]) -> dict[str, Any]:
    """Rows 2 and 3 have no phrases: their words are taken away too."""
    return batch | {"spans": dict.fromkeys(("word", "phrase"), batch["spans"]["phrase"])}


@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (3, 5), (5, 3)])
def test_the_identity_copies_the_features_that_both_have(student: int, teacher: int) -> None:
    loss = MTALoss(MTAConfig([(0, 0)]), student, teacher)
    (projection,) = loss.projections
    projection.start_at_identity()  # type: ignore[operator]  # a Projection
    state = torch.arange(1.0, student + 1)
    mapped = torch.nn.functional.linear(state, projection.weight, projection.bias)
    assert mapped.tolist() == [j if j <= student else 0 for j in range(1, teacher + 1)]


# --- in the trainer ----------------------------------------------------------------------------------------------

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models import make_model, make_tokenizer  # noqa: E402
from training import CONFIG, STUDENT_LAYERS, logged, make_pairs, make_rows, make_trainer, weights  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from mta_fast import SpanCollator, SpanExtractor, capture_layers  # noqa: E402
from mta_fast.distill.methods.distillm import DistiLLM  # noqa: E402
from mta_fast.distill.training import starting  # noqa: E402
from mta_fast.distill.training.caching import TeacherCache  # noqa: E402
from mta_fast.inputs import model_inputs  # noqa: E402

RIDGE: dict[str, Any] = {"projection_init": "ridge", "projection_init_rows": 8}


class Beginning(TrainerCallback):
    """What the first step begins with, and the rows of every step."""

    def __init__(self, trainer: Any) -> None:
        self.projections: list[Tensor] = []
        self.random: list[Any] = []
        self.rows: list[Any] = []
        self.trainer, fetch = trainer, trainer.get_batch_samples

        def fetched(*args: Any) -> Any:
            found = fetch(*args)
            self.rows += [batch["input_ids"].tolist() for batch in found[0]]
            return found

        trainer.get_batch_samples = fetched
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.projections = [p.detach().clone() for p in self.trainer._module.mta.parameters()]
        self.random = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]  # of the kind "MT19937"


class Drawing(SpanCollator):
    """One that uses up random numbers of every kind."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        torch.rand(1), random.random(), np.random.rand()
        return super().__call__(rows)


def shaky_student() -> Any:
    """One with dropout, which uses up random numbers in every step."""
    student = make_model("gpt2", STUDENT_LAYERS, vocabulary=len(make_tokenizer()))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return student


def run(out: Path, **options: Any) -> tuple[Any, Beginning]:
    trainer = make_trainer(out, **options)
    beginning = Beginning(trainer)
    trainer.train()
    return trainer, beginning


def by_hand(trainer: Any, rows: list[dict[str, Any]], strength: float) -> list[Tensor]:
    """The projections fitted on rows as a user's own loop would."""
    mta, student, teacher = copy.deepcopy(trainer._module.mta), trainer._module.student.eval(), trainer.teacher
    batch = SpanCollator(make_tokenizer(), max_length=64)(rows)
    with torch.no_grad(), capture_layers(teacher, mta.config.teacher_layers) as teacher_hidden:
        teacher(**model_inputs(teacher, batch))
    with torch.no_grad(), capture_layers(student, mta.config.student_layers) as student_hidden:
        student(**model_inputs(student, batch))
    one = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden, "spans": batch["spans"]}
    mta.fit_projections([one], strength=strength)
    return [p.detach() for p in mta.parameters()]


@pytest.mark.parametrize("bias", [True, False])
def test_a_run_starts_at_ridge_and_sees_the_rows_of_one_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bias: bool
) -> None:
    config = MTAConfig(CONFIG.layer_pairs, CONFIG.granularity, projection_bias=bias)
    common: dict[str, Any] = {"mta": config, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    common["data_collator"] = Drawing(make_tokenizer(), max_length=64)
    plain, without = run(tmp_path / "a", student=shaky_student(), **common)
    assert "projections" not in capsys.readouterr().out
    fresh = make_trainer(tmp_path / "b", student=shaky_student(), **common)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(42)).tolist()
    wanted = by_hand(fresh, [make_rows()[i] for i in order[2:10]], 0.5)
    trainer, begun = run(tmp_path / "c", student=shaky_student(), projection_init_ridge=0.5, **RIDGE, **common)
    for got, weight in zip(begun.projections, wanted, strict=True):
        torch.testing.assert_close(got, weight, rtol=1e-3, atol=1e-4)
    assert begun.rows == without.rows
    assert begun.random == without.random
    for name in ("base", "dsa"):  # the first step's: neither reads the projections
        assert logged(trainer, name)[0] == logged(plain, name)[0]
    assert logged(trainer, "hid")[0] < 0.9 * logged(plain, "hid")[0]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("projections")]
    assert len(said) == 1
    assert said[0].startswith("projections: ridge (0.5) on 8 rows; Hid of 2 other rows, by layer pair: ")
    before, after = ([float(value) for value in part.split()] for part in said[0].split(": ")[2].split(" -> "))
    assert len(before) == len(after) == 3
    assert sum(after) < sum(before)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True, "family": "llama"},
        {"max_tokens_per_batch": 128, "per_device_train_batch_size": 8},
        {"bf16": True},
        {"base_loss": DistiLLM(threshold=1.0, schedule="constant", generation={"max_new_tokens": 2})},
        {"base_loss": "distillm2"},
        {"base_loss": "fdd"},
        {"base_loss": None, "fused_head": False},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: " ".join(map(str, options)) + str(options.get("base_loss", ""))[:5],
)
def test_every_kind_of_run_starts_at_ridge(tmp_path: Path, options: dict[str, Any]) -> None:
    if isinstance(options.get("base_loss"), DistiLLM):
        options = options | {"span_extractor": SpanExtractor(), "eval_strategy": "steps"}
    rows = make_pairs(make_rows()) if options.get("base_loss") == "distillm2" else make_rows()
    common = {"rows": rows, "max_steps": 1, **options}
    plain, without = run(tmp_path / "a", **copy.deepcopy(common))
    trainer, begun = run(tmp_path / "b", **copy.deepcopy(common), **RIDGE)
    assert begun.rows == without.rows
    assert logged(trainer, "hid")[0] < 0.9 * logged(plain, "hid")[0]


def test_a_half_precision_teacher_an_adapter_and_a_cache(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = make_tokenizer()

    def models() -> dict[str, Any]:
        student = make_model("gpt2", STUDENT_LAYERS, vocabulary=len(tokenizer))
        lora = peft.get_peft_model(student, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
        return {"student": lora, "teacher": make_model("llama", 8, width=48, vocabulary=len(tokenizer)).bfloat16()}

    common: dict[str, Any] = {"max_steps": 1, **RIDGE}
    live, begun = run(tmp_path / "a", **models(), **common)
    assert logged(live, "hid")[0] < 0.6
    cache = TeacherCache(tmp_path / "states", "bfloat16")
    filled, first = run(tmp_path / "b", **models(), teacher_cache=cache, **common)
    filled.fill_teacher_cache()
    _, second = run(tmp_path / "c", student=models()["student"], teacher_cache=cache, **common)
    for one, other, live_one in zip(first.projections, second.projections, begun.projections, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one, live_one, rtol=1e-2, atol=1e-2)


def test_two_tokenizers_are_fitted_on_spans(tmp_path: Path) -> None:
    other = make_tokenizer(400)
    teacher = make_model("llama", 8, width=48, vocabulary=len(other))
    common: dict[str, Any] = {"teacher_tokenizer": other, "base_loss": None, "max_steps": 1}
    plain, without = run(tmp_path / "a", teacher=copy.deepcopy(teacher), **common)
    trainer, begun = run(tmp_path / "b", teacher=teacher, **common, **RIDGE)
    assert begun.rows == without.rows
    assert logged(trainer, "hid")[0] < 0.9 * logged(plain, "hid")[0]


def test_a_resumed_run_has_its_own_projections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, **RIDGE}
    whole, _ = run(tmp_path, **options)
    capsys.readouterr()
    again = make_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert "projections" not in capsys.readouterr().out
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], value)
    with pytest.raises(InputError, match="training.projection_init: ridge -> default"):
        make_trainer(tmp_path, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=True)
    again.train()  # once more from the start: it goes on with what was trained
    assert "projections" not in capsys.readouterr().out


def test_a_stream_is_read_from_its_beginning_twice(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = make_rows()[:12]

    def started(stream: Any, **options: Any) -> Beginning:
        trainer = make_trainer(tmp_path, max_steps=3)
        trainer.train_dataset = stream
        trainer = make_trainer(tmp_path, max_steps=3, **options)
        trainer.train_dataset = stream
        beginning = Beginning(trainer)
        trainer.train()
        return beginning

    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    without, begun = started(stream), started(stream, **RIDGE)
    assert begun.rows == without.rows
    fresh = make_trainer(tmp_path)
    for got, weight in zip(begun.projections, by_hand(fresh, rows[4:12], 0.1), strict=True):
        torch.testing.assert_close(got, weight, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="expected a stream that can be read from its beginning again"):
        started(itertools.cycle(rows), **RIDGE)


def test_few_rows_and_none_that_can_be_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a", rows=make_rows()[:3], max_steps=1, **RIDGE)
    assert "ridge (0.1) on 3 rows; Hid of 3 the same rows" in capsys.readouterr().out
    bare = [row | {"word_spans": [], "phrase_spans": []} for row in make_rows()]
    with pytest.raises(InputError, match="expected tokens that spans cover.*projection_init_rows"):
        run(tmp_path / "b", rows=bare, **RIDGE)


def test_the_identity_in_a_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, projection_init="identity")
    for projection in trainer._module.mta.projections:
        assert torch.equal(projection.weight.detach(), torch.eye(48, 32))
        assert projection.bias.eq(0).all()


def test_without_hid_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of rows switches Hid and MTA off one by one."""
    for mta in (None, MTAConfig(CONFIG.layer_pairs, CONFIG.granularity, lambda_hid=0.0)):
        make_trainer(tmp_path, mta=mta, max_steps=1, **RIDGE).train()
    assert "projections" not in capsys.readouterr().out


def test_starts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"projection_init": "rigde"}, "projection_init: .*ridge"),
        ({"projection_init": "ridge", "projection_init_ridge": 0.0}, "projection_init_ridge: expected a finite number"),
        ({"projection_init": "ridge", "projection_init_rows": 0}, "projection_init_rows: expected a number of rows"),
        ({"projection_init_rows": 8}, "projection_init_rows: expected its default beside projection_init 'default'"),
        ({"projection_init": "identity", "projection_init_ridge": 0.2}, "projection_init_ridge: expected its default"),
    ):
        with pytest.raises(InputError, match=message):
            make_trainer(tmp_path, **options)
    trainer = make_trainer(tmp_path, **RIDGE)
    with pytest.raises(InputError, match="projection_init: expected default or identity with FSDP or DeepSpeed"):
        starting.start_of(trainer._module.mta, trainer.args, sharded=True)


def test_rows_that_are_read_before_training_go_to_the_device_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))  # one that nothing is on by itself
    moved = trainer._prepare_inputs(batch)
    tensors = [value for value in moved.values() if isinstance(value, Tensor)]
    assert {value.device.type for value in [*tensors, *moved["spans"].values()]} == {"meta"}
