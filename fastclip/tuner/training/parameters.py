"""Which parameters the training loop reads, and a dict that records which ones model_init reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fastclip.tuner.training.clipping import ALL_SETTINGS, strategy_settings
from fastclip.tuner.training.losses import LABEL_PARAMETERS
from fastclip.tuner.training.optimisers import ALL_ARGUMENTS, optimizer_arguments
from fastclip.tuner.training.regularisation import set_dropout

ALWAYS_READ = frozenset(
    {
        "lr",
        "lr_x_max_norm",
        "max_norm",
        "norm_type",
        "strategy",
        "optimizer",
        "l1",
        "l2",
        "init",
        "batch_size",
        "accumulate",
        "amp",
        "scheduler",
        "param_groups",
    }
)
SOMETIMES_READ = {
    "init_gain": "init is 'default', which keeps the weights of the constructor",
    "dropout": "the model has no dropout to set",
    "no_decay": "the optimizer takes no weight_decay",
    **dict.fromkeys(LABEL_PARAMETERS, "it belongs to cross-entropy, the default loss of classes"),
}
KNOWN = ALWAYS_READ | SOMETIMES_READ.keys() | ALL_ARGUMENTS | ALL_SETTINGS


class RecordingDict(dict[str, Any]):
    """A dict that remembers which keys were read, and which were asked for in vain.

    Attributes:
        read: Keys whose value was read; all of them once the dict was copied or iterated over.
        missing: Keys that are not there.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        self.missing: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """Return a value."""
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        """Tell whether a key is there."""
        self._note(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys."""
        self.read |= super().keys()
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value or the default."""
        self._note(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Remove and return a value."""
        self._note(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return a value, setting it before if it is not there."""
        self._note(key)
        return super().setdefault(key, default)

    def keys(self) -> Any:
        """Return the keys; whoever asks for them may read everything."""
        self.read |= super().keys()
        return super().keys()

    def values(self) -> Any:
        """Return the values."""
        self.read |= super().keys()
        return super().values()

    def items(self) -> Any:
        """Return keys and values."""
        self.read |= super().keys()
        return super().items()

    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return a plain dict with the values of another one added."""
        return {**dict(self.items()), **other}

    def __ror__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return a plain dict with these values added to another one."""
        return {**other, **dict(self.items())}

    def copy(self) -> dict[str, Any]:
        """Return a plain dict."""
        return dict(self.items())

    def note_all(self) -> None:
        """Count everything as read."""
        self.read |= super().keys()

    def _note(self, key: str) -> None:
        (self.read if super().__contains__(key) else self.missing).add(key)


def read_by_loop(params: Mapping[str, Any], model: nn.Module, *, label_parameters_act: bool) -> set[str]:
    """Return the parameters that training this model reads.

    Args:
        params: Parameters of a trial.
        model: What model_init made of them; its dropout is set.
        label_parameters_act: Whether `label_smoothing` and `class_weight` act.
    """
    names = set(ALWAYS_READ)
    try:
        names |= optimizer_arguments(params.get("optimizer", "sgd"))
    except ValueError:  # the first fold will say that it is unknown
        names |= ALL_ARGUMENTS
    if "weight_decay" in names:
        names.add("no_decay")
    if params.get("param_groups") is not None:
        names |= _read_by(params["param_groups"], model, params)
    try:
        names |= strategy_settings(params)
    except ValueError:
        names |= ALL_SETTINGS
    if (params.get("init") or "default") != "default":
        names.add("init_gain")
    if params.get("dropout") is None or set_dropout(model, float(params["dropout"])):
        names.add("dropout")
    return names | set(LABEL_PARAMETERS) if label_parameters_act else names


def _read_by(param_groups: Any, model: nn.Module, params: Mapping[str, Any]) -> set[str]:
    """Return what a function that makes parameter groups reads; all, where it cannot be called yet."""
    recorded = RecordingDict(params)
    try:
        param_groups(model, recorded)
    except Exception:  # it is the user's; the first fold will say what is wrong
        recorded.note_all()
    return recorded.read
