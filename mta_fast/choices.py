"""One value of several: refused with the choices and the nearest of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mta_fast.errors import InputError


def check_choice(name: str, value: object, choices: Iterable[str], other: str = "", hint: str = "") -> None:
    """``value`` is one of ``choices``.

    Args:
        name: of what was set, such as "base.loss".
        other: what may stand there besides them and isn't checked here, such as "none".
        hint: where to read on.

    Raises:
        InputError: it isn't: "name: expected one of a, b, or other, got 'x', did you mean 'b'; hint".
    """
    known = tuple(choices)
    if value not in known:
        expected = ", ".join(known) + (f", or {other}" if other else "")
        mend = nearest(value, known) + (f"; {hint}" if hint else "")
        raise InputError(f"{name}: expected one of {expected}, got {value!r}{mend}")


def nearest(name: object, options: Iterable[str]) -> str:
    """ ", did you mean ...?", or nothing where no option is close."""
    close = difflib.get_close_matches(str(name), list(options), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
