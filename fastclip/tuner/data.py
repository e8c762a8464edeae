"""The user's data as the tuner sees it: one view of a Dataset, (X, y), or X, y and groups."""

from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.reading import as_data

__all__ = ["TuningData", "as_data"]
