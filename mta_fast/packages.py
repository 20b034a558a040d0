"""Optional packages: looked for before they are imported, and named with the command that installs them."""

from __future__ import annotations

import importlib.util

from mta_fast.errors import MissingPackageError


def require(package: str, extra: str, what_for: str, *, module: str | None = None) -> None:
    """An optional package is installed; it is not imported.

    Args:
        package: as pip names it. extra: of this project's, which brings it.
        what_for: what needs it, such as a command.
        module: as Python imports it, where that is another name; a module inside it serves too.

    Raises:
        MissingPackageError: it is not installed; says how to.
    """
    if not _is_installed(module or package):
        raise MissingPackageError(
            f"{what_for}: expected the package {package}, it is not installed; {install_command(extra)}"
        )


def install_command(extra: str) -> str:
    """What installs an extra of this project."""
    return f"pip install '.[{extra}]' in the checkout"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what the module lies in
        return False
