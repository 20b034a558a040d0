"""One process at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mta_fast.errors import InputError, MTAFastError
from mta_fast.files import LOCK_FILE, partial_folder

LOCK_VARIABLE = "MTA_FAST_LOCK"  # the file descriptor of a lock that a parent process passes on
HOLDER_BYTES = 4096
COMMAND_LENGTH = 200  # characters of a command line that a message shows

_held: set[int] = set()  # file descriptors of locks


def _let_go_in_child() -> None:
    """A forked worker that outlives its parent must not hold the parent's lock on."""
    for descriptor in list(_held):
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """This process alone works in a folder, which is made if it is missing; see ``lock_file``."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with lock_file(folder / LOCK_FILE, folder) as descriptor:
            yield descriptor
    finally:
        with suppress(OSError):  # not empty: what was made there stays
            for each in made:
                each.rmdir()


@contextmanager
def lock_file(file: Path, owned: Path) -> Iterator[int]:
    """Hold a lock until the block or the process ends, whichever comes first; the file goes with it.

    Args:
        file: its folder is made if it is missing.
        owned: what the lock stands for, in messages.

    Yields:
        A file descriptor. A program that gets it (``pass_fds``) and its number in $MTA_FAST_LOCK holds the lock too,
        also after this process has ended; forked workers do not.

    Raises:
        InputError: another process holds it; says which. MTAFastError: a system without such locks. OSError: the file
            can't be made.
    """
    try:
        import fcntl
    except ImportError:
        raise MTAFastError(
            f"{owned}: expected Linux or macOS, where a folder can be locked, got {sys.platform}; run it there"
        ) from None
    inherited = _inherited(file)
    if inherited is not None:
        _held.add(inherited)
        yield inherited
        return
    owner = os.getpid()
    descriptor = _acquire(file, owned, lambda opened: fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB))
    _held.add(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, _holder().encode(errors="replace"))
        yield descriptor
    finally:
        if os.getpid() == owner and descriptor in _held:
            _held.discard(descriptor)
            with suppress(OSError):  # before the lock goes: who opens the name then gets a new file
                file.unlink()
            os.close(descriptor)


@contextmanager
def lock_export(target: Path) -> Iterator[None]:
    """This process alone writes a folder that is written whole, and none is at work in the one it replaces."""
    with ExitStack() as stack:
        stack.enter_context(lock_file(partial_folder(target).with_name(f"{target.name}{LOCK_FILE}"), target))
        if target.is_dir():
            stack.enter_context(lock_folder(target))
        yield
    with suppress(OSError):  # others write beside it
        partial_folder(target).parent.rmdir()


def _inherited(file: Path) -> int | None:
    """The lock of this file that a parent process passed on."""
    number = os.environ.get(LOCK_VARIABLE, "")
    try:
        return int(number) if number and os.path.samestat(os.fstat(int(number)), file.stat()) else None
    except (ValueError, OSError):
        return None


def _acquire(file: Path, owned: Path, lock: Callable[[int], None]) -> int:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except OSError as error:
            raise type(error)(f"{owned}: can't be locked ({error.strerror}: {file}); give another place") from None
        try:
            lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, HOLDER_BYTES).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InputError(
                f"{owned}: expected no process at work in it, {holder} is; wait for its end, or stop it"
            ) from None
        except FileNotFoundError:  # its holder has just ended and removed it
            pass
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warnings.warn(
                f"{owned}: this file system knows no locks ({error.strerror}); see to it that no other process works "
                f"in it",
                stacklevel=2,
            )
            return descriptor
        os.close(descriptor)


def _holder() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:COMMAND_LENGTH] if sys.argv else "python"
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({command})"
