"""What a process keeps of memory that is free. No torch: this runs on the device."""

import contextlib
import ctypes


def give_back() -> None:
    """Return freed memory to the system, some tenths of a millisecond each time.

    The C library keeps what it has freed once, for the next array of that size. On a small device it then counts
    together with what comes next and allocates elsewhere: decoded weights beside the kernels' packed ones, what the
    features of 15 s of audio were made with (3 MB) beside the encoder's states.
    """
    with contextlib.suppress(OSError, AttributeError):  # only the GNU C library has it, and only it needs it
        ctypes.CDLL(None).malloc_trim(0)
