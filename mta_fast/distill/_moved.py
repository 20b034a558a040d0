"""Modules under the names they had before ``distill`` had rooms: ``mta_fast.distill.losses`` is ``methods.losses``.

The modules that scripts, pickled arguments and pages name can be imported by their earlier names, and functions that
left a module; CHANGELOG lists what can't.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "mta_fast.distill"
ROOMS = {
    "methods": ("distillm", "distillm2", "fdd", "losses"),
    "responses": ("evaluation", "generation", "pairs"),
    "training": (
        *("adapters", "arguments", "checkpoints", "feeding", "fingerprint", "fit", "fitness", "interrupt", "module"),
        *("placing", "resuming", "run", "saving", "settings", "stopwatch", "trainer"),
    ),
}
NAMES = {f"{PACKAGE}.models": {"cut_layers": f"{PACKAGE}.students.cut"}}  # by the module that had them
MOVED = {f"{PACKAGE}.{name}": f"{PACKAGE}.{room}.{name}" for room, names in ROOMS.items() for name in names}


class _Moved(MetaPathFinder, Loader):
    """Finds a module under its earlier name: the module itself, not a copy."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an earlier name; None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module where it is now."""
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; the import machinery has just given it the earlier name's spec."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def find_moved() -> None:
    """Let the earlier names be found, where nothing else has them."""
    sys.meta_path.append(_Moved())


def find_name(module: str, name: str) -> Any:
    """What a module had under this name before it moved, for the module's ``__getattr__``.

    Raises:
        AttributeError: it never had it.
    """
    if name not in NAMES[module]:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(NAMES[module][name]), name)
