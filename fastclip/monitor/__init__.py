"""Watch a training: records of every step, early warnings, and what to read them with.

    with fastclip.Monitor(optimizer, "runs/first", model=model) as monitor:
        ...

`monitor` is what callers see; `blocks` collects on the device, `parameters` names and measures, `history` and
`alarms` compare, `records` and `writers` write. `reading` reads for `suggestion`, `terminal` and `report`.
"""

from fastclip.monitor.monitor import Monitor
from fastclip.monitor.reading import Run, read
from fastclip.monitor.suggestion import Proposal, Suggestion, suggest

__all__ = ["Monitor", "Proposal", "Run", "Suggestion", "read", "suggest"]
