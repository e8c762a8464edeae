"""Networks by name, made for the samples and the classes at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn


@dataclass(frozen=True)
class Network:
    """A family of networks that sort samples into any number of classes.

    Attributes:
        title: What it is, in a word or two.
        make: Takes what there is to know of a sample, and the number of classes.
    """

    title: str
    make: Callable[[Any, int], nn.Module]


@dataclass(frozen=True)
class NamedModel(ABC):
    """Makes new networks of one family, as `TunerCV` wants them.

    Attributes:
        name: One of `networks`.
    """

    networks: ClassVar[Mapping[str, Network]]

    name: str

    def __post_init__(self) -> None:
        """Check that there is a network of this name.

        Raises:
            ValueError: there is none.
        """
        if self.name not in self.networks:
            raise ValueError(
                f"{type(self).__name__}: {self.name!r} is unknown; expected one of "
                f"{', '.join(self.networks)}."
            )

    @property
    def title(self) -> str:
        """What it is, in a word or two."""
        return self.networks[self.name].title

    @abstractmethod
    def __call__(self, params: dict[str, Any]) -> nn.Module:
        """Return a new network, initialised from torch's random state; no parameter concerns its layers."""
