"""What happens when a script starts worker processes without a main guard, in one sentence."""

from __future__ import annotations

import multiprocessing
import os

WORKER_NAME = "fastclip-worker"
UNGUARDED = 78  # exit code of a worker that began to run the user's script again
SENTENCE = (
    "each of the n_jobs > 1 worker processes runs the script again up to the call that started it; expected "
    "that call under `if __name__ == '__main__':`."
)


def refuse_unguarded() -> None:
    """End a worker process that runs the user's script anew instead of training: its parent tells why."""
    process = multiprocessing.current_process()
    if process.name.startswith(WORKER_NAME) and getattr(process, "_inheriting", False):
        os._exit(UNGUARDED)  # a server of forks would make 1 of what sys.exit says
