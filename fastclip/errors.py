"""Exceptions of fastclip."""


class BackendUnavailableError(RuntimeError):
    """A backend was demanded by name but cannot run, or cannot take these tensors; the message says why."""
