"""The two refusals that the whole package shares: a value that is none of several, and a package that is missing."""

from __future__ import annotations

import sys

import pytest

from mta_fast.choices import check_choice, nearest
from mta_fast.errors import InputError, MissingPackageError
from mta_fast.packages import require


def test_a_choice() -> None:
    check_choice("fruit", "fig", {"apple": 1, "fig": 2})


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("fgi", {}, "fruit: expected one of apple, fig, got 'fgi', did you mean 'fig'?"),
        (None, {}, "fruit: expected one of apple, fig, got None"),
        ({"b": 1}, {}, "fruit: expected one of apple, fig, got {'b': 1}"),
        ("", {"other": "none"}, "fruit: expected one of apple, fig, or none, got ''"),
        ("x", {"hint": "see the basket"}, "fruit: expected one of apple, fig, got 'x'; see the basket"),
    ],
)
def test_no_choice(value: object, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_choice("fruit", value, (name for name in ("apple", "fig")), **options)
    assert str(raised.value) == message


def test_nearest() -> None:
    assert nearest("appel", ["apple", "fig"]) == ", did you mean 'apple'?"
    assert nearest(3, ["apple", "fig"]) == ""


def test_a_package_is_looked_for_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    require("zen", "train", "peace", module="this")
    assert "this" not in sys.modules


@pytest.mark.parametrize("module", [None, "no_such.inside"])
def test_a_missing_package(module: str | None) -> None:
    with pytest.raises(MissingPackageError) as raised:
        require("no_such", "train,spacy", "inspect", module=module)
    assert str(raised.value) == (
        "inspect: expected the package no_such, it is not installed; pip install '.[train,spacy]' in the checkout"
    )
