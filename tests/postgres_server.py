"""A PostgreSQL server of one's own on the loopback interface, from the machine's installation."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USERS = ("postgres", "nobody")  # the server refuses to run as root
START_SECONDS = 60


class MissingCapabilityError(Exception):
    """What the machine lacks to run a server."""


@contextmanager
def postgres_server() -> Iterator[str]:
    """Yield the address `user@host:port/database` of a new, empty server, and stop it in the end.

    Raises:
        MissingCapabilityError: no server binaries, or no user to run them.
    """
    binaries = _binaries()
    identity = _identity()
    folder = Path(tempfile.mkdtemp(prefix="fastclip-postgres-"))
    data, port = folder / "data", _free_port()

    def run(program: str, *arguments: str) -> None:
        # A file takes the output: a pipe would stay open in the server that pg_ctl starts.
        with (folder / "log").open("a+") as log:
            done = subprocess.run(
                [binaries / program, *arguments], stdout=log, stderr=log, cwd=folder, timeout=120, **identity
            )
            log.seek(0)
            assert done.returncode == 0, log.read()

    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        run("initdb", "-D", str(data), "-U", "fastclip", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
        run("pg_ctl", "-D", str(data), "-w", "-t", str(START_SECONDS), "-o", options, "start")
        try:
            yield f"fastclip@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _binaries() -> Path:
    """Return the folder of initdb, which Debian keeps out of the path."""
    found = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found is None and not installed:
        raise MissingCapabilityError("no PostgreSQL server (initdb, pg_ctl) is installed")
    return Path(found).parent if found is not None else installed[-1].parent


def _identity() -> dict[str, int | list[int]]:
    """Return what makes a subprocess run as an ordinary user; nothing when this process is one."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = next((names[name] for name in USERS if name in names), None)
    if user is None:
        raise MissingCapabilityError(f"none of the users {USERS} exists, and PostgreSQL does not run as root")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
