"""Generated texts: where they end, which random numbers they take, and files from which a run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer

pytest.importorskip("transformers")

from mta_fast.distill.models import choose_device
from mta_fast.distill.responses import generation
from mta_fast.distill.responses.generation import (
    GenerationSettings,
    claim,
    encode_prompts,
    generate_batches,
    generate_texts,
    read_finished,
    weights_digest,
)
from mta_fast.errors import InputError

PROMPTS = ["Name a colour.", "Write a long list of the things that one finds in a kitchen, please.", "Why?"]
DRAWN = GenerationSettings(max_new_tokens=12, stop=None)
GREEDY = GenerationSettings(max_new_tokens=12, do_sample=False, stop=None)


def _model(family: str = "gpt2") -> Any:
    """A random model whose likeliest next token depends much on what came before."""
    model = make_model(family, vocabulary=len(make_tokenizer()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "wte" not in name and "wpe" not in name:
                weight.mul_(20)
    return model


def _script(model: Any, responses: Sequence[str], tokenizer: Any = None) -> Any:
    """Make the model's real ``generate`` write these responses, row by row, and then end tokens."""
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    scripts = [tokenizer(text)["input_ids"] for text in responses]
    step = 0

    def say(_module: Any, _args: Any, output: Any) -> None:
        nonlocal step
        output.logits = torch.full_like(output.logits, -1e4)
        for row, ids in enumerate(scripts):
            output.logits[row, -1, ids[step] if step < len(ids) else tokenizer.eos_token_id] = 0.0
        step += 1

    model.register_forward_hook(say)
    return model


def _keep_generated(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What ``model.generate`` returns, prompts included, row by row."""
    kept: list[list[int]] = []
    original = type(model).generate

    def generate(self: Any, *args: Any, **options: Any) -> Any:
        made = original(self, *args, **options)
        kept.extend(made.tolist())
        return made

    monkeypatch.setattr(type(model), "generate", generate)
    return kept


def test_every_row_stops_at_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    texts = ["Red.\n\n### Instruction:\nAnd so on", "A knife, a fork, a pan and a spoon ### x", "no end, no end"]
    model = _script(_model(), texts)
    kept = _keep_generated(model, monkeypatch)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    settings = GenerationSettings(max_new_tokens=max(lengths) + 2)
    assert generate_texts(model, tokenizer, PROMPTS, settings) == [
        "Red.\n\n",
        "A knife, a fork, a pan and a spoon ",
        texts[2],
    ]
    size = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    written = [tokenizer.decode(ids[size:], skip_special_tokens=True) for ids in kept]
    assert written == ["Red.\n\n###", "A knife, a fork, a pan and a spoon ###", texts[2]]
    assert (
        generate_texts(
            _script(_model(), texts), tokenizer, PROMPTS, GenerationSettings(max_new_tokens=max(lengths), stop=None)
        )[0]
        == texts[0]
    )


def test_the_first_row_alone_may_stop_a_batch() -> None:
    tokenizer = make_tokenizer()
    texts = ["Red. Blue. ### x", "A ### and what follows it, word after word, to the end", "c"]
    stopping = [len(tokenizer(text)["input_ids"]) for text in ("Red. Blue. ###", texts[1])]
    assert stopping[0] < stopping[1]
    settings = GenerationSettings(max_new_tokens=40, stop_rows="first")
    made = generate_texts(_script(_model(), texts), tokenizer, PROMPTS, settings)
    assert made == ["Red. Blue. ###", tokenizer.decode(tokenizer(texts[1])["input_ids"][: stopping[0]]), "c"]
    others = generate_texts(_script(_model(), [texts[2], texts[1], texts[0]]), tokenizer, PROMPTS, settings)
    assert others == ["c", texts[1], texts[0]]  # the first row has ended, and never writes it
    stripped = generate_texts(_script(_model(), [" a\n", "b "]), tokenizer, PROMPTS[:2], GenerationSettings(strip=True))
    assert stripped == ["a", "b"]


def test_a_prompt_may_be_cut() -> None:
    model, tokenizer = _model(), make_tokenizer()
    cut = GenerationSettings(max_new_tokens=12, do_sample=False, stop=None, prompt_length=5)
    whole = tokenizer(PROMPTS)["input_ids"]
    assert encode_prompts(model, tokenizer, PROMPTS, cut) == [ids[:5] for ids in whole]
    first = [tokenizer.decode(ids[:5]) for ids in whole]
    texts = generate_texts(model, tokenizer, PROMPTS, cut)
    assert texts == generate_texts(model, tokenizer, first, GREEDY)
    assert texts != generate_texts(model, tokenizer, PROMPTS, GREEDY)
    room = GenerationSettings(max_new_tokens=12, stop=None, prompt_length=1024 - 12)
    assert len(encode_prompts(model, tokenizer, ["a " * 2000], room)[0]) == 1024 - 12  # room is of what is read


@pytest.mark.parametrize("prompt", ["### Response:\n", "Write ###", "Write ##"])
def test_a_stop_in_the_prompt_stops_nothing(prompt: str) -> None:
    model = _script(_model(), ["# is a hash."])
    assert generate_texts(model, make_tokenizer(), [prompt], GenerationSettings(max_new_tokens=20)) == ["# is a hash."]


def test_the_end_tokens_end_a_text() -> None:
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token
    model = _script(_model(), [f"Red.{end}Green.", end, "Blue"])
    model.generation_config.eos_token_id = None  # the tokenizer's counts
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN) == ["Red.", "", "Blue"]
    model = _script(_model(), ["Red. Blue.", "Red", "Green"])
    dot = tokenizer("Red.")["input_ids"][-1]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, dot]  # as chat models have several
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN) == ["Red", "Red", "Green"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_padding_changes_nothing(family: str) -> None:
    model, tokenizer = _model(family), make_tokenizer()
    together = generate_texts(model, tokenizer, PROMPTS, GREEDY)
    assert together == [generate_texts(model, tokenizer, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS)  # it does depend on the prompt
    assert tokenizer.padding_side == "right"


def test_spaces_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, prompts = make_tokenizer(), ["  a prompt \n", "b", "c "]
    model = _script(_model(), [" spaced  out ", "x ", "\ty"])
    kept = _keep_generated(model, monkeypatch)
    texts = generate_texts(model, tokenizer, prompts, DRAWN)
    assert texts == [" spaced  out ", "x ", "\ty"]
    for prompt, text, ids in zip(prompts, texts, kept, strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + text


def test_a_tokenizer_that_marks_spaces_keeps_the_first_one() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "<unk>", "\u2581one", "\u2581two", "\u2581three"]
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    plain.decoder = tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.decode([3, 4]) == "two three"
    model = _script(make_model("gpt2", vocabulary=len(words)), ["two three"], tokenizer)
    assert generate_texts(model, tokenizer, ["one"], DRAWN) == [" two three"]


def test_random_numbers() -> None:
    model, tokenizer = _model(), make_tokenizer()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    texts = generate_texts(model, tokenizer, PROMPTS, DRAWN, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN, seed=7) == texts
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN, seed=8) != texts
    torch.set_rng_state(before)
    own = generate_texts(model, tokenizer, PROMPTS, DRAWN)
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN) != own  # torch's own have moved on
    torch.set_rng_state(before)
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN) == own


def test_sampling_settings_count() -> None:
    model, tokenizer = _model(), make_tokenizer()
    likeliest = generate_texts(model, tokenizer, PROMPTS, GREEDY)
    for change in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        settings = GenerationSettings(max_new_tokens=12, stop=None, **change)
        assert generate_texts(model, tokenizer, PROMPTS, settings, seed=1) == likeliest, change
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN, seed=1) != likeliest


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_models_own_settings_do_not_count(wrapped: bool) -> None:
    model, tokenizer = _model(), make_tokenizer()
    drawn = generate_texts(model, tokenizer, PROMPTS, DRAWN, seed=7)
    likeliest = generate_texts(model, tokenizer, PROMPTS, GREEDY)
    model.generation_config.update(top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=9.0, suppress_tokens=[5, 6, 7])
    own = model.generation_config
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    assert generate_texts(model, tokenizer, PROMPTS, DRAWN, seed=7) == drawn
    assert generate_texts(model, tokenizer, PROMPTS, GREEDY) == likeliest
    assert model.generation_config is own
    assert own.repetition_penalty == 9.0


def test_modes_and_cache() -> None:
    model, tokenizer = _model(), make_tokenizer()
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.5
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False  # as a Trainer leaves it
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    widths = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    first = generate_texts(model, tokenizer, PROMPTS, GREEDY)
    assert set(widths[1:]) == {1}  # later steps read one token: the cache has the others
    assert generate_texts(model, tokenizer, PROMPTS, GREEDY) == first  # no dropout
    assert [module.training for module in model.modules()] == modes
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_texts(model, tokenizer, PROMPTS, GREEDY)
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    texts = generate_texts(make_model("llama", vocabulary=512).to(dtype), make_tokenizer(), PROMPTS, DRAWN, seed=1)
    assert len(texts) == 3
    assert all(texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"batch_size": True}, "batch_size: expected an integer >= 1, got True"),
        ({"top_k": -1}, "top_k: expected an integer >= 0, got -1"),
        ({"temperature": 0}, "temperature: expected a number > 0, got 0; do_sample=False takes the likeliest token"),
        ({"temperature": float("nan")}, "temperature: expected a number > 0, got nan"),
        ({"top_p": 1.5}, "top_p: expected a number > 0 and <= 1, got 1.5"),
        ({"do_sample": 1}, "do_sample: expected true or false, got 1"),
        ({"stop": ""}, "stop: expected a text or None, got ''"),
        ({"strip": 1}, "strip: expected true or false, got 1"),
        ({"prompt_length": 0}, "prompt_length: expected an integer >= 1, got 0"),
        ({"stop_rows": "last"}, "stop_rows: expected one of each, first, got 'last'"),
        ({"stop": None, "stop_rows": "first"}, "stop_rows: expected 'each' where there is no stop text, got 'first'"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        GenerationSettings(**change)
    assert message in str(caught.value)


def test_prompts_are_checked() -> None:
    model, tokenizer = make_model("gpt2", vocabulary=512), make_tokenizer()
    room = 1024 - 12
    longest = "a " * 400
    while len(tokenizer(longest + "a")["input_ids"]) <= room:
        longest += "a"
    assert len(tokenizer(longest)["input_ids"]) == room
    assert len(encode_prompts(model, tokenizer, ["a", longest], DRAWN)[1]) == room
    message = f"prompt of row 1: expected at most {room} tokens .the model's 1024 positions less max_new_tokens = 12."
    with pytest.raises(InputError, match=message):
        generate_texts(model, tokenizer, ["a", longest + "a"], DRAWN)
    with pytest.raises(InputError, match="prompt of row 0: expected at least one token, got none; leave the row out"):
        generate_texts(model, tokenizer, [""], DRAWN)
    with pytest.raises(InputError, match="max_new_tokens: expected less than the model's 1024 positions, got 1024"):
        generate_texts(model, tokenizer, ["a"], GenerationSettings(max_new_tokens=1024))
    assert generate_texts(model, tokenizer, [], DRAWN) == []

    class Endless:
        pad_token_id = eos_token_id = None

        def __call__(self, prompts: list[str]) -> Any:
            return tokenizer(prompts)

    with pytest.raises(InputError, match="expected a pad or an end token, Endless has neither"):
        generate_texts(model, Endless(), ["a"], DRAWN)


def test_an_end_token_that_the_tokenizer_adds_is_no_part_of_the_prompt() -> None:
    tokenizer = make_tokenizer()

    class Ending:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, prompts: list[str]) -> Any:
            return {"input_ids": [[*ids, self.eos_token_id] for ids in tokenizer(prompts)["input_ids"]]}

    assert encode_prompts(_model(), Ending(), PROMPTS, DRAWN) == tokenizer(PROMPTS)["input_ids"]


# --- many batches, in a file -------------------------------------------------------------------------------------


def _run(path: Path | None, seed: int | str = 5, **options: Any) -> list[dict[str, Any]]:
    """Seven prompts, two at a time."""
    prompts = [f"{prompt} {i}" for i, prompt in enumerate([*PROMPTS, *PROMPTS, "7"])]
    settings = GenerationSettings(max_new_tokens=6, stop=None, batch_size=2)
    rows = generate_batches(
        _model(),
        make_tokenizer(),
        prompts,
        settings,
        lambda i, response: {"prompt": prompts[i], "response": response},
        seed=seed,
        path=path,
        progress=False,
        **options,
    )
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _stop_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let ``generate_texts`` be interrupted after so many calls; returns the sizes of the batches."""
    original, sizes = generation.generate_texts, list[int]()

    def texts(model: Any, tokenizer: Any, prompts: Any, *args: Any, **options: Any) -> list[str]:
        if len(sizes) == calls:
            raise KeyboardInterrupt
        sizes.append(len(prompts))
        return original(model, tokenizer, prompts, *args, **options)

    monkeypatch.setattr(generation, "generate_texts", texts)
    return sizes


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "Why? 5", "resp', b'{"prompt": "Why? 5", "response": "x"}\n{"pro'])
def test_an_interrupted_run_goes_on(torn: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _run(None)
    assert len({row["response"] for row in whole}) == 7
    path = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        _stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            _run(path)
    assert _lines(path) == whole[:4]  # nothing but the batch it was at is lost
    path.write_bytes(path.read_bytes() + torn)
    sizes = _stop_after(9, monkeypatch)
    assert _run(path) == whole
    assert sizes == [2, 1]
    assert _lines(path) == whole
    assert _run(path) == whole
    assert sizes == [2, 1]  # nothing was left to do


def test_seeds_of_batches(tmp_path: Path) -> None:
    same = ["Why?"] * 4
    settings = GenerationSettings(max_new_tokens=6, stop=None, batch_size=2)

    def run(seed: int | str) -> list[str]:
        rows = generate_batches(
            _model(), make_tokenizer(), same, settings, lambda _, text: {"text": text}, seed=seed, progress=False
        )
        return [row["text"] for row in rows]

    torch.manual_seed(1)
    first = run(5)
    assert len(set(first)) == 4  # two batches with the same prompts
    torch.manual_seed(2)
    assert run(5) == first
    for other in (6, "5/teacher"):
        assert not set(run(other)) & set(first)


def test_empty_responses_are_generated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int]] = []

    def texts(_model: Any, _tokenizer: Any, prompts: list[str], _settings: Any, *, seed: int) -> list[str]:
        asked.append((prompts, seed))
        return [" \n" if prompt.startswith("Why") else prompt.upper() for prompt in prompts]

    monkeypatch.setattr(generation, "generate_texts", texts)
    assert [row["response"].strip() for row in _run(None, attempts=3)][1:4] == [
        PROMPTS[1].upper() + " 1",
        "",
        PROMPTS[0].upper() + " 3",
    ]
    assert [prompts for prompts, _ in asked[1:4]] == [["Why? 2", "Name a colour. 3"], ["Why? 2"], ["Why? 2"]]
    assert len({seed for _, seed in asked}) == len(asked)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "another"}',
            "line 2: expected a response to prompt 2, got one to another prompt; delete the file",
        ),
        ("{}", "line 2: expected a response to prompt 2, got a line that is none"),
        ("[1]", "line 2: expected a response to prompt 2, got a line that is none"),
        ("{broken", "line 2: expected a response to prompt 2, got a line that is none"),
    ],
)
def test_a_foreign_file_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_finished(path, ["a", "b", "c"], 2)
    assert path.read_text() == '{"prompt": "a"}\n' + line + "\n"
    path.write_text('{"prompt": "a"}\n' * 3)
    with pytest.raises(InputError, match="line 2: expected a response to prompt 2, got one to another prompt"):
        read_finished(path, ["a"], 1)


def test_a_folder_is_of_one_setting(tmp_path: Path) -> None:
    folder = tmp_path / "new/folder"
    claim(folder, {"top_k": 0, "stop": None, "seeds": (1, 2)})
    claim(folder, {"top_k": 0, "stop": None, "seeds": (1, 2)})
    with pytest.raises(InputError, match="expected responses made with stop = '###', it has some made with None; give"):
        claim(folder, {"top_k": 0, "stop": "###"})
    claim(folder, {"top_k": 0, "stop_rows": "each", "prompt_length": None})  # of an earlier version, which had no other
    with pytest.raises(InputError, match="made with stop_rows = 'first', it has some made with 'each'"):
        claim(folder, {"top_k": 0, "stop_rows": "first"})
    (folder / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="settings.json: expected JSON"):
        claim(folder, {"top_k": 0})
    (folder / "settings.json").rename(folder / "seed-1.jsonl")
    with pytest.raises(InputError, match="expected settings.json beside the responses in it, there is none"):
        claim(folder, {"top_k": 0})


def test_the_digest_of_the_weights() -> None:
    model = make_model("gpt2")
    digest = weights_digest(model)
    torch.set_num_threads(1)
    assert weights_digest(make_model("gpt2")) == digest
    weight = model.transformer.h[2].mlp.c_fc.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert weights_digest(model) != digest
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert weights_digest(make_model("gpt2").to(dtype)) != digest


def test_devices() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("cpuu", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(InputError, match=f"device: expected auto, cpu, cuda or cuda:N, got '{name}'"):
            choose_device(name)
