"""What happens when a script starts worker processes without a main guard, in one sentence."""

from __future__ import annotations

import multiprocessing
import os
import sys

from fastclip.tuner.errors import MainGuardError

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


def refuse_typed_in() -> None:
    """Raise MainGuardError where the script is no file, as one that Python reads from its input."""
    main, started_in = sys.modules["__main__"], getattr(multiprocessing.process, "ORIGINAL_DIR", None)
    script = None if getattr(main, "__spec__", None) is not None else getattr(main, "__file__", None)
    if script is not None and not os.path.exists(os.path.join(started_in or "", script)):
        raise MainGuardError(
            f"ProcessExecutor: the script {script!r} is no file, and each of the n_jobs > 1 worker processes "
            "runs it again; expected a file. Save it as one, or use n_jobs=1."
        )
