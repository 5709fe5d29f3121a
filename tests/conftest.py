"""What holds for all tests."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts tests in the background has Ctrl-C ignored, and so would every process they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
