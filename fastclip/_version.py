"""The version, apart from everything else so that building does not import torch."""

__version__ = "0.1.0"
