"""The demo: speed beside torch's, a network that only clipping rescues, a search for its parameters."""

_EXTRA = frozenset({"PIL", "matplotlib", "optuna", "rich", "sklearn"})

try:
    import optuna as _optuna  # noqa: F401  # before the tuner, which would name an extra of its own

    from fastclip.demo.data import DataError
    from fastclip.demo.run import run
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in _EXTRA:
        raise
    raise ModuleNotFoundError(
        f"fastclip.demo: {error.name} is not installed; expected the packages of the extra 'demo'. "
        "Install them by: pip install 'fastclip[demo]'.",
        name=error.name,
    ) from error

__all__ = ["DataError", "run"]
