"""Networks that train well at a moderate rate and explode at a high one; one family per file."""

from fastclip.demo.models.batch_norm_cnn import BatchNormCNN
from fastclip.demo.models.char_rnn import CharRNN
from fastclip.demo.models.deep_mlp import DeepMLP
from fastclip.demo.models.plain_cnns import DigitsCNN, FourConvCNN
from fastclip.demo.models.registry import IMAGE_NETWORKS, ImageModel
from fastclip.demo.models.simple_net import SimpleNet

__all__ = [
    "IMAGE_NETWORKS",
    "BatchNormCNN",
    "CharRNN",
    "DeepMLP",
    "DigitsCNN",
    "FourConvCNN",
    "ImageModel",
    "SimpleNet",
]
