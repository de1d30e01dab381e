"""vLLM's processes beside the server's: what belongs to the process and not to steering."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def follow_parent() -> None:
    """Have this process of vLLM's end when the one that started it does, however that ends, and not before: the terminal's
    Ctrl-C is for the server, which drains, and then ends vLLM. On Linux."""
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    if os.getpid() != os.getpgrp():
        os.setpgid(0, 0)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent.pid:  # it ended a moment ago
        os.kill(os.getpid(), signal.SIGTERM)
