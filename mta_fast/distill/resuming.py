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
from mta_fast.distill import fingerprint, manifest
from mta_fast.distill.fingerprint import Difference
from mta_fast.distill.settings import TrainSettings
from mta_fast.files import write_whole

CONFIG_FILE, LATER_CONFIG_FILE = "config.yaml", "config-{number}.yaml"
PATHS = ("data.train", "data.eval", "*.path", "*.tokenizer")
FOLLOWING_PROGRESS = ("distillm", "distillm2")


def check(checkpoint: Path, out: Path, settings: TrainSettings, *, allow_changes: bool) -> None:
    """Refuse a damaged checkpoint, and settings that change the run; before any model is loaded.

    What differs and may is said. The settings are compared with those in the checkpoint, in one of an earlier version
    with the run's config.yaml.

    Raises:
        InputError: names every damaged file, or every setting that differs, its old and its new value.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    manifest.verify(checkpoint)
    _, started = fingerprint.load(checkpoint)
    if started is None and (out / CONFIG_FILE).is_file():
        started = _yaml.read(out / CONFIG_FILE)
    if started is None:
        warnings.warn(
            f"{out}: holds no {CONFIG_FILE}: whether the settings are the same can't be checked", stacklevel=3
        )
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
    old, new = _flat(started), _flat(settings)
    defaults = _training_defaults()
    for one, other in ((old, new), (new, old)):
        one.update({key: defaults.get(key) for key in other if key not in one})
    for each in (old, new):
        each |= {key: value for key, value in defaults.items() if key not in each}
        each["follows_evaluation"] = each.get("base.loss") == "distillm"
        each["follows_progress"] = each.get("base.loss") in FOLLOWING_PROGRESS or ":" in str(each.get("base.loss"))
    found = fingerprint.compare(old, new, finished=finished)
    return [each for each in found if not _same_place(each)]


def record(out: Path, settings: TrainSettings) -> None:
    """Write config.yaml; where it is there with other settings it stays, and these go into config-2.yaml and so on."""
    out.mkdir(parents=True, exist_ok=True)
    text, file, number = _yaml.dumps(settings.to_dict()), out / CONFIG_FILE, 1
    while file.is_file() and file.read_text(encoding="utf-8") != text:
        number += 1
        file = out / LATER_CONFIG_FILE.format(number=number)
    if not file.is_file():
        write_whole(file, text)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            flat[f"{prefix}{key}"] = fingerprint.plain(value)
    return flat


def _training_defaults() -> dict[str, Any]:
    from mta_fast.distill.arguments import MTATrainingArguments

    described = {f.name: f for f in fields(MTATrainingArguments)}
    values = {name: f.default for name, f in described.items() if f.default is not MISSING}
    return {f"training.{name}": fingerprint.plain(value) for name, value in values.items()}


def _same_place(difference: Difference) -> bool:
    """Whether two spellings name one file or folder."""
    key, old, new, _ = difference
    if not any(fnmatch(key, pattern) for pattern in PATHS) or not (isinstance(old, str) and isinstance(new, str)):
        return False
    return os.path.exists(old) and os.path.exists(new) and os.path.samefile(old, new)
