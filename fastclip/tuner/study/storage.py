"""Open the Optuna storage and study of a search, and tell the living trials from the abandoned."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning

STALE_SECONDS = 60
BEATS_IN_STALE = 5
MAX_RETRIES = 3


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence the warnings about Optuna's features that the search uses on purpose.

    They are: heartbeats are experimental and meant for `Study.optimize`, and a Gaussian process clips the
    infinite values that explosions are told as.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        warnings.filterwarnings("ignore", message="Clip non-finite values")
        yield


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Leave out the lines that Optuna logs about each study and trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def stoppable(study: optuna.Study) -> Iterator[Callable[[], bool]]:
    """Let `study.stop()` be called inside the block, as in `Study.optimize`; yield whether it was.

    Optuna allows it within its own loop alone, and has no public way to say that this is one.
    """
    study._thread_local.in_optimize_loop, study._stop_flag = True, False
    try:
        yield lambda: study._stop_flag
    finally:
        study._thread_local.in_optimize_loop = False


def check_exists(url: str, caller: str) -> None:
    """Raise FileNotFoundError for a SQLite file that is not there, which to open would make."""
    if _is_sqlite_file(url):
        from sqlalchemy import make_url

        file = Path(str(make_url(url).database))
        if not file.exists():
            raise FileNotFoundError(f"{caller}: {file.absolute()} does not exist; expected a study's file.")


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Open any storage URL of Optuna, for this process alone."""
    if not _is_sqlite_file(url):
        return optuna.storages.get_storage(url)
    return optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url))


def _is_sqlite_file(url: str) -> bool:
    if not url.startswith("sqlite"):
        return False
    from sqlalchemy import make_url

    return make_url(url).database not in (None, "", ":memory:")


def _engine_options(url: str) -> dict[str, Any]:
    # Optuna closes no engine: a connection that is kept for later use would be open until it is garbage, of
    # which Python warns. To open a file anew costs a tenth of a millisecond.
    if not _is_sqlite_file(url):
        return {}
    from sqlalchemy.pool import NullPool

    return {"poolclass": NullPool}


def open_shared_storage(url: str, stale_after: int = STALE_SECONDS) -> optuna.storages.BaseStorage:
    """Open a storage that several processes may search on.

    A relational storage gets heartbeats: a trial whose process has been silent for `stale_after` seconds is
    failed and its copy, with the folds already done, waits for the next process to take it.

    Args:
        url: Any storage URL of Optuna.
        stale_after: Seconds of silence after which a trial counts as abandoned.
    """
    if url.startswith("redis"):
        return optuna.storages.get_storage(url)
    with quiet_optuna():
        return optuna.storages.RDBStorage(
            url,
            heartbeat_interval=max(1, stale_after // BEATS_IN_STALE),
            grace_period=stale_after,
            engine_kwargs=_engine_options(url),
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
        )


def study_exists(storage: optuna.storages.BaseStorage, name: str) -> bool:
    """Tell whether a storage holds a study of this name."""
    return name in optuna.get_all_study_names(storage)


def requeue_abandoned(study: optuna.Study) -> None:
    """Fail the trials whose process is gone and queue their copies."""
    with quiet_optuna():
        optuna.storages.fail_stale_trials(study)


def num_silent(study: optuna.Study) -> int:
    """Return how many trials under way have given no sign of life for longer than the storage allows."""
    storage: Any = study._storage
    if getattr(storage, "get_heartbeat_interval", lambda: None)() is None:
        return 0
    return len(storage._get_stale_trial_ids(study._study_id))


class Heartbeat:
    """A thread that gives signs of life for the trials in hand, if the storage has heartbeats."""

    def __init__(self, storage: Any) -> None:
        interval = getattr(storage, "get_heartbeat_interval", lambda: None)()
        self._storage = storage
        self._interval: int | None = interval
        self._trials: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True) if interval is not None else None
        if self._thread is not None:
            self._thread.start()

    def add(self, trial_id: int) -> None:
        """Begin to give signs for a trial, at once."""
        if self._thread is not None:
            self._storage.record_heartbeat(trial_id)
            with self._lock:
                self._trials.add(trial_id)

    def remove(self, trial_id: int) -> None:
        """End the signs for a trial."""
        with self._lock:
            self._trials.discard(trial_id)

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            with self._lock:
                trials = list(self._trials)
            for trial_id in trials:
                self._storage.record_heartbeat(trial_id)
