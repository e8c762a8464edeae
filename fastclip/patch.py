"""Put fastclip's functions in the place of torch's, everywhere, and back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch.nn.utils
import torch.nn.utils.clip_grad
from torch.distributed.device_mesh import DeviceMesh

from fastclip import clip_grad
from fastclip.distributed.marks import Ranks

_PUBLIC = (
    (torch.nn.utils, ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")),
    # `_get_total_norm` and `_clip_grads_with_norm_` stay: torch's originals and the eager backend call them.
    (torch.nn.utils.clip_grad, ("clip_grad_norm_", "clip_grad_value_")),
)

_OVER_RANKS = ("clip_grad_norm_", "get_total_norm")
"""Those that take `group` and `mesh`."""

_active: TorchPatch | None = None


class TorchPatch:
    """The state of `patch_torch`: what was replaced, and how to restore it. A context manager."""

    def __init__(self, group: Ranks | None = None, mesh: DeviceMesh | None = None) -> None:
        self._replaced: list[tuple[ModuleType, str, Any]] = []
        self._ranks = {"group": group, "mesh": mesh}

    def unpatch(self) -> None:
        """Restore exactly what was replaced. Calling it again is harmless."""
        global _active
        while self._replaced:
            module, name, original = self._replaced.pop()
            setattr(module, name, original)
        if _active is self:
            _active = None

    def __enter__(self) -> TorchPatch:
        """Return the patch itself; it is in force already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore what was replaced."""
        self.unpatch()

    def _apply(self) -> None:
        replacements = {
            original: self._ours(name)
            for module, names in _PUBLIC
            for name in names
            for original in (getattr(module, name),)
        }
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType) and not _is_ours(module):
                self._replace_in(module, replacements)

    def _ours(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(clip_grad, name)
        if name not in _OVER_RANKS or self._ranks == {"group": None, "mesh": None}:
            return function

        @functools.wraps(function)
        def over_ranks(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **{**self._ranks, **kwargs})

        return over_ranks

    def _replace_in(self, module: ModuleType, replacements: dict[Callable[..., Any], Any]) -> None:
        # Not isinstance, which asks a lazy or deprecated object for its __class__ and may wake it.
        for name, value in list(vars(module).items()):
            # torch.nn.utils.get_total_norm is the private helper itself under another name.
            if module is torch.nn.utils.clip_grad and name.startswith("_"):
                continue
            if type(value) is _FUNCTION and value in replacements:
                self._replaced.append((module, name, value))
                setattr(module, name, replacements[value])


_FUNCTION = type(torch.nn.utils.clip_grad_norm_)


def _is_ours(module: ModuleType) -> bool:
    return module.__name__ == "fastclip" or module.__name__.startswith("fastclip.")


def patch_torch(*, group: Ranks | None = None, mesh: DeviceMesh | None = None) -> TorchPatch:
    """Replace torch's clipping functions by fastclip's, also where a loaded module bound them early.

    Replaces `clip_grad_norm_`, `clip_grad_value_`, `clip_grads_with_norm_` and `get_total_norm` in
    torch.nn.utils, and every module-level name that is bound to one of them, found by identity. Names bound
    inside functions, classes or by modules loaded later from elsewhere than torch are not reached. A module
    that is loaded while the patch is in force binds fastclip's functions as its own choice, and keeps them.

    Args:
        group: What `clip_grad_norm_` and `get_total_norm` reduce over, unless a call says otherwise.
        mesh: The same, as there.

    Returns:
        The patch: call `.unpatch()` on it, or use it in a `with` statement. Calling `patch_torch` while a
        patch is in force returns that patch.

    Raises:
        RuntimeError: A patch with another group or mesh is in force.
    """
    global _active
    if _active is not None and _active._ranks != {"group": group, "mesh": mesh}:
        raise RuntimeError(
            "patch_torch: a patch with another group or mesh is in force; expected one of them. "
            "Call its unpatch() first."
        )
    if _active is None:
        _active = TorchPatch(group, mesh)
        _active._apply()
    return _active
