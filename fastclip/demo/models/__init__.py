"""Networks that train well at a moderate rate and explode at a high one; one per file."""

from fastclip.demo.models.batch_norm_cnn import BatchNormCNN
from fastclip.demo.models.char_rnn import CharRNN
from fastclip.demo.models.digits_cnn import DigitsCNN
from fastclip.demo.models.four_conv_cnn import FourConvCNN
from fastclip.demo.models.simple_net import SimpleNet

__all__ = ["BatchNormCNN", "CharRNN", "DigitsCNN", "FourConvCNN", "SimpleNet"]
