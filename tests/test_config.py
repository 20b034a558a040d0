"""MTAConfig."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_fast import LayerMap, MTAConfig
from mta_fast.config import PRESETS
from mta_fast.errors import InputError


@pytest.mark.parametrize(
    ("pair", "pairs", "weights"),
    [
        ("gpt2", [(6, 24), (9, 36), (12, 48)], (2.0, 0.2)),
        ("qwen1.5", [(14, 14), (16, 16), (18, 18), (20, 20), (22, 22), (24, 24)], (2.0, 0.2)),
        ("opt", [(16, 20), (18, 23), (20, 26), (22, 29), (24, 32)], (3.0, 0.3)),
        ("gpt2-fdd", [(4, 16), (6, 24), (8, 32)], (2.0, 0.2)),
        ("qwen1.5-fdd", [(4, 4), (8, 8), (16, 16)], (2.0, 0.2)),
        ("qwen1.5-distillm2", [(14, 14), (16, 16), (18, 18), (20, 20), (22, 22), (24, 24)], (2.0, 0.2)),
        ("opt-distillm2", [(16, 20), (18, 23), (20, 26), (22, 29), (24, 32)], (3.0, 0.3)),
    ],
)
def test_paper_presets(pair: str, pairs: list[tuple[int, int]], weights: tuple[float, float]) -> None:
    config = MTAConfig.paper(pair)
    assert list(config.layer_pairs) == pairs
    assert (config.lambda_dsa, config.lambda_hid) == weights
    assert config.granularity == ("word", *("phrase",) * (len(pairs) - 1))
    assert (config.student_pooling, config.count_padding, config.normalization) == ("teacher", False, "batch")


def test_public_preset() -> None:
    config = MTAConfig.public("opt", weight=3.0)
    assert (config.student_pooling, config.count_padding) == ("own", True)
    assert (config.lambda_dsa, config.lambda_hid) == (3.0, pytest.approx(0.3))
    assert config.layer_pairs == MTAConfig.paper("opt").layer_pairs


@pytest.mark.parametrize("pair", PRESETS)
def test_dict_and_yaml_round_trip(pair: str, tmp_path: Path) -> None:
    config = MTAConfig.paper(pair, weighting="entropy", causal=True, lambda_hid=0.0)
    assert MTAConfig.from_dict(config.to_dict()) == config
    config.to_yaml(tmp_path / "mta.yaml")
    assert MTAConfig.from_yaml(tmp_path / "mta.yaml") == config


def test_one_granularity_stands_for_all() -> None:
    assert MTAConfig([(1, 2), (3, 4)], "word").granularity == ("word", "word")
    assert MTAConfig(LayerMap.proportional(4, 8)).granularity == ("phrase",) * 3


def test_layers_to_capture() -> None:
    config = MTAConfig([(9, 3), (6, 2), (9, 2)], "word")
    assert (config.student_layers, config.teacher_layers) == ([6, 9], [2, 3])


def test_errors_name_expected_and_received(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown key 'lamda_dsa', did you mean 'lambda_dsa'"):
        MTAConfig.from_dict({"layer_pairs": [(1, 1)], "lamda_dsa": 1.0})
    with pytest.raises(InputError, match="expected layer_pairs, got none"):
        MTAConfig.from_dict({})
    with pytest.raises(InputError, match="one for each of the 2 layer pairs, got 3"):
        MTAConfig([(1, 1), (2, 2)], ["word"] * 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="granularity: expected one of word, phrase, got 'sentence'"):
        MTAConfig([(1, 1)], "sentence")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="weighting: expected one of importance, uniform, entropy"):
        MTAConfig([(1, 1)], weighting="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="hidden-state indices >= 0"):
        MTAConfig([(-1, 1)])
    with pytest.raises(InputError, match="expected at least one pair"):
        MTAConfig([])
    with pytest.raises(InputError, match="expected .student layer, teacher layer. pairs"):
        MTAConfig([1, 2])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lambda_dsa: expected a finite number >= 0, got -1"):
        MTAConfig([(1, 1)], lambda_dsa=-1)
    with pytest.raises(InputError, match="causal: expected true or false, got 'yes'"):
        MTAConfig([(1, 1)], causal="yes")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected .student layer, teacher layer. pairs"):
        MTAConfig([(6.7, 24.2)])  # type: ignore[list-item]
    with pytest.raises(InputError, match="unknown key 1"):
        MTAConfig.from_dict({1: 2})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="granularity: expected one of word, phrase, got None"):
        MTAConfig([(1, 1)], None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give granularity too"):
        MTAConfig.paper("gpt2", layer_pairs=[(1, 1)])
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InputError, match="expected YAML, got a text that is none"):
        MTAConfig.from_yaml(tmp_path / "broken.yaml")
    with pytest.raises(InputError, match="did you mean 'gpt2'"):
        MTAConfig.paper("gpt-2")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="expected a mapping of names to values, got list"):
        MTAConfig.from_yaml(tmp_path / "list.yaml")
