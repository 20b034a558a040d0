"""YAML 1.2's scalars for PyYAML, which reads 1.1: there ``1e-4`` is a string, and ``no`` is false."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mta_fast.errors import InputError
from mta_fast.files import user_path
from mta_fast.packages import require

_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+
        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


def loads(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        where: what the text is, for the message of an error.

    Raises:
        InputError: no YAML. MissingPackageError: pyyaml is not installed.
    """
    yaml = _package()
    try:
        return yaml.load(text, Loader=_loader(yaml))
    except yaml.YAMLError as error:
        raise InputError(f"{where}: expected YAML, got a text that is none: {error}") from None


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: no YAML, or no mapping. MissingPackageError: pyyaml is not installed.
    """
    loaded = loads(user_path(path).read_text(encoding="utf-8"), str(path))
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a mapping of names to values, got {type(loaded).__name__}")
    return loaded


def dumps(values: Any) -> str:
    """The YAML text of plain values, in their order."""
    return str(_package().safe_dump(values, sort_keys=False))


def _loader(yaml: Any) -> Any:
    class Loader(yaml.SafeLoader):
        pass

    replaced = {"tag:yaml.org,2002:float": _FLOAT, "tag:yaml.org,2002:bool": _BOOL}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    return Loader


def _package() -> Any:
    require("pyyaml", "train", "YAML", module="yaml")
    import yaml

    return yaml
