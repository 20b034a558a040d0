"""Entry point of the command line (``mta-fast`` and ``python -m mta_fast``).

An error is one line with its mend and exit code 2; only a bug shows a traceback.
"""

from __future__ import annotations

import sys

from mta_fast.errors import INTERRUPTED, MTAFastError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        from mta_fast.cli import app
    except ImportError as error:
        if error.name != "typer":
            raise
        return _fail("the command line needs typer, which is not installed; pip install '.[train]' in the checkout")
    try:
        code = app(args=arguments, standalone_mode=False)
    except KeyboardInterrupt:
        return _interrupted()
    except (MTAFastError, OSError) as error:
        return _fail(str(error))
    except Exception as error:
        if type(error).__name__ == "Abort":  # typer's own classes, whose module differs between its versions
            return _interrupted()
        if not hasattr(error, "format_message"):
            raise
        return _fail(f"{error.format_message()} See mta-fast --help.")
    if code == INTERRUPTED:  # newer typers turn Ctrl-C into this exit code
        return _interrupted()
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print("mta-fast: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _interrupted() -> int:
    print("mta-fast: interrupted", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
