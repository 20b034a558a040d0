"""The errors mta_fast raises on purpose: each names what was expected, what came, and the mend."""

from __future__ import annotations

INTERRUPTED, TERMINATED = 130, 143  # exit codes after Ctrl-C and SIGTERM; what could be saved is saved


class MTAFastError(Exception):
    """Base class; the command line prints these as one line and exits with 2."""


class InputError(MTAFastError, ValueError):
    """An argument has a wrong value, shape, dtype or device."""


class MissingPackageError(MTAFastError, ImportError):
    """An optional package or model is not installed."""


class BackendUnavailableError(MTAFastError, RuntimeError):
    """No backend can run the call, or the one that was asked for can't."""


class DoubleBackwardError(MTAFastError, RuntimeError):
    """A second derivative was asked for; the explicit backward formulas have none."""
