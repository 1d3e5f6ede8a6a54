"""What must not be cut in two: the first import of an engine and the compilation of a kernel.

Between any two steps of a thread Python may run other code in it: a signal handler, KeyboardInterrupt, what
the collector finds. If that pools too, it would meet modules half imported or a compiler half way. In a
thread that nobody else uses it cannot: whoever comes meanwhile waits for the same outcome, and who is
interrupted while waiting leaves the work to be finished.
"""

import gc
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_own = threading.local()


def do_apart(work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in a thread of its own and return or raise what it does."""
    if getattr(_own, "is_apart", False):
        return work(*args, **kwargs)
    outcome: list[Any] = []

    def run() -> None:
        _own.is_apart = True
        collects = gc.isenabled()
        gc.disable()  # finalisers of others run in whatever thread collects
        try:
            outcome.append((work(*args, **kwargs), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            if collects:
                gc.enable()

    thread = threading.Thread(target=run, name="roialign-apart")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is about to end, or the system allows no more threads
        return work(*args, **kwargs)
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
