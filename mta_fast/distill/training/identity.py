"""Which teacher a cache is of: a digest of all its weights but the head's, and what else its states depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.distill.models import model_files
from mta_fast.distill.teacher.contents import Contents
from mta_fast.distill.training.fingerprint import of_config, plain
from mta_fast.errors import InputError
from mta_fast.layers import unwrap

DIGEST_BYTES = 16
# of ``from_pretrained``: where files are, not what the model is
_PLACES = ("token", "cache_dir", "local_files_only", "force_download", "proxies", "device_map", "max_memory")


def identity_of(teacher: nn.Module, autocast: str | None) -> dict[str, Any]:
    """What a teacher's states depend on, by name, as JSON gives it back.

    The weights are hashed whole, a second a GB; where off-loaded ones have no values here, their shapes are.

    Args:
        autocast: the dtype that it runs in beside its own; None: its own alone.
    """
    inner: Any = unwrap(teacher)
    quantisation: Any = getattr(inner.config, "quantization_config", None)
    adapters: Any = getattr(teacher, "peft_config", None) or {}
    active = getattr(teacher, "active_adapters", None) if adapters else None
    return _as_json(
        {
            "teacher": weights_digest(teacher),
            "adapters": {name: of_config("", adapter) for name, adapter in adapters.items()},
            "active adapters": active() if callable(active) else active,
            "quantisation": plain(quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation),
            "dtype": sorted({str(each.dtype).removeprefix("torch.") for each in teacher.parameters()}),
            "config": of_config("", inner.config),
            **surroundings(autocast),
        }
    )


def surroundings(autocast: str | None) -> dict[str, Any]:
    """The part of an identity that is known without the model."""
    return {"autocast": autocast, "transformers": importlib.metadata.version("transformers")}


def weights_digest(model: nn.Module) -> str:
    """Over the names, shapes, dtypes and bytes of all parameters and buffers but the LM head's own."""
    inner: Any = unwrap(model)
    output = inner.get_output_embeddings()
    own = {f"{name}." for name, module in model.named_modules() if module is output}
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith(tuple(own)):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            digest.update(_bytes_of(value))
    return digest.hexdigest()


def _bytes_of(value: Tensor) -> Any:
    own = value.detach()
    if own.device.type == "meta" or not own.numel():
        return b""
    return own.cpu().contiguous().flatten().view(torch.uint8).numpy()


def source_of(path: str, dtype: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which files a teacher is loaded from, with their digests, and how: what tells it without loading it.

    None where that can't be told: then it is loaded and compared itself.
    """
    files = model_files(path, **options)
    if not files:
        return None
    how = {key: value for key, value in options.items() if key not in _PLACES}
    return _as_json({"files": {file.name: _file_digest(file) for file in files}, "dtype": dtype, "options": plain(how)})


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


def check_same(folder: Path, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a cache of another teacher, or one that runs otherwise.

    Raises:
        InputError: names what differs, and both values.
    """
    differing = [
        f"{name}: {_short(value, stored.get(name))}" for name, value in own.items() if stored.get(name) != value
    ]
    if differing:
        raise InputError(
            f"{folder}: expected the states of this teacher, they differ in (stored -> now) {'; '.join(differing)}; "
            f"give another folder as teacher.cache, or delete this one to make it again"
        )


def check_contents(folder: Path, stored: Contents, wanted: Contents) -> None:
    """Refuse a cache without something that the run reads.

    Raises:
        InputError: names it.
    """
    missing = stored.lacks(wanted)
    if missing:
        raise InputError(
            f"{folder}: expected a cache with {'; '.join(missing)}; give another folder as teacher.cache, or delete "
            f"this one to make it again"
        )


def _short(new: Any, old: Any) -> str:
    if isinstance(new, dict) and isinstance(old, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(f"{key.lstrip('.')} {old.get(key)} -> {new.get(key)}" for key in keys)
    return f"{old} -> {new}"


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(values))
    return made
