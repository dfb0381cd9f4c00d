"""Asked to stop: SIGTERM and SIGUSR1, which a cluster sends before it takes a machine away, end a training at a whole step with a checkpoint."""

import signal
import threading

STATUS = 75  # exit status of `home train` then: BSD's EX_TEMPFAIL, "try again"; the same command goes on
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):
    """A training that was asked to stop, and has written its checkpoint."""


class StopRequest:
    """`asked` is True from the first of the signals on. Within `with`; handlers that were there before come back after. In another thread than the
    main one no handler can be set, and none is."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
