"""Gradient clipping for PyTorch that is nearly free, numerically right and informative."""

from fastclip import distributed, strategies
from fastclip._version import __version__
from fastclip.backends import backend_info, use_backend
from fastclip.backends.base import BackendInfo
from fastclip.clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from fastclip.errors import BackendUnavailableError
from fastclip.monitor import Monitor
from fastclip.norms import Nonfinite, find_nonfinite, grad_norms
from fastclip.optim import ClippedOptimizer, GradScaler, attach
from fastclip.patch import TorchPatch, patch_torch

__all__ = [
    "BackendInfo",
    "BackendUnavailableError",
    "ClippedOptimizer",
    "GradScaler",
    "Monitor",
    "Nonfinite",
    "TorchPatch",
    "__version__",
    "attach",
    "backend_info",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "distributed",
    "find_nonfinite",
    "get_total_norm",
    "grad_norms",
    "patch_torch",
    "strategies",
    "use_backend",
]
