"""A disk without room, by any user on any system with POSIX limits."""

import resource
import signal
from contextlib import contextmanager


@contextmanager
def little_room(size=2**16):
    """No file may grow beyond so many bytes, which is how a full disk or a quota looks to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
