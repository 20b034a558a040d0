"""Students cut from a teacher: the blocks, the rule that chooses them, the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, LAYERS, SCALED, make_model, make_tokenizer

pytest.importorskip("transformers")

from mta_fast.__main__ import main
from mta_fast.distill.data import LoadedRows, drop_long_rows, load_sample
from mta_fast.distill.models import load_model, load_tokenizer
from mta_fast.distill.students import greedy
from mta_fast.distill.students.cut import cut_layers
from mta_fast.distill.students.greedy import greedy_layers, mean_loss, row_batch
from mta_fast.distill.training.checkpoints import export_student
from mta_fast.errors import InputError

TOKENS = torch.arange(12).reshape(2, 6)
LENGTH = 96  # tokens of a row


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_layers(family: str) -> None:
    teacher = make_model(family).eval()
    whole = cut_layers(teacher, LAYERS).eval()
    assert torch.equal(whole(TOKENS).logits, teacher(TOKENS).logits)
    two = cut_layers(teacher, [0, 3]).eval()
    assert two.config.num_hidden_layers == 2
    names = [name for name, _ in teacher.named_modules() if name.endswith(".3")]
    (last,) = [name for name in names if name.count(".") == min(n.count(".") for n in names)]
    moved = two.get_submodule(f"{last.rpartition('.')[0]}.1").state_dict()
    assert all(torch.equal(value, moved[name]) for name, value in teacher.get_submodule(last).state_dict().items())
    with torch.no_grad():  # no memory is shared
        for parameter in two.parameters():
            parameter.zero_()
    assert teacher(TOKENS).logits.abs().max() > 0
    assert two(TOKENS).logits.shape == teacher(TOKENS).logits.shape


def test_a_cut_student_is_saved_and_loaded(tmp_path: Path) -> None:
    make_model("qwen2", layers=6).save_pretrained(tmp_path / "teacher")
    teacher = load_model(str(tmp_path / "teacher"), dtype="bfloat16")
    before = torch.get_rng_state()
    student = cut_layers(teacher, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert len(student.config.layer_types) == 3
    export_student(student, make_tokenizer(), tmp_path / "student")
    loaded = load_model(str(tmp_path / "student"), dtype="bfloat16")
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(TOKENS).logits, student(TOKENS).logits)
    assert load_tokenizer(str(tmp_path / "student")).get_vocab() == make_tokenizer().get_vocab()


def _uneven(family: str, vocabulary: int = 64) -> Any:
    """A random model of six blocks that are not alike."""
    import transformers as tf

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "pad_token_id": 0}
    sizes["vocab_size"] = vocabulary
    wide = {"intermediate_size": 64, "num_key_value_heads": 2}
    experts = wide | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
    if family == "gemma2":
        kinds = ["sliding_attention", "full_attention", "full_attention"] * 2
        config: Any = tf.Gemma2Config(**sizes, **wide, head_dim=16, sliding_window=3, layer_types=kinds)
        return tf.Gemma2ForCausalLM(config).eval()
    if family == "gpt_neo":
        del sizes["num_hidden_layers"], sizes["num_attention_heads"]
        kinds = [[["global", "local"], 3]]
        return tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(**sizes, num_layers=6, num_heads=2, window_size=3, attention_types=kinds)
        ).eval()
    if family == "deepseek_v3":
        ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3}
        return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**sizes, **experts, **ranks, **groups)).eval()
    if family in ("qwen2_moe", "qwen2_moe every second"):
        dense = {"mlp_only_layers": [1, 2]} if family == "qwen2_moe" else {"decoder_sparse_step": 2}
        config = tf.Qwen2MoeConfig(**sizes, **experts, **dense, num_experts=4, shared_expert_intermediate_size=16)
        return tf.Qwen2MoeForCausalLM(config).eval()
    if family == "diffllama":
        return tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**sizes, **wide)).eval()
    config = tf.GPT2Config(n_layer=6, n_embd=32, n_head=2, vocab_size=vocabulary, scale_attn_by_inverse_layer_idx=True)
    return tf.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("family", "field", "cut"),
    [
        ("gemma2", "layer_types", ["sliding_attention", "full_attention", "full_attention"]),
        ("gpt_neo", "attention_layers", ["global", "global", "local"]),
        ("deepseek_v3", "first_k_dense_replace", 2),
        ("qwen2_moe", "mlp_only_layers", [1]),
    ],
)
def test_blocks_that_differ_are_cut_with_what_the_config_says_of_them(
    family: str, field: str, cut: Any, tmp_path: Path
) -> None:
    teacher = _uneven(family)
    student = cut_layers(teacher, [0, 2, 5]).eval()
    assert getattr(student.config, field) == cut
    student.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded(TOKENS).logits, student(TOKENS).logits)
    # all blocks: the teacher
    assert torch.equal(cut_layers(teacher, 6).eval()(TOKENS).logits, teacher(TOKENS).logits)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_moe every second", "blocks of another kind would stand in their places"),
        ("diffllama", "block 2 would be built otherwise as block 1"),
        ("gpt2 by number", "block 2 "),
    ],
)
def test_blocks_that_their_number_makes_are_refused(family: str, reason: str) -> None:
    teacher = _uneven(family)
    with pytest.raises(
        InputError, match=rf"layers: expected blocks that .* can be made of, got 0, 2, 5 of 6: {reason}"
    ):
        cut_layers(teacher, [0, 2, 5])
    first = cut_layers(teacher, [0, 1, 2])
    assert first.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("count", "depth", "kept"), [(10, 30, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]), (1, 4, [3]), (3, 4, [0, 2, 3])]
)
def test_layers_are_spread_with_both_ends(count: int, depth: int, kept: list[int]) -> None:
    teacher = make_model("gpt2", layers=depth)
    blocks = [block.mlp.c_fc.weight for block in cut_layers(teacher, count).transformer.h]
    assert all(torch.equal(a, teacher.transformer.h[i].mlp.c_fc.weight) for a, i in zip(blocks, kept, strict=True))
    assert len(blocks) == count


@pytest.mark.parametrize("layers", [0, 5, [], [1, 1], [3, 1], [4], [-1]])
def test_layers_that_are_none(layers: int | list[int]) -> None:
    with pytest.raises(InputError, match="layers: expected 1 to 4"):
        cut_layers(make_model("gpt2"), layers)


def test_the_name_before_students_had_a_room() -> None:
    from mta_fast.distill import models

    assert models.cut_layers is cut_layers
    with pytest.raises(AttributeError, match="has no attribute 'cut_layer'"):
        models.cut_layer  # noqa: B018


# --- the rule ----------------------------------------------------------------------------------------------------


def _rows(count: int) -> list[Any]:
    """Of the sample, with room for a response."""
    return drop_long_rows(LoadedRows(load_sample()), make_tokenizer(), max_length=LENGTH - 16).rows[:count]


def _teacher(family: str, layers: int = 5) -> Any:
    """A random model whose blocks matter more than at its start: each adds states as large as those it reads."""
    model = make_model(family, layers=layers, vocabulary=len(make_tokenizer()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part.isdigit() for part in name.split(".")):
                parameter.mul_(8)
    return model


def _loss(model: Any, blocks: list[int], rows: list[Any]) -> float:
    """Of the student itself, by transformers' own cross-entropy."""
    student = cut_layers(model, blocks).eval()
    batch = row_batch(student, make_tokenizer(), rows, length=LENGTH)
    with torch.no_grad():
        return float(student(**batch, use_cache=False).loss)


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_the_rule_removes_what_costs_least(family: str) -> None:
    teacher, rows, removed = _teacher(family), _rows(3), []
    kept = greedy_layers(
        teacher.train(), make_tokenizer(), rows, 3, length=LENGTH, report=lambda *each: removed.append(each)
    )
    assert teacher.training
    left = list(range(5))
    losses = [_loss(teacher, [other for other in left if other != each], rows) for each in left]
    assert removed[0][0] == min(left, key=losses.__getitem__)
    for block, loss in removed:
        left.remove(block)
        assert loss == pytest.approx(_loss(teacher, left, rows), rel=1e-5)
    assert kept == left
    assert not any(module._compiled_call_impl for module in teacher.modules())


def test_padding_on_the_left_and_logits_that_are_not_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks, whatever side padding is on, and by a model's own logits."""
    teacher, tokenizer, rows = _teacher("llama"), copy.deepcopy(make_tokenizer()), _rows(4)
    kept = greedy_layers(teacher, tokenizer, rows, 2, length=LENGTH)
    tokenizer.padding_side = "left"
    assert greedy_layers(teacher, tokenizer, rows, 2, length=LENGTH) == kept
    monkeypatch.setattr(greedy, "take_apart", lambda _model: "no head")
    assert greedy_layers(teacher, tokenizer, rows, 2, length=LENGTH) == kept


def test_few_passes_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks before the one that goes are not run again."""
    teacher, run = _teacher("llama", layers=8), []
    for number, block in enumerate(teacher.model.layers):
        block.register_forward_hook(
            lambda _block, args, _out, number=number: run.append(number) if len(args[0]) == 2 else None
        )  # passes over the two rows, not those over a few tokens that are made before
    kept = greedy_layers(teacher, make_tokenizer(), _rows(2), 3, length=LENGTH)
    naive = sum(depth * (depth - 1) for depth in range(8, 3, -1))
    assert len(run) < 0.8 * naive, (len(run), naive, kept)
    assert run.count(0) == 1, run


@pytest.mark.parametrize("family", ["gemma2", "gpt_neo", "deepseek_v3", "qwen2_moe"])
def test_the_rule_on_blocks_that_differ(family: str) -> None:
    teacher, rows, removed = _uneven(family, len(make_tokenizer())), _rows(2), []
    kept = greedy_layers(teacher, make_tokenizer(), rows, 3, length=LENGTH, report=lambda *each: removed.append(each))
    batch = row_batch(teacher, make_tokenizer(), rows, length=LENGTH)
    assert mean_loss(cut_layers(teacher, kept), batch) == pytest.approx(removed[-1][1], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2_moe every second", "expected a model that can do without a block before its last"),
        ("diffllama", "would be built otherwise as block"),
        ("gpt2 by number", "would be built otherwise as block"),
    ],
)
def test_the_rule_refuses_before_it_begins(family: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "_cheapest", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(InputError, match=reason):
        greedy_layers(_uneven(family, len(make_tokenizer())), make_tokenizer(), _rows(2), 3, length=LENGTH)


def test_costs_that_are_too_large_already_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "check_cut", lambda *_: None)
    losses, run = {0: 2.5, 1: 1.75, 2: 1.5, 3: 9.0}, []
    left = SimpleNamespace(blocks=[0, 1, 2, 3], loss=1.0, model=None, others=lambda _block: [])
    left.loss_without = lambda block: run.append(block) or losses[block]
    costs = {0: 0.25, 1: 0.5, 2: 0.75, 3: 0.125}
    # 3 has become dear and 0 too; 2 was dearer than 1 has become, and is not looked at
    assert greedy._cheapest(left, costs) == 1
    assert run == [3, 0, 1]
    assert costs == {0: 1.5, 1: 0.75, 2: 0.75, 3: 8.0}


def test_only_blocks_that_may_go_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest of them, and an error where there is none."""
    teacher, rows = _teacher("llama"), _rows(2)

    def check(_teacher: Any, kept: list[int]) -> None:
        if 0 not in kept or 3 not in kept or len(kept) < 3:
            raise InputError("layers: no such student")

    monkeypatch.setattr(greedy, "check_cut", check)
    kept = greedy_layers(teacher, make_tokenizer(), rows, 3, length=LENGTH)
    assert {0, 3} < set(kept)
    with pytest.raises(InputError, match="expected a block of .* that can go, there is none; layers: no such student"):
        greedy_layers(teacher, make_tokenizer(), rows, 2, length=LENGTH)


def test_passes_that_say_nothing_of_a_student_are_refused() -> None:
    teacher = _teacher("llama")
    teacher.model.norm.register_forward_pre_hook(lambda _norm, args: (args[0].flip(-1),))  # a student has none
    with pytest.raises(InputError, match="expected blocks that hand on one stream of states, a student of Llama"):
        greedy_layers(teacher, make_tokenizer(), _rows(2), 3, length=LENGTH)


def test_rows_without_a_response() -> None:
    rows = [{"prompt": row["prompt"], "output": row["output"]} for row in _rows(2)]
    with pytest.raises(InputError, match="rows: expected a response within the first 4 tokens, got none in 2 rows"):
        greedy_layers(_teacher("llama"), make_tokenizer(), rows, 3, length=4)
    with pytest.raises(InputError, match="layers: expected 1 to 5"):
        greedy_layers(_teacher("llama"), make_tokenizer(), rows, 6, length=LENGTH)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    _teacher("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _record(folder: Path) -> Any:
    return json.loads((folder / "mta_fast.json").read_text())


def test_the_command_chooses_by_the_text(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.jsonl", tmp_path / "student"
    text.write_text("".join(json.dumps(row) + "\n" for row in _rows(4)))
    options = ["--rows", "3", "--max-length", str(LENGTH)]
    assert main(["cut", str(teacher_folder), str(out), "--layers", "3", "--text", str(text), *options]) == 0
    record, printed = _record(out), capsys.readouterr()
    teacher = load_model(str(teacher_folder))
    assert record["blocks"] == greedy_layers(teacher, make_tokenizer(), _rows(3), 3, length=LENGTH)
    assert (record["teacher"], record["text"]) == (str(teacher_folder), str(text))
    assert sorted([*record["blocks"], *(each["block"] for each in record["removed"])]) == [*range(5)]
    other = _rows(4)[3:]
    assert record["loss"]["teacher"] == pytest.approx(_loss(teacher, list(range(5)), other), abs=1e-4)
    assert record["loss"]["student"] == pytest.approx(_loss(teacher, record["blocks"], other), abs=1e-4)
    assert "on rows 4 to 4 of the text (" in printed.out
    assert f"teacher {record['loss']['teacher']:.3f}" in printed.out
    assert printed.err.count("without block") == 2
    assert "bundled" not in printed.out
    student = load_model(str(out))
    assert torch.equal(student(TOKENS).logits, cut_layers(teacher, record["blocks"])(TOKENS).logits)


def test_the_command_without_a_text(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["cut", str(teacher_folder), "--rows", "2", "--max-length", "64"]
    assert main([*call, str(tmp_path / "rule"), "--layers", "4"]) == 0
    assert "the bundled sample; --text FILE takes your own, --even" in capsys.readouterr().out
    assert _record(tmp_path / "rule")["text"] == "sample"
    assert main([*call, str(tmp_path / "even"), "--layers", "3", "--even"]) == 0
    assert main([*call, str(tmp_path / "hand"), "--keep", "0,1,4"]) == 0
    assert main([*call, str(tmp_path / "same"), "--layers", "0,1,4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("loss in nats a token, on rows 3 to 4 of the text (") == 3
    assert "--even" not in printed
    assert "blocks 0,2,4, chosen evenly" in printed
    assert printed.count("blocks 0,1,4, chosen by hand") == 2
    assert _record(tmp_path / "even")["blocks"] == [0, 2, 4]
    assert _record(tmp_path / "hand")["text"] == "sample"


def test_rows_longer_than_the_model_are_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.GPT2Config(vocab_size=512, n_positions=64, n_layer=3, n_embd=8, n_head=2)
    for part in (transformers.GPT2LMHeadModel(config), make_tokenizer(512)):
        part.save_pretrained(tmp_path / "short")
    monkeypatch.setattr("mta_fast.distill.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["cut", str(tmp_path / "short"), str(tmp_path / "out"), "--keep", "2"]) == 2
    assert "expected positions for max_length = 128 tokens, it has 64; lower max_length" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --layers (how many blocks) and --keep (which ones), got neither"),
        (["--layers", "2", "--keep", "0,1"], "got --layers 2 and --keep 0,1"),
        (["--layers", "ten"], "layers: expected a number, got 'ten'"),
        (["--keep", "0,x"], "keep: expected numbers such as 0,4,9, got '0,x'"),
        (["--keep", "1,0"], "layers: expected 1 to 5 ascending blocks of the teacher (0 to 4), got [1, 0]"),
        (["--keep", "0,0,1"], "got [0, 0, 1]"),
        (["--keep", "0,5"], "got [0, 5]"),
        (["--keep", "-1"], "got [-1]"),
        (["--layers", "0"], "layers: expected 1 to 5"),
        (["--layers", "6"], "layers: expected 1 to 5"),
        (["--keep", "0,1", "--even"], "expected --even beside --layers NUMBER, got it beside the blocks 0,1"),
        (["--layers", "2", "--text", "empty.jsonl"], "expected at least one usable row, got none"),
        (["--layers", "2", "--text", "nowhere.jsonl"], "expected a JSONL file, there is none"),
        (["--layers", "2", "--text", "sample", "--max-length", "4"], "expected prompts of at most 3 tokens"),
        (["--layers", "2", "--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(
    options: list[str],
    message: str,
    teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    monkeypatch.setattr("mta_fast.distill.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["cut", str(teacher_folder), "student", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("student").exists()
