"""Programs in processes of their own, forked from one that has imported torch and nothing of fastclip."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

TIMEOUT = 120.0

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["torch.distributed"])


def _run(code: str, arguments: Sequence[str], environment: dict[str, str], output: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(output)
    sys.argv = ["-c", *arguments]
    loaded = [name for name in sys.modules if name.partition(".")[0] == "fastclip"]
    assert loaded == [], loaded
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` would, in an empty folder, FASTCLIP_ variables as given and no others."""
    whole = {k: v for k, v in os.environ.items() if not k.startswith("FASTCLIP_")} | environment
    with tempfile.TemporaryDirectory() as output:
        process = forkserver.Process(target=_run, args=(code, arguments, whole, output), daemon=True)
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
        stdout, stderr = (
            path.read_text() if (path := Path(output, name)).exists() else "" for name in ("stdout", "stderr")
        )
        assert process.exitcode is not None
        return subprocess.CompletedProcess([code, *arguments], process.exitcode, stdout, stderr)
