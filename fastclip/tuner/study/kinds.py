"""Data and networks that a study file names by a word, in place of functions of the user's.

The readers and networks are those of the demo, which stands above the tuner: they are found by reference, as
the user's own are, when a file asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

DATA_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "fastclip.demo.studies:digits",
        "mnist": "fastclip.demo.studies:mnist",
        "cifar10": "fastclip.demo.studies:cifar10",
        "imagefolder": "fastclip.demo.studies:image_folder",
        "text": "fastclip.demo.studies:texts",
    }
)
"""`kind` of [data] -> function of the other keys that returns `KindData`."""

NAMED_MODEL = "fastclip.demo.studies:named_model"
"""Function of the `name` in [model] and of the data that returns a `model_init`."""


@dataclass(frozen=True)
class KindData:
    """What data of a kind brings.

    Attributes:
        train: What is searched on, in any form that `TunerCV.fit` takes.
        test: What no trial sees, in the same form.
        skipped: What was left out by choice, one sentence each.
    """

    train: Any
    test: Any
    skipped: tuple[str, ...] = ()
