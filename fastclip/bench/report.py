"""What is installed and which kernels will run, for `fastclip info`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import fastclip
from fastclip.bench.environment import environment


def installation() -> dict[str, Any]:
    """Return versions, hardware and backends as plain data."""
    env = environment()
    return {
        "commit": env.commit,
        "versions": env.versions,
        "hardware": {**asdict(env.hardware), "threads": torch.get_num_threads()},
        "backends": {
            name: {"available": info.available, "reason": info.reason, "details": info.details}
            for name, info in fastclip.backend_info().items()
        },
    }


def render(facts: dict[str, Any]) -> RenderableType:
    """Return the same for a terminal."""
    general = Table(box=None, show_header=False, pad_edge=False)
    for name, value in {**facts["versions"], "commit": facts["commit"], **facts["hardware"]}.items():
        general.add_row(Text(name.replace("_", " "), style="dim"), str(value))
    backends = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("backend", "usable", "why", "details"):
        backends.add_column(title)
    for name, backend in facts["backends"].items():
        usable = Text("yes", style="green") if backend["available"] else Text("no", style="yellow")
        details = "\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in backend["details"].items())
        backends.add_row(name, usable, Text(backend["reason"]), Text(details))
    return Group(general, Text(), backends)
