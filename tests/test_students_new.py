"""Fresh small students: their configs, and mta-fast new as a user would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer
from test_run import run_folder  # noqa: F401  # a fixture

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import transformers as tf
from transformers import AutoModelForCausalLM, AutoTokenizer

from mta_fast.__main__ import main
from mta_fast.distill.students.fresh import Sizes, fresh_config, fresh_student, parameters
from mta_fast.distill.students.vocabulary import teacher_ids
from mta_fast.distill.training import run
from mta_fast.errors import InputError
from mta_fast.files import MARKER

FAMILIES = ("gpt2", "gptj", "opt", "opt-350m", "llama", "mistral", "qwen2", "gemma2", "cohere", "granite")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_any_family(family: str) -> None:
    teacher = make_model(family)
    student = fresh_student(fresh_config(teacher.config, Sizes(2, width=24, heads=3)))
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_size == 24
    assert student.config.vocab_size == teacher.config.vocab_size
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    tied = [each.get_input_embeddings().weight is each.get_output_embeddings().weight for each in (student, teacher)]
    assert tied[0] == tied[1]
    widths = {size for name, p in student.named_parameters() if "embed" not in name for size in p.shape}
    assert 32 not in widths  # nothing is left of the teacher's width
    tokens = torch.arange(6)[None]
    logits = student.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert logits.isfinite().all()


def test_what_follows_from_the_teachers_sizes() -> None:
    config = tf.LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )
    made = fresh_config(config, Sizes(8))
    assert (made.hidden_size, made.num_attention_heads, made.num_key_value_heads) == (160, 2, 1)
    assert (made.intermediate_size, made.head_dim, made.num_hidden_layers) == (424, 80, 8)
    made = fresh_config(config, Sizes(8, width=192, heads=6, kv_heads=3, intermediate=100))
    assert (made.num_key_value_heads, made.intermediate_size, made.head_dim) == (3, 100, 32)
    assert config.hidden_size == 576  # the teacher's stays


def test_parts_of_a_config_that_depend_on_others() -> None:
    gemma = make_model("gemma2").config  # heads of 16, of which 2 make the width of 32
    gemma.head_dim, gemma.query_pre_attn_scalar = 32, 32  # twice as wide
    made = fresh_config(gemma, Sizes(3, width=24, heads=3))
    assert (made.head_dim, made.query_pre_attn_scalar) == (16, 16)
    assert made.layer_types == gemma.layer_types[:3]
    assert fresh_config(make_model("opt-350m").config, Sizes(2, width=24, heads=3)).word_embed_proj_dim == 12
    qwen = make_model("qwen2").config
    assert fresh_config(qwen, Sizes(2)).max_window_layers == 2
    gpt2 = make_model("gpt2").config
    assert fresh_config(gpt2, Sizes(2, width=24, heads=3)).n_inner is None
    assert fresh_config(gpt2, Sizes(2, width=24, heads=3, intermediate=40)).n_inner == 40
    gpt2.eos_token_id, gpt2.bos_token_id, gpt2.pad_token_id = [5, 7], 9, 2
    made = fresh_config(gpt2, Sizes(1), {5: 0, 9: 1, 11: 2})
    assert (made.eos_token_id, made.bos_token_id, made.pad_token_id, made.vocab_size) == ([0], 1, None, 3)


def test_the_seed_decides_and_no_random_number_is_lost() -> None:
    config = fresh_config(make_model("llama").config, Sizes(1))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    states = [fresh_student(config, seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(2), expected)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_parameters_apart_from_embeddings() -> None:
    student = make_model("llama")  # its head is not tied
    blocks, of_tokens = parameters(student)
    assert of_tokens == 2 * 64 * 32
    assert blocks + of_tokens == sum(p.numel() for p in student.parameters())
    assert parameters(make_model("gpt2"))[1] == 64 * 32


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("llama", {"layers": 5}, r"layers: expected 1 to 4 \(the teacher's blocks\), got 5"),
        ("llama", {"layers": 0}, "layers: expected an integer >= 1, got 0"),
        ("llama", {"layers": 2, "width": 24, "heads": 5}, "heads: expected a number that divides the width 24, got 5"),
        ("llama", {"layers": 2, "width": 23}, "width: expected an even number, got 23"),
        ("llama", {"layers": 2, "heads": 2, "kv_heads": 3}, "kv_heads: expected a number that divides the 2 heads"),
        ("gpt2", {"layers": 2, "heads": 2, "kv_heads": 1}, "kv_heads: expected a model with heads of keys and values"),
    ],
)
def test_sizes_that_don_t_fit_are_refused(family: str, sizes: dict[str, Any], message: str) -> None:
    config = make_model(family).config
    with pytest.raises(InputError, match=message):
        fresh_config(config, Sizes(**sizes))


def test_architectures_whose_sizes_are_not_known_are_refused() -> None:
    config = tf.DeepseekV3Config(num_hidden_layers=4)
    with pytest.raises(InputError, match=r"DeepseekV3Config what .*kv_lora_rank.* must be is not known"):
        fresh_config(config, Sizes(2))
    with pytest.raises(InputError, match="LlamaConfig: expected sizes that a model can be made of, got: "):
        fresh_student(fresh_config(make_model("llama").config, Sizes(1, width=9, heads=3)))


def test_new_train_and_use(
    run_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A student made, trained on states that were cached for another one, evaluated and looked at."""
    pytest.importorskip("rouge_score")
    pytest.importorskip("rich")
    rows, fresh, states = run_folder / "rows.jsonl", run_folder / "fresh", run_folder / "states"
    command = ["new", str(run_folder / "teacher"), str(fresh), "--layers", "4", "--width", "32", "--heads", "2"]
    assert main([*command, "--vocabulary", str(rows)]) == 0
    printed = capsys.readouterr().out
    assert "4 blocks of width 32 with 2 heads, 0.08 million parameters and 0.0" in printed
    whole, trimmed = make_tokenizer(), AutoTokenizer.from_pretrained(fresh)
    assert f": {len(trimmed)} of 512 tokens, which are 100.00% of the data's" in printed
    assert teacher_ids(trimmed, whole) is not None
    assert len(trimmed) < len(whole)
    assert AutoModelForCausalLM.from_pretrained(fresh).config.vocab_size == len(trimmed)
    config = run_folder / "run.yaml"
    text = config.read_text().replace("/teacher}", f"/teacher, cache: {states}, cache_dtype: float32}}")
    config.write_text(text.replace("eval_steps: 2", "eval_steps: 4"))
    assert main(["teach", str(config)]) == 0  # by the student with the teacher's tokenizer
    loaded = run.load_model
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            run, "load_model", lambda name, **o: pytest.fail(name) if "teacher" in name else loaded(name, **o)
        )
        assert main(["train", str(config), "--override", f"student.path={fresh}"]) == 0
    assert f"teacher: 12 of 12 rows in {states}\n" in capsys.readouterr().out
    student = run_folder / "run/student"
    assert len(AutoTokenizer.from_pretrained(student)) == len(trimmed)
    data = ["--data", str(rows), "--max-rows", "2", "--device", "cpu", "--max-prompt-length", "150"]
    data += ["--max-length", "156"]
    assert main(["eval", str(student), *data, "--seeds", "1", "--out", str(run_folder / "eval")]) == 0
    pairs = ["generate", "--student", str(student), "--teacher", str(run_folder / "teacher")]
    assert main([*pairs, *data, "--out", str(run_folder / "pairs.jsonl")]) == 0
    sides = ["--student", str(student), "--teacher", str(run_folder / "teacher")]
    assert main(["inspect", *sides, "--text", "The keeper climbed the stairs."]) == 0
    assert main(["export", str(run_folder / "run/checkpoint-4"), str(run_folder / "exported")]) == 0
    assert len(AutoTokenizer.from_pretrained(run_folder / "exported")) == len(trimmed)


def test_new_replaces_its_own_alone(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    teacher, out = str(run_folder / "teacher"), run_folder / "fresh"
    command = ["new", teacher, str(out), "--layers", "2"]
    assert main(command) == 0
    assert len(AutoTokenizer.from_pretrained(out)) == 512
    assert (out / MARKER).is_file()
    before = (out / "model.safetensors").read_bytes()
    for wrong, message in (
        (command, "expected a free name, it holds an earlier new student and nothing else; --overwrite"),
        (["new", teacher, teacher, "--layers", "2", "--overwrite"], "expected a target apart from what is read"),
        (["new", teacher, str(run_folder / "student"), "--layers", "2", "--overwrite"], "expected a free name or an"),
        ([*command, "--overwrite", "--vocabulary-size", "300"], "vocabulary_size: expected --vocabulary beside it"),
        ([*command, "--overwrite", "--width", "9"], "width: expected an even number, got 9"),
        (["new", teacher, str(run_folder / "other"), "--layers", "9"], "layers: expected 1 to 8"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert not (run_folder / "other").exists()
    assert main([*command, "--overwrite", "--seed", "7"]) == 0
    assert (out / "model.safetensors").read_bytes() != before
