"""vLLM's processes beside the server's: what belongs to the process and not to steering."""

from __future__ import annotations

import multiprocessing
import os


def leave_terminal() -> None:
    """Have this process of vLLM's not get the terminal's Ctrl-C, which is for the server: it drains, and then ends vLLM."""
    if multiprocessing.parent_process() is not None and os.getpid() != os.getpgrp():
        os.setpgid(0, 0)
