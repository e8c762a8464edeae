"""Timing of gradient clipping beside torch's own, on the parameter lists of real models.

    from fastclip.bench import Options, run, table

    results = run(Options(models=("tiny",), dtypes=("float32",)))
    rich.print(table.render(results))

One engine for every device. models and timing stand alone; devices has the clocks; peers are what is timed;
cases joins a workload with a mode; check and bandwidth come before the timing; isolation says in which
process; runner puts all together, and steps the same with an optimizer; results, table and plot show them.
suite runs the sections of a GPU; launches, training and distributed are what only they time.
"""

from fastclip.bench.cases import DTYPES, MODES, Case
from fastclip.bench.check import CheckError
from fastclip.bench.models import WORKLOADS, Workload
from fastclip.bench.peers import PEERS, Peer
from fastclip.bench.results import Results, ResultsError, Row
from fastclip.bench.runner import Options, run

__all__ = [
    "DTYPES",
    "MODES",
    "PEERS",
    "WORKLOADS",
    "Case",
    "CheckError",
    "Options",
    "Peer",
    "Results",
    "ResultsError",
    "Row",
    "Workload",
    "run",
]
