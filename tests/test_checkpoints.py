"""Checkpoints: exact resume, whole or absent, refused when they don't fit, plain exports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from training import CONFIG, STUDENT_LAYERS, logged, make_trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from mta_fast.config import MTAConfig
from mta_fast.distill.training import checkpoints
from mta_fast.errors import InputError
from mta_fast.files import MARKER, CheckpointError, atomic_folder

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
TESTS = Path(__file__).parent


def _with_dropout() -> Any:
    """A student whose steps use random numbers."""
    model = make_model("gpt2", STUDENT_LAYERS, vocabulary=len(make_tokenizer()))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


def _lora() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    student = make_model("llama", STUDENT_LAYERS, vocabulary=len(make_tokenizer()))
    return peft.get_peft_model(student, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("make_student", [_with_dropout, _lora])
@pytest.mark.parametrize("step", [2, 4])  # in the middle of an epoch, and at its end
def test_resume_is_bitwise(tmp_path: Path, make_student: Any, step: int) -> None:
    options = SAVING | {"max_steps": 6}
    whole = make_trainer(tmp_path / "whole", student=make_student(), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", student=make_student(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
    for name in ("loss", "base", "dsa", "hid", "grad_norm"):
        assert logged(resumed, name)[-6 + step :] == logged(whole, name)[-6 + step :]
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())


def test_a_checkpoint_is_a_plain_student_with_the_projections_beside_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    own = trainer.model.student.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
    assert sorted(path.name for path in (folder / "mta").iterdir()) == ["config.json", "projections.safetensors"]
    loss = checkpoints.load_loss(folder)
    assert loss is not None
    assert loss.config == CONFIG
    trained = trainer.model.mta.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loss.state_dict().items())
    assert checkpoints.load_loss(tmp_path) is None
    assert not (tmp_path / ".partial").exists()


def test_export_is_a_plain_student(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.export_student(tmp_path / "student")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values())
    assert AutoTokenizer.from_pretrained(tmp_path / "student").eos_token == make_tokenizer().eos_token
    files = {path.name for path in (tmp_path / "student").rglob("*")} - {MARKER}
    assert not any("mta" in name or "projection" in name or "training_args" in name for name in files)
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(model(tokens).logits, trainer.model.student.eval()(tokens).logits)


def test_export_merges_adapters(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model("llama", STUDENT_LAYERS, vocabulary=len(make_tokenizer())).save_pretrained(base)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    lora = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    trainer = make_trainer(tmp_path / "run", student=lora, **SAVING)
    trainer.train()
    tokens = torch.arange(6)[None]
    expected = lora.eval()(tokens).logits
    assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(base)(tokens).logits)
    trainer.export_student(tmp_path / "live")
    checkpoints.export_checkpoint(tmp_path / "run/checkpoint-4", tmp_path / "later")
    for folder in ("live", "later"):
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values())
        assert not (tmp_path / folder / "adapter_config.json").exists()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lora(tokens).logits, expected)  # the one in training stays as it is


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path) -> None:
    options = SAVING | {"max_steps": 6, "learning_rate": 3.0, "save_total_limit": 1, "warmup_steps": 0}
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        lr_scheduler_type="constant",
        **options,
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.parent == tmp_path
    assert best.is_dir()
    stored = AutoModelForCausalLM.from_pretrained(best).state_dict()
    own = trainer.model.student.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stored.items())


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_no_space_left_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trainer = make_trainer(tmp_path, **SAVING)
    original_save, original_json = torch.save, type(trainer.state).save_to_json

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith(f"checkpoint-4/{name}"):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        original_save(value, path, *args, **kwargs)

    def save_json(self: Any, path: str) -> None:
        if path.endswith(f"checkpoint-4/{name}"):
            raise OSError(28, "No space left on device", path)
        original_json(self, path)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(type(trainer.state), "save_to_json", save_json)
    with pytest.raises(
        CheckpointError, match="checkpoint-4: expected to write it whole, got: .*No space left .*MiB are free"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = make_trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    # no file may grow beyond 64 KiB: the student's weights fit no more
    code = (
        "import resource, sys, pathlib; sys.path.insert(0, sys.argv[1]); from training import make_trainer\n"
        "trainer = make_trainer(pathlib.Path(sys.argv[2]), save_strategy='steps', save_steps=1, max_steps=1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "from mta_fast.files import CheckpointError\n"
        "try: trainer.train()\n"
        "except CheckpointError as error: print('refused:', error)\n"
    )
    out = tmp_path / "run"
    run = subprocess.run([sys.executable, "-c", code, str(TESTS), str(out)], capture_output=True, text=True, check=True)
    assert "refused:" in run.stdout
    assert "checkpoint-1: expected to write it whole" in run.stdout
    assert list(out.iterdir()) == []


def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time, torch; sys.path.insert(0, sys.argv[1]); from training import make_trainer\n"
        "save = torch.save\n"
        "def slow(value, path, *args, **kwargs):\n"
        "    save(value, path, *args, **kwargs)\n"
        "    if str(path).endswith('checkpoint-4/optimizer.pt'): print('saving', flush=True); time.sleep(1200)\n"
        "torch.save = slow\n"
        "make_trainer(pathlib.Path(sys.argv[2]), save_strategy='steps', save_steps=2).train()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(TESTS), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("saving"):
                break
        run.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial", "checkpoint-2"]
    resumed = make_trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "loss")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def _write_and_raise(target: Path, error: BaseException) -> None:
    with atomic_folder(target) as folder:
        (folder / "a").write_text("new")
        raise error


def test_a_checkpoint_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    target = tmp_path / "student"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(CheckpointError, match="student: expected to write it whole, got: .*disk is tired"):
        _write_and_raise(target, OSError("disk is tired"))
    assert (target / "a").read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        _write_and_raise(target, KeyboardInterrupt())
    assert (target / "a").read_text() == "old"
    with atomic_folder(target) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_pairs": [[1, 2], [3, 6], [4, 8]]},
            r"expected a checkpoint with layer_pairs = \[\[1, 2\], .*it has \[\[2, 4\]",
        ),
        ({"granularity": "word"}, "expected a checkpoint with granularity = "),
        ({"lambda_hid": 0.3}, "expected a checkpoint with lambda_hid = 0.3, it has 0.2"),
    ],
)
def test_a_checkpoint_of_another_loss_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_trainer(tmp_path, max_steps=2, **SAVING).train()
    other = make_trainer(tmp_path, mta=MTAConfig.from_dict(CONFIG.to_dict() | changes), **SAVING)
    with pytest.raises(InputError, match=message):
        other.train(resume_from_checkpoint=True)
    same = make_trainer(tmp_path, mta=MTAConfig.from_dict(CONFIG.to_dict() | {"dsa_method": "pairwise"}), **SAVING)
    same.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="expected a checkpoint trained with none, it has an MTA loss"):
        make_trainer(tmp_path, mta=None, **SAVING).train(resume_from_checkpoint=True)


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **SAVING)
    with pytest.raises(InputError, match="expected a checkpoint to resume from, there is none"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="expected a checkpoint folder, there is none"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    with pytest.raises(InputError, match="expected a checkpoint folder with config.json or adapter_config.json"):
        checkpoints.export_checkpoint(tmp_path, tmp_path / "out")


def test_a_student_of_another_shape_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2, **SAVING).train()
    folder = tmp_path / "checkpoint-2"
    other = make_model("opt", STUDENT_LAYERS, vocabulary=len(make_tokenizer()))
    with pytest.raises(InputError, match="expected the weights of this student, .* differ"):
        checkpoints.load_student(folder, other)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="expected a checkpoint with model.safetensors"):
        checkpoints.load_student(folder, other)


_FAMILIES: dict[str, dict[str, Any]] = {
    name: {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1, "num_local_experts": 2} | more
    for name, more in {
        "GPTNeoX": {},
        "Mixtral": {},
        "Qwen2Moe": {"shared_expert_intermediate_size": 16},
        "Qwen3Moe": {"head_dim": 16},
        "DeepseekV3": {
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        "Olmoe": {},
        "GraniteMoe": {},
        "Gemma3Text": {"head_dim": 16},
        "Gemma2": {"head_dim": 16},
        "GPT2": {},
        "GPTJ": {"rotary_dim": 4},
        "OPT": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "Bloom": {},
        "Falcon": {},
        "Phi": {},
        "Phi3": {},
        "Qwen3": {"head_dim": 16},
        "Llama": {"tie_word_embeddings": True},
    }.items()
}


@pytest.mark.parametrize("name", _FAMILIES)
def test_students_are_read_whatever_names_their_files_have(tmp_path: Path, name: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes | _FAMILIES[name])
    trained, student = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    trained.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    checkpoints.load_student(tmp_path, student)
    expected = trained.state_dict()
    assert student.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in student.state_dict().items())
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (trained, student)]
    assert tied[0] == tied[1]


def test_a_student_with_a_weight_too_few_or_of_another_width_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    student = make_model("llama", 2, vocabulary=64)
    student.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = {key: value for key, value in state.items() if key != name}
    for changed in (wrong, state | {"model.layers.7.extra": torch.ones(1)}, state | {name: torch.ones(3, 5)}):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match="expected the weights of this student, 1 differ: .*model.layers"):
            checkpoints.load_student(tmp_path, student)


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # tokenizers
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 448 vs 342"),
        RuntimeError("basic_ios::clear: file write failed"),
        OSError(28, "No space left on device"),
    ],
)
def test_whatever_fails_to_write_is_said_in_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(CheckpointError, match="expected to write it whole, got: ") as told:
        _write_and_raise(tmp_path / "student", error)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="a bug"):
        _write_and_raise(tmp_path / "student", ValueError("a bug"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_torch_save(tmp_path: Path) -> None:
    """torch reports it as an error of its own, from the end of the file that it could not write."""

    class Full:
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            pass

    def save() -> None:
        with atomic_folder(tmp_path / "student"):
            torch.save({"a": torch.ones(100000)}, Full())  # type: ignore[arg-type]  # what is tried

    with pytest.raises(CheckpointError, match="expected to write it whole, got: "):
        save()


def test_settings_beside_the_projections_are_readable(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2, **SAVING).train()
    settings = json.loads((tmp_path / "checkpoint-2/mta/config.json").read_text())
    assert settings["student_dims"] == [32] * 3
    assert settings["layer_pairs"] == [[2, 4], [3, 6], [4, 8]]
    assert os.stat(tmp_path / "checkpoint-2").st_mtime <= time.time()
