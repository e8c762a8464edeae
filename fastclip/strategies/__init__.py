"""Strategies: what goes in the place of a fixed max_norm.

Each is a class in a file of its own, on top of `base`. docs/strategies.md says which to take when.
"""

from fastclip.strategies.agc import AGC
from fastclip.strategies.base import Decision, Global, Gradients, Strategy
from fastclip.strategies.block_rms import BlockRMS
from fastclip.strategies.ema import Ema
from fastclip.strategies.fixed import Fixed
from fastclip.strategies.median_mad import MedianMAD
from fastclip.strategies.norm_stabilised import NormStabilised
from fastclip.strategies.per_tensor import PerTensor
from fastclip.strategies.percentile import Percentile
from fastclip.strategies.quantile_servo import QuantileServo
from fastclip.strategies.schedule import Schedule
from fastclip.strategies.skip import Skip
from fastclip.strategies.value import Value
from fastclip.strategies.zscore import ZScore

__all__ = [
    "AGC",
    "BlockRMS",
    "Decision",
    "Ema",
    "Fixed",
    "Global",
    "Gradients",
    "MedianMAD",
    "NormStabilised",
    "PerTensor",
    "Percentile",
    "QuantileServo",
    "Schedule",
    "Skip",
    "Strategy",
    "Value",
    "ZScore",
]
