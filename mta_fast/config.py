"""MTAConfig: everything that decides what MTALoss computes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from mta_fast import _yaml
from mta_fast.choices import check_choice
from mta_fast.choices import nearest as nearest
from mta_fast.errors import InputError
from mta_fast.files import user_path, write_whole

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["word", "phrase"]
LayerPairs = tuple[tuple[int, int], ...]
T = TypeVar("T", float, "Tensor")


class _Preset(NamedTuple):
    """One row of the paper's table: layers of words | phrases, and the two weights."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    lambda_dsa: float
    lambda_hid: float


_QWEN_UPPER = (14, 16, 18, 20, 22, 24)
_OPT_STUDENT, _OPT_TEACHER = (16, 18, 20, 22, 24), (20, 23, 26, 29, 32)
PRESETS: dict[str, _Preset] = {
    "gpt2": _Preset((6, 9, 12), (24, 36, 48), 2.0, 0.2),
    "qwen1.5": _Preset(_QWEN_UPPER, _QWEN_UPPER, 2.0, 0.2),
    "opt": _Preset(_OPT_STUDENT, _OPT_TEACHER, 3.0, 0.3),
    "gpt2-fdd": _Preset((4, 6, 8), (16, 24, 32), 2.0, 0.2),
    "qwen1.5-fdd": _Preset((4, 8, 16), (4, 8, 16), 2.0, 0.2),
    "qwen1.5-distillm2": _Preset(_QWEN_UPPER, _QWEN_UPPER, 2.0, 0.2),
    "opt-distillm2": _Preset(_OPT_STUDENT, _OPT_TEACHER, 3.0, 0.3),
}
_CHOICES = {
    "student_pooling": ("teacher", "own"),
    "weighting": ("importance", "uniform", "entropy"),
    "normalization": ("batch", "sample"),
    "dsa_method": ("auto", "pairwise", "gram"),
}


@dataclass(frozen=True)
class MTAConfig:
    """What MTALoss computes. Every ablation of the paper is a field.

    Attributes:
        layer_pairs: (student layer, teacher layer) hidden-state indices: 0 the embeddings, N after the final norm.
        granularity: "word" or "phrase" for each pair; a single string stands for all pairs.
        lambda_dsa, lambda_hid: weights of the two terms; 0 leaves a term out (Hid then has no projections).
        student_pooling: "teacher": the student pools with the teacher's token weights (paper); "own": with its own
            importance (public scripts; always so with two tokenizers).
        weighting: "importance"; "uniform": W_u = 1 in DSA and n_j in Hid (ablation "no weights"; pooling stays
            weighted); "entropy": the teacher's certainty replaces importance in both, never in pooling.
        normalization: "batch": numerators and denominators summed over the batch (paper); "sample": mean of rows.
        causal: importance attends to earlier tokens only.
        count_padding: importance counts padded queries (public scripts), so that it depends on the padded length:
            MTATrainer then pads to ``max_length``; in a loop of your own give ``SpanCollator(pad_to="max_length")``.
        projection_bias: whether the projections have a bias.
        dsa_method: "auto", "pairwise" or "gram".
        backend: "auto" or a backend's name.

    Raises:
        InputError: a value outside these, or lengths that don't match.
    """

    layer_pairs: LayerPairs
    granularity: tuple[Granularity, ...] = field(default=("phrase",))
    lambda_dsa: float = 2.0
    lambda_hid: float = 0.2
    student_pooling: Literal["teacher", "own"] = "teacher"
    weighting: Literal["importance", "uniform", "entropy"] = "importance"
    normalization: Literal["batch", "sample"] = "batch"
    causal: bool = False
    count_padding: bool = False
    projection_bias: bool = True
    dsa_method: Literal["auto", "pairwise", "gram"] = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        pairs = checked_layer_pairs(self.layer_pairs)
        given: object = self.granularity
        kinds = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
        kinds = kinds * len(pairs) if len(kinds) == 1 else kinds
        if len(kinds) != len(pairs):
            raise InputError(
                f"granularity: expected one, or one for each of the {len(pairs)} layer pairs, got {len(kinds)}; with "
                f"other layer_pairs than a preset's, give granularity too"
            )
        for kind in kinds:
            check_choice("granularity", kind, get_args(Granularity))
        object.__setattr__(self, "layer_pairs", pairs)
        object.__setattr__(self, "granularity", kinds)
        for name, options in _CHOICES.items():
            check_choice(name, getattr(self, name), options)
        for name in ("lambda_dsa", "lambda_hid"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(f"{name}: expected a finite number >= 0, got {value!r}")
            object.__setattr__(self, name, float(value))
        for name in ("causal", "count_padding", "projection_bias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected true or false, got {getattr(self, name)!r}")

    @property
    def student_layers(self) -> list[int]:
        """The distinct student hidden-state indices, ascending: what to capture."""
        return sorted({student for student, _ in self.layer_pairs})

    @property
    def teacher_layers(self) -> list[int]:
        """The distinct teacher hidden-state indices, ascending."""
        return sorted({teacher for _, teacher in self.layer_pairs})

    def weighted(self, dsa: T, hid: T) -> T:
        """lambda_dsa * L_DSA + lambda_hid * L_Hid: what MTA adds to the base loss."""
        return self.lambda_dsa * dsa + self.lambda_hid * hid

    @classmethod
    def paper(cls, pair: str = "gpt2", **changes: Any) -> MTAConfig:
        """The paper's settings for a model pair (table of layer choices).

        Args:
            pair: "gpt2" (120M <- 1.5B), "qwen1.5" (0.5B <- 1.8B), "opt" (1.3B <- 6.7B), or one of "gpt2-fdd",
                "qwen1.5-fdd", "qwen1.5-distillm2", "opt-distillm2" for that base loss.
            changes: fields to set otherwise.

        Raises:
            InputError: an unknown pair or field.
        """
        check_choice("pair", pair, PRESETS)
        preset = PRESETS[pair]
        settings: dict[str, Any] = {
            "layer_pairs": tuple(zip(preset.student, preset.teacher, strict=True)),
            "granularity": default_granularity(len(preset.student)),
            "lambda_dsa": preset.lambda_dsa,
            "lambda_hid": preset.lambda_hid,
        }
        return cls.from_dict(settings | changes)

    @classmethod
    def public(cls, pair: str = "gpt2", *, weight: float = 2.0, **changes: Any) -> MTAConfig:
        """What the authors' public scripts compute: weight * mean over layers of (DSA + 0.1 Hid).

        Importance counts padded queries, and the student pools with its own importance. Rows must be padded to
        ``max_length``, as the scripts do and MTATrainer does with this config.

        Args:
            pair: as in ``paper``, for the layers. weight: 2 or 3 in the scripts.
        """
        variant = {"student_pooling": "own", "count_padding": True}
        scale = {"lambda_dsa": weight, "lambda_hid": 0.1 * weight}
        return cls.paper(pair, **(variant | scale | changes))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MTAConfig:
        """The inverse of ``to_dict``; an unknown key is an error that names the nearest valid one."""
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                raise InputError(f"MTAConfig: unknown key {key!r}{nearest(key, known)}; expected {', '.join(known)}")
        if "layer_pairs" not in settings:
            raise InputError("MTAConfig: expected layer_pairs, got none; MTAConfig.paper() has presets")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        plain = asdict(self)
        plain["layer_pairs"] = [list(pair) for pair in self.layer_pairs]
        plain["granularity"] = list(self.granularity)
        return plain

    @classmethod
    def from_yaml(cls, path: str | Path) -> MTAConfig:
        """Read the fields from a YAML file.

        Raises:
            InputError: no YAML, no mapping, or an unknown key. MissingPackageError: pyyaml is not installed.
        """
        return cls.from_dict(_yaml.read(path))

    def to_yaml(self, path: str | Path) -> None:
        """Write the fields to a YAML file."""
        write_whole(user_path(path), _yaml.dumps(self.to_dict()))


def checked_layer_pairs(pairs: Any) -> LayerPairs:
    """(student layer, teacher layer) pairs of hidden-state indices; InputError for anything else."""
    try:
        made = tuple((operator.index(student), operator.index(teacher)) for student, teacher in pairs)
    except (TypeError, ValueError):
        raise InputError(f"layer_pairs: expected (student layer, teacher layer) pairs, got {pairs!r}") from None
    if not made:
        raise InputError("layer_pairs: expected at least one pair, got none")
    for pair in made:
        if min(pair) < 0:
            raise InputError(f"layer_pairs: expected hidden-state indices >= 0, got {pair}")
    return made


def default_granularity(pairs: int, words: int = 1) -> tuple[Granularity, ...]:
    """Words at the first ``words`` of so many layer pairs, phrases at the others (the paper's table: at the first)."""
    return tuple("word" if i < words else "phrase" for i in range(pairs))
