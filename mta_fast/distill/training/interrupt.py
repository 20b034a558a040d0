"""A training that is asked to stop finishes its step and saves it, on all ranks the same step."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from mta_fast.distill.training import ranks
from mta_fast.interrupt import Request, handling, stop_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class FinishStep:
    """On the first Ctrl-C or SIGTERM: finish the step, save a checkpoint and stop; the next one stops at once.

    While models and data are loaded there is nothing to save, and the first one stops at once. Under torchrun, which
    sends SIGTERM to every process itself, further ones of it say nothing new. transformers' own way
    (``enable_jit_checkpoint``) waits for three seconds, saves in the middle of a step, and each rank for itself.
    """

    def __init__(self) -> None:
        self._request, self._training = Request(), False
        self._relayed = "TORCHELASTIC_RUN_ID" in os.environ

    @property
    def signal(self) -> int:
        """The one that asked, here or (SIGTERM) on another rank."""
        return signal.SIGTERM if self._request.number is None else self._request.number

    def __enter__(self) -> FinishStep:
        self._handling = handling(SIGNALS, self._handle)
        self._handling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handling.__exit__(kind, error, trace)

    def watch(self, trainer: Any) -> None:
        """From the beginning of this trainer's first step on, finish the step; it asks ``stop_wanted`` after each."""
        from transformers import TrainerCallback

        outer, accelerator = self, trainer.accelerator

        class Begin(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                outer._training = True

        def wanted() -> bool:
            asked = outer._request.number is not None
            if accelerator.num_processes == 1:
                return asked
            if asked:
                accelerator.set_trigger()
            return bool(accelerator.check_trigger())  # true on all ranks where it is on one

        trainer.add_callback(Begin())
        trainer.stop_wanted = wanted

    def unwatch(self) -> None:
        """The training is over: the next signal stops at once, and what is left to do is done by a resumed run."""
        self._training = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        first = self._request.note(number)
        if first is None or (not first and self._relayed and number == signal.SIGTERM):
            return
        if not first or not self._training:
            stop_at_once(number)
        if ranks.is_first():  # not print: the signal may have come in the middle of one
            again = "press Ctrl-C" if number == signal.SIGINT else "send it"
            name = "interrupted" if number == signal.SIGINT else "SIGTERM"
            os.write(1, f"\n{name}: finishing this step and saving; {again} again to stop at once\n".encode())


def deaf_workers(loader: Any) -> Any:
    """A DataLoader whose workers are ended by this process alone, not by a SIGTERM to all processes of a job.

    torch would take their end for a crash and raise in the middle of the step.
    """
    if getattr(loader, "num_workers", 0) and hasattr(signal, "sigwaitinfo"):
        loader.worker_init_fn = functools.partial(_deafen, loader.worker_init_fn)
    return loader


def _deafen(then: Callable[[int], None] | None, worker: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if then is not None:
        then(worker)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
