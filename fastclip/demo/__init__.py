"""The demo: clip real gradients, rescue a network that explodes, show the speed beside torch's."""

_EXTRA = frozenset({"matplotlib", "rich", "sklearn"})

try:
    from fastclip.demo.run import run
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in _EXTRA:
        raise
    raise ModuleNotFoundError(
        f"fastclip.demo: {error.name} is not installed; expected the packages of the extra 'demo'. "
        "Install them by: pip install 'fastclip[demo]'.",
        name=error.name,
    ) from error

__all__ = ["run"]
