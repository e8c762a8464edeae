"""Networks that train well at a moderate rate and explode at a high one; one family per file."""

from fastclip.demo.models.batch_norm_cnn import BatchNormCNN
from fastclip.demo.models.char_rnn import CharRNN
from fastclip.demo.models.deep_mlp import DeepMLP
from fastclip.demo.models.plain_cnns import DigitsCNN, FourConvCNN
from fastclip.demo.models.registry import IMAGE_NETWORKS, ImageModel
from fastclip.demo.models.simple_net import SimpleNet
from fastclip.demo.models.text_networks import TEXT_NETWORKS, EmbeddingBag, Recurrent, TextModel

__all__ = [
    "IMAGE_NETWORKS",
    "TEXT_NETWORKS",
    "BatchNormCNN",
    "CharRNN",
    "DeepMLP",
    "DigitsCNN",
    "EmbeddingBag",
    "FourConvCNN",
    "ImageModel",
    "Recurrent",
    "SimpleNet",
    "TextModel",
]
