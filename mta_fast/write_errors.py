"""Whether an error is a failure to write, whoever wrote: each library reports a full disk in a type of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import TracebackType

# what torch's zip writer, safetensors, tokenizers and the system say of it
_MESSAGES = re.compile(
    r"PytorchStreamWriter|file write failed|unexpected pos|inline_container|os error \d+|no space left|disk quota"
    r"|file too large|read-only file system|input/output error",
    re.IGNORECASE,
)
_WRITERS = {"torch.serialization": ("save", "_save", "_legacy_save", "__exit__"), "safetensors.torch": ("save_file",)}


def write_failure(error: BaseException) -> str | None:
    """What went wrong where an error, or one that it came from, is a failure to write; None for another."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        return None
    for each in _causes(error):
        if isinstance(each, OSError) or type(each).__name__ == "SafetensorError" or _reports(each):
            return " ".join(str(each).split()) or type(each).__name__
    return None


def _reports(error: BaseException) -> bool:
    if _MESSAGES.search(str(error)):
        return True
    frames = _frames(error.__traceback__) if isinstance(error, RuntimeError) else ()
    return any(name in _WRITERS.get(module, ()) for module, name in frames)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an error came from, the first cause first; distributed checkpoints keep those of all ranks."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if any(each is known for known in seen):
            continue
        seen.append(each)
        waiting += [found for found in (each.__cause__, each.__context__) if found is not None]
        failures = getattr(each, "failures", {})
        waiting += [pair[0] for pair in failures.values()] if isinstance(failures, dict) else []
    return reversed(seen)


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, str]]:
    while trace is not None:
        code = trace.tb_frame
        yield code.f_globals.get("__name__", ""), code.f_code.co_name
        trace = trace.tb_next
