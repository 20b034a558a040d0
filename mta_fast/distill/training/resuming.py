"""``mta-fast train --resume``: the settings of the run that goes on against those it was started with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mta_fast import _yaml
from mta_fast.distill import manifest
from mta_fast.distill.methods.base import BaseMethod
from mta_fast.distill.methods.registry import method_type
from mta_fast.distill.training import fingerprint, ranks
from mta_fast.distill.training.fingerprint import Difference
from mta_fast.distill.training.settings import TrainSettings, same_settings, with_defaults
from mta_fast.errors import InputError
from mta_fast.files import write_whole

RUN_FILE, LATER_RUN_FILE = "config.yaml", "config-{number}.yaml"
PATHS = ("data.train", "data.eval", "*.path", "*.tokenizer")


def check(checkpoint: Path, out: Path, settings: TrainSettings, *, allow_changes: bool) -> None:
    """Refuse a damaged checkpoint, and settings that change the run; before any model is loaded.

    What differs and may is said. The settings are compared with those in the checkpoint, in one of an earlier version
    with the run's config.yaml.

    Raises:
        InputError: names every damaged file, or every setting that differs, its old and its new value.
    """
    if not ranks.is_first_of_node():
        return
    manifest.verify(checkpoint)
    _, started = fingerprint.load(checkpoint)
    if started is None and (out / RUN_FILE).is_file():
        started = _yaml.read(out / RUN_FILE)
    if started is None:
        warnings.warn(f"{out}: holds no {RUN_FILE}: whether the settings are the same can't be checked", stacklevel=3)
        return
    differing = differences(started, settings.to_dict(), finished=fingerprint.is_finished(checkpoint))
    # an MTA that alone differs is refused beside the projections, which say more of it
    if not allow_changes and any(each.matters and not each.key.startswith("mta") for each in differing):
        fingerprint.refuse(checkpoint, differing)
    free = [str(each) for each in differing if not each.matters]
    if free:
        print(f"{checkpoint.name} goes on with other settings that leave the training as it is: {'; '.join(free)}")


def differences(started: Mapping[str, Any], settings: Mapping[str, Any], *, finished: bool = False) -> list[Difference]:
    """The dotted keys whose values differ, those that only one has against their default."""
    old, new = _flat(with_defaults(started)), _flat(with_defaults(settings))
    defaults = _training_defaults()
    for one, other in ((old, new), (new, old)):
        one.update({key: defaults.get(key) for key in other if key not in one})
    for each in (old, new):
        each |= {key: value for key, value in defaults.items() if key not in each}
        method = _method_type(each.get("base.loss"))
        each["follows_evaluation"], each["follows_progress"] = method.follows_evaluation, method.follows_progress
    found = fingerprint.compare(old, new, finished=finished)
    return [each for each in found if not _same_place(each)]


def _method_type(name: Any) -> type[BaseMethod]:
    """The class of a base method; BaseMethod for one that is no more: that its name differs is then said."""
    try:
        return method_type(str(name))
    except InputError:
        return BaseMethod


def record(out: Path, settings: TrainSettings) -> None:
    """Write config.yaml; where it is there with other settings it stays, and these go into config-2.yaml and so on."""
    out.mkdir(parents=True, exist_ok=True)
    file, number = out / RUN_FILE, 1
    while file.is_file() and not same_settings(file, settings):
        number += 1
        file = out / LATER_RUN_FILE.format(number=number)
    if not file.is_file():
        write_whole(file, _yaml.dumps(settings.to_dict()))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            flat[f"{prefix}{key}"] = fingerprint.plain(value)
    return flat


def _training_defaults() -> dict[str, Any]:
    from mta_fast.distill.training.arguments import MTATrainingArguments

    described = {f.name: f for f in fields(MTATrainingArguments)}
    values = {name: f.default for name, f in described.items() if f.default is not MISSING}
    return {f"training.{name}": fingerprint.plain(value) for name, value in values.items()}


def _same_place(difference: Difference) -> bool:
    """Whether two spellings name one file or folder."""
    key, old, new, _ = difference
    if not any(fnmatch(key, pattern) for pattern in PATHS) or not (isinstance(old, str) and isinstance(new, str)):
        return False
    return os.path.exists(old) and os.path.exists(new) and os.path.samefile(old, new)
