"""Layer mapping, and capture of hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, VOCABULARY, WIDTH, make_model
from torch import Tensor

from mta_fast import LayerMap, MTAConfig, MTALoss, capture_layers
from mta_fast.errors import InputError
from mta_fast.layers import hidden_widths, selects_hidden_states

pytest.importorskip("transformers")
CHOSEN = (0, LAYERS // 2, LAYERS)


def _inputs() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 7)), "attention_mask": mask}


def _all_states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    return states


# --- mapping -----------------------------------------------------------------------------------------------------


def test_proportional_mapping() -> None:
    assert LayerMap.proportional(12, 48, [6, 9, 12]).pairs == ((6, 24), (9, 36), (12, 48))
    assert LayerMap.proportional(12, 48).pairs == ((6, 24), (9, 36), (12, 48))
    assert LayerMap.proportional(4, 6, [1, 3]).pairs == ((1, 2), (3, 5))  # 1.5 and 4.5 round up
    assert LayerMap.proportional(24, 24, range(0, 25, 12)).pairs == ((0, 0), (12, 12), (24, 24))
    assert LayerMap.proportional(1, 1).pairs == ((1, 1),)


def test_mapping_errors() -> None:
    with pytest.raises(InputError, match="expected at most the teacher's 6, got 12.*give layer_pairs by hand"):
        LayerMap.proportional(12, 6)
    with pytest.raises(InputError, match="layers: expected hidden-state indices 0 to 4 .*got 5"):
        LayerMap.proportional(4, 8, [5])
    with pytest.raises(InputError, match=r"student_layers: expected the model's number of layers"):
        LayerMap.proportional([6, 9], 48)  # type: ignore[arg-type]


# --- capture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_equals_output_hidden_states(family: str) -> None:
    model, inputs = make_model(family).eval(), _inputs()
    expected = _all_states(model, inputs)
    with capture_layers(model, CHOSEN) as hidden:
        output = model(**inputs)
    assert sorted(hidden) == list(CHOSEN)
    for layer in CHOSEN:
        assert torch.equal(hidden[layer], expected[layer])
    # only the chosen ones are kept, and nothing stays behind on the model
    kept = [i for i, state in enumerate(output.hidden_states or ()) if state is not None]
    assert kept == (list(CHOSEN) if selects_hidden_states(model) else [])
    assert model(**inputs).hidden_states is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_some_architectures_need_hooks() -> None:
    # without one of each kind the test above would prove one way only
    assert not selects_hidden_states(make_model("gptj"))
    assert all(selects_hidden_states(make_model(family)) for family in FAMILIES if family != "gptj")


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_work_for_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mta_fast.layers.selects_hidden_states", lambda model: False)
    model, inputs = make_model(family).eval(), _inputs()
    expected = _all_states(model, inputs)
    with capture_layers(model, CHOSEN) as hidden:
        model(**inputs)
    assert all(torch.equal(hidden[layer], expected[layer]) for layer in CHOSEN)


def test_capture_through_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("qwen2"), peft.LoraConfig(target_modules=["q_proj"])).eval()
    inputs = _inputs()
    expected = _all_states(model, inputs)
    with capture_layers(model, CHOSEN) as hidden:
        model(**inputs)
    assert all(torch.equal(hidden[layer], expected[layer]) for layer in CHOSEN)


@pytest.mark.parametrize("family", ["gpt2", "opt-350m", "llama", "qwen2", "gptj"])
def test_capture_under_gradient_checkpointing(family: str) -> None:
    inputs, gradients = _inputs(), []
    for checkpointing in (False, True):
        model = make_model(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with capture_layers(model, CHOSEN) as hidden:
            model(**inputs, use_cache=False)
            sum(hidden[layer].square().sum() for layer in CHOSEN).backward()  # type: ignore[union-attr]
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reentrant_checkpointing_is_refused() -> None:
    model = make_model("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="got use_reentrant=True; call model.gradient_checkpointing_enable"):
        with capture_layers(model, CHOSEN):
            pass
    with torch.no_grad(), capture_layers(model, CHOSEN):
        pass  # no graph is wanted


@pytest.mark.parametrize("family", ["gpt2", "opt-350m", "llama", "qwen2", "mistral", "gptj"])
def test_capture_under_compile(family: str) -> None:
    model, inputs = make_model(family).eval(), _inputs()
    expected = _all_states(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), capture_layers(compiled, CHOSEN) as hidden:
        compiled(**inputs)
    for layer in CHOSEN:
        torch.testing.assert_close(hidden[layer], expected[layer])


def test_a_caller_may_want_all_states() -> None:
    model = make_model("gpt2").eval()
    with capture_layers(model, [1]) as hidden:
        output = model(**_inputs(), output_hidden_states=True)
    assert len([s for s in output.hidden_states if s is not None]) == LAYERS + 1
    assert torch.equal(hidden[1], output.hidden_states[1])


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_nested_captures(family: str) -> None:
    model, inputs = make_model(family).eval(), _inputs()
    expected = _all_states(model, inputs)
    with capture_layers(model, [1, 2]) as outer, capture_layers(model, [2, 4]) as inner:
        model(**inputs)
    for hidden, layers in ((outer, [1, 2]), (inner, [2, 4])):
        assert all(torch.equal(hidden[layer], expected[layer]) for layer in layers)
    model.config.output_hidden_states = True
    with capture_layers(model, [1]) as hidden:
        output = model(**inputs)
    assert all(state is not None for state in output.hidden_states)
    assert torch.equal(hidden[1], expected[1])
    with capture_layers(model, []) as hidden:
        model(**inputs)
    assert not hidden


def test_an_error_inside_leaves_no_hook() -> None:
    for family in ("gpt2", "gptj"):
        model = make_model(family)
        with pytest.raises(ZeroDivisionError), capture_layers(model, CHOSEN):
            raise ZeroDivisionError
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_refuse_an_ambiguous_model() -> None:
    model = make_model("gptj")
    model.adapters = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    with pytest.raises(InputError, match=r"GPTJForCausalLM has 2 \['transformer.h', 'adapters'\]"):
        with capture_layers(model, CHOSEN):
            pass


def test_capture_after_compiling_in_place() -> None:
    model, inputs = make_model("gptj").eval(), _inputs()
    expected = _all_states(model, inputs)
    model.compile(backend="aot_eager")
    with torch.no_grad():
        model(**inputs)
        with capture_layers(model, CHOSEN) as hidden:
            model(**inputs)
    for layer in CHOSEN:
        torch.testing.assert_close(hidden[layer], expected[layer])


RECURRENT = ("Mamba", "Mamba2", "FalconMamba", "Rwkv")  # their own hidden_states begin after block 1


def _recurrent(family: str) -> Any:
    import transformers as tf

    sizes: dict[str, int] = {"hidden_size": 16, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    if family == "Rwkv":
        sizes |= {"attention_hidden_size": 16, "intermediate_size": 32, "context_length": 16}
    else:
        sizes |= {"state_size": 4} | ({"head_dim": 8, "num_heads": 4, "n_groups": 1} if family == "Mamba2" else {})
    config = getattr(tf, f"{family}Config")(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return getattr(tf, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", RECURRENT)
def test_layer_k_is_the_state_after_block_k_whatever_the_models_tuple(family: str) -> None:
    model, tokens = _recurrent(family), torch.randint(1, VOCABULARY, (2, 5))
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    by_hand: dict[int, Tensor] = {}

    def keep(k: int, output: Any) -> None:
        by_hand[k] = output if isinstance(output, Tensor) else output[0]

    hooks = [block.register_forward_hook(lambda *a, k=k: keep(k, a[-1])) for k, block in enumerate(blocks, 1)]
    with torch.no_grad(), capture_layers(model, range(LAYERS + 1)) as hidden:
        own = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    for hook in hooks:
        hook.remove()
    assert torch.equal(hidden[0], model.get_input_embeddings()(tokens))
    assert all(torch.equal(hidden[k], by_hand[k]) for k in range(1, LAYERS))
    assert all(torch.equal(hidden[k], own[k - 1]) for k in range(1, LAYERS))  # the reason for the convention
    assert torch.equal(hidden[LAYERS], own[-1])
    assert not torch.equal(hidden[LAYERS], by_hand[LAYERS])  # the final norm is in it


def test_a_compiled_model_keeps_the_convention() -> None:
    model, tokens = _recurrent("Mamba"), torch.randint(1, VOCABULARY, (2, 5))
    layers = (1, 2, LAYERS)
    with torch.no_grad(), capture_layers(model, layers) as expected:
        model(input_ids=tokens, use_cache=False)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), capture_layers(compiled, layers) as hidden:
        compiled(input_ids=tokens, use_cache=False)
    for layer in layers:
        torch.testing.assert_close(hidden[layer], expected[layer])
    with pytest.raises(InputError, match="layers: expected 1 to 4 of a compiled mamba model.*got 0; capture before"):
        with capture_layers(compiled, [0, 1]):
            pass


def test_capture_errors() -> None:
    model = make_model("gpt2")
    with pytest.raises(InputError, match="expected hidden-state indices 0 to 4 .*got 5"):
        with capture_layers(model, [1, 5]):
            pass
    with capture_layers(model, [1]) as hidden:
        with pytest.raises(InputError, match="call the model inside the with-block"):
            hidden[1]
        model(**_inputs())
        with pytest.raises(InputError, match=r"layer 2: expected one of the captured layers \[1\]"):
            hidden[2]
        with pytest.raises(InputError, match="call the model with return_dict=True"):
            model(**_inputs(), return_dict=False)
    with pytest.raises(InputError, match="expected a transformers model with a config, got Linear"):
        with capture_layers(torch.nn.Linear(2, 2), [0]):
            pass


# --- widths ------------------------------------------------------------------------------------------------------


def test_widths_per_layer() -> None:
    model = make_model("opt-350m").train()
    model.lm_head.eval()
    assert hidden_widths(model, CHOSEN) == {0: WIDTH, 2: WIDTH, LAYERS: WIDTH // 2}
    assert model.training
    assert not model.lm_head.training


def test_for_models_reads_the_widths() -> None:
    student, teacher = make_model("opt-350m"), make_model("llama", layers=8, width=48)
    config = MTAConfig(LayerMap.proportional(4, 8).pairs, "word")
    loss = MTALoss.for_models(student, teacher, config)
    assert loss.student_dims == [WIDTH, WIDTH, WIDTH // 2]
    assert loss.teacher_dims == [48, 48, 48]
    with pytest.raises(InputError, match="expected hidden-state indices 0 to 4"):
        MTALoss.for_models(student, student, MTAConfig([(2, 6)], "word"))
