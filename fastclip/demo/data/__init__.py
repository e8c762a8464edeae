"""Inputs to train on: two that need no download, the others read from a folder of the user's."""

from fastclip.demo.data.cifar10 import load_cifar10
from fastclip.demo.data.classification import ClassificationData
from fastclip.demo.data.digits import load_digits
from fastclip.demo.data.errors import DataError
from fastclip.demo.data.image_folder import load_image_folder
from fastclip.demo.data.mnist import load_mnist
from fastclip.demo.data.text import TextData, load_text
from fastclip.demo.data.texts import LabelledTexts, load_texts

__all__ = [
    "ClassificationData",
    "DataError",
    "LabelledTexts",
    "TextData",
    "load_cifar10",
    "load_digits",
    "load_image_folder",
    "load_mnist",
    "load_text",
    "load_texts",
]
