"""Entry point of the command line (``mta-fast`` and ``python -m mta_fast``).

An error is one line with its mend and exit code 2; only a bug shows a traceback.
"""

from __future__ import annotations

import sys
from typing import Any

from mta_fast.errors import INTERRUPTED, TERMINATED, MTAFastError
from mta_fast.interrupt import terminable


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        from mta_fast.cli import app
    except ImportError as error:
        if error.name != "typer":
            raise
        return _fail("the command line needs typer, which is not installed; pip install '.[train]' in the checkout")
    with terminable() as request:
        code = _run(app, arguments)
    if code == INTERRUPTED and request.number is not None:  # Ctrl-C has the same way out
        code = TERMINATED
    if code in (INTERRUPTED, TERMINATED):
        print(f"mta-fast: {'interrupted' if code == INTERRUPTED else 'terminated'}", file=sys.stderr)
    return code


def _run(app: Any, arguments: list[str] | None) -> int:
    try:
        code = app(args=arguments, standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (MTAFastError, OSError) as error:
        return _fail(str(error))
    except Exception as error:
        if type(error).__name__ == "Abort":  # typer's own classes, whose module differs between its versions
            return INTERRUPTED
        if not hasattr(error, "format_message"):
            raise
        message = str(error.format_message())
        commas = " Lists have commas, such as --seeds 1,2,3." if "extra argument" in message else ""
        return _fail(f"{message}{commas} See mta-fast --help.")
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print("mta-fast: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
