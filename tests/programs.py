"""Programs in processes of their own, forked from one that has imported what is slow, nothing of fastclip."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

TIMEOUT = 120.0

forkserver = multiprocessing.get_context("forkserver")
# What the programs need of torch, with the compiler that its optimizers import, and of scikit-learn.
forkserver.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.pipelining", "torch.distributed.tensor.parallel", "sklearn.datasets"]
)


def _run(code: str, arguments: Sequence[str], environment: dict[str, str], output: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(output)
    sys.argv, sys.path[:0] = ["-c", *arguments], [""]
    loaded = [name for name in sys.modules if name.partition(".")[0] == "fastclip"]
    assert loaded == [], loaded
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` would, in an empty folder, FASTCLIP_ variables as given and no others."""
    return run_together(code, *arguments, environments=[environment])[0]


def run_ranks(code: str, world: int) -> list[subprocess.CompletedProcess[str]]:
    """Run code once for each rank of a group, which finds its place as torchrun would tell it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    everywhere = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return run_together(code, environments=ranks)


def start_python(folder: Path, code: str, *arguments: object, **environment: str) -> BaseProcess:
    """Start code as `python -c` would, in a folder, where it writes the files stdout and stderr."""
    shared = {name: value for name, value in os.environ.items() if not name.startswith("FASTCLIP_")}
    args = (code, [str(argument) for argument in arguments], shared | environment, str(folder))
    process = forkserver.Process(target=_run, args=args, daemon=True)
    process.start()
    return process


def wait_for(path: Path, text: str) -> None:
    """Wait until a program has written a text to a file."""
    deadline = time.monotonic() + TIMEOUT
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} has no {text!r}"
        time.sleep(0.01)


def run_together(
    code: str, *arguments: str, environments: Sequence[dict[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """As run_python, in several processes at once, each with an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, environment in enumerate(environments):
            output = Path(folder, str(number))
            output.mkdir()
            started.append((start_python(output, code, *arguments, **environment), output))
        # Only now: the first start waits for all that is imported before.
        deadline = time.monotonic() + TIMEOUT
        done = []
        for process, output in started:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            stdout, stderr = (
                path.read_text() if (path := output / name).exists() else "" for name in ("stdout", "stderr")
            )
            assert process.exitcode is not None
            done.append(subprocess.CompletedProcess([code, *arguments], process.exitcode, stdout, stderr))
    return done
