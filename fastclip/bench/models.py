"""Parameter lists of real models, computed from their architecture, and two synthetic extremes.

A clipping call sees nothing of a model but the shapes of its parameters, so the shapes are all that is
built here: no model is downloaded and no layer is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

SEED = 0


@dataclass(frozen=True)
class Workload:
    """A named list of parameter shapes, in the order in which the model registers them."""

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def num_tensors(self) -> int:
        """Count the parameters."""
        return len(self.shapes)

    @property
    def numel(self) -> int:
        """Count the elements of all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def parameters(
        self, dtype: torch.dtype, *, device: torch.device | str = "cpu", seed: int = SEED
    ) -> list[torch.nn.Parameter]:
        """Return parameters whose gradients are standard normal, the same for every call with one seed.

        The values of the parameters are never touched, so on a CPU only the gradients occupy memory.

        Args:
            dtype: Floating-point type of parameters and gradients.
            device: Where they live.
            seed: Of the generator that fills the gradients.
        """
        generator = torch.Generator(device).manual_seed(seed)
        parameters = []
        for shape in self.shapes:
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            parameter.grad = torch.empty_like(parameter, requires_grad=False).normal_(generator=generator)
            parameters.append(parameter)
        return parameters


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return the gradients of parameters that all have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def linear(out_features: int, in_features: int) -> list[Shape]:
    """Shapes of a dense layer: weight and bias."""
    return [(out_features, in_features), (out_features,)]


def norm_layer(features: int) -> list[Shape]:
    """Shapes of a batch or layer normalisation: scale and shift."""
    return [(features,), (features,)]


def gpt2(width: int = 768, depth: int = 12, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """GPT-2 small: 148 tensors, 124,439,808 elements.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; the released code
    keeps dense weights as (in, out) and shares the token embedding with the output layer.
    """
    block = [
        *norm_layer(width),
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        *norm_layer(width),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(vocabulary, width), (context, width), *block * depth, *norm_layer(width)]


def resnet50(num_classes: int = 1000) -> list[Shape]:
    """ResNet-50: 161 tensors, 25,557,032 elements.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016, table 1.
    """
    shapes: list[Shape] = [(64, 3, 7, 7), *norm_layer(64)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(depth):
            shapes += [(width, channels, 1, 1), *norm_layer(width)]
            shapes += [(width, width, 3, 3), *norm_layer(width)]
            shapes += [(4 * width, width, 1, 1), *norm_layer(4 * width)]
            if index == 0:
                shapes += [(4 * width, channels, 1, 1), *norm_layer(4 * width)]
            channels = 4 * width
    return shapes + linear(num_classes, channels)


def vit_b16(width: int = 768, depth: int = 12, image: int = 224, patch: int = 16) -> list[Shape]:
    """ViT-B/16 at 224 pixels with 1000 classes: 152 tensors, 86,567,656 elements.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021, table 1.
    """
    num_positions = (image // patch) ** 2 + 1
    block = [
        *norm_layer(width),
        *linear(3 * width, width),
        *linear(width, width),
        *norm_layer(width),
        *linear(4 * width, width),
        *linear(width, 4 * width),
    ]
    stem = [(1, 1, width), (1, num_positions, width), (width, 3, patch, patch), (width,)]
    return [*stem, *block * depth, *norm_layer(width), *linear(1000, width)]


def lstm_lm(width: int = 650, depth: int = 2, vocabulary: int = 10_000) -> list[Shape]:
    """The medium LSTM language model of the Penn Treebank, 2 x 650: 11 tensors, 19,780,400 elements.

    Source: Zaremba et al., Recurrent Neural Network Regularization, 2014, section 4.1; two biases per
    layer as in torch.nn.LSTM.
    """
    layer: list[Shape] = [(4 * width, width), (4 * width, width), (4 * width,), (4 * width,)]
    return [(vocabulary, width), *layer * depth, *linear(vocabulary, width)]


def llama3_8b_layer(
    width: int = 4096, hidden: int = 14336, num_heads: int = 32, num_kv_heads: int = 8
) -> list[Shape]:
    """One decoder layer of Llama 3 8B: 9 tensors, 218,112,000 elements.

    Source: Grattafiori et al., The Llama 3 Herd of Models, 2024, table 3.
    """
    kv_width = width // num_heads * num_kv_heads
    attention: list[Shape] = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
    mlp: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    return [*attention, *mlp, (width,), (width,)]


def tiny(num_tensors: int = 1000, numel: int = 16) -> list[Shape]:
    """1000 tensors of 16 elements: what a call costs when there is next to nothing to read."""
    return [(numel,)] * num_tensors


def flat(numel: int = 64 * 1024**2) -> list[Shape]:
    """One tensor of 67,108,864 elements: what a call costs when there is nothing but memory to read."""
    return [(numel,)]


def _table(*rows: tuple[str, str, Callable[[], list[Shape]]]) -> dict[str, Workload]:
    return {name: Workload(name, title, tuple(shapes())) for name, title, shapes in rows}


WORKLOADS = _table(
    ("gpt2", "GPT-2 124M", gpt2),
    ("resnet50", "ResNet-50", resnet50),
    ("vit-b16", "ViT-B/16", vit_b16),
    ("lstm-lm", "LSTM LM 2x650", lstm_lm),
    ("llama3-8b-layer", "Llama-3-8B layer", llama3_8b_layer),
    ("tiny", "1000 tensors of 16", tiny),
    ("flat", "one flat tensor", flat),
)
