"""Parameter lists of real models, computed from their architecture, and two synthetic extremes.

A clipping call sees nothing of a model but the shapes of its parameters, so the shapes are all that is
built here: no model is downloaded and no layer is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle

import torch

Shape = tuple[int, ...]

SEED = 0


@dataclass(frozen=True)
class Workload:
    """A named list of parameter shapes, in the order in which the model registers them.

    Attributes:
        name: Key in files.
        title: What readers see.
        shapes: Of the parameters.
        dtype: As in `cases.dtypes_of`, of a workload that is of one kind only.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    dtype: str = ""

    @property
    def num_tensors(self) -> int:
        """Count the parameters."""
        return len(self.shapes)

    @property
    def numel(self) -> int:
        """Count the elements of all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def nbytes(self, *dtypes: torch.dtype) -> int:
        """Count the bytes of the gradients, whose tensors take the dtypes in turn."""
        return sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(self.shapes, cycle(dtypes), strict=False)
        )

    def parameters(
        self,
        *dtypes: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = SEED,
        with_values: bool = False,
    ) -> list[torch.nn.Parameter]:
        """Return parameters whose gradients are standard normal, the same for every call with one seed.

        Args:
            dtypes: Floating-point types of parameters and gradients, which the tensors take in turn.
            device: Where they live.
            seed: Of the generator that fills them.
            with_values: Whether the values are standard normal, too. Otherwise they are never touched, so
                that only the gradients occupy memory.
        """
        generator = torch.Generator(device).manual_seed(seed)
        parameters = []
        for shape, dtype in zip(self.shapes, cycle(dtypes), strict=False):
            grad = torch.empty(shape, dtype=dtype, device=device)
            if with_values or grad.device.type == "cpu":
                values = torch.empty_like(grad)
            else:
                values = grad.new_zeros(()).expand(shape)
            parameters.append(torch.nn.Parameter(values))
            parameters[-1].grad = grad.normal_(generator=generator)
        with torch.no_grad():
            for parameter in parameters if with_values else ():
                parameter.normal_(generator=generator)
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


def llama3_8b(depth: int = 32, width: int = 4096, vocabulary: int = 128_256) -> list[Shape]:
    """Llama 3 8B: 291 tensors, 8,030,261,248 elements. Source: as for one layer."""
    return [(vocabulary, width), *llama3_8b_layer() * depth, (width,), (vocabulary, width)]


def five_hundred_matrices(num_tensors: int = 500, numel: int = 225_000_000) -> list[Shape]:
    """500 matrices of 225 million elements together: widths 256 to 1024, as even as these allow."""
    widths = [256, 512, 768, 1024]
    each = numel // num_tensors
    return [(each // widths[i % 4], widths[i % 4]) for i in range(num_tensors)]


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

# On a GPU: the lists that other projects publish figures of, and whole models. The key rows come first: a run
# that is short of time leaves the others out.
DEVICE_WORKLOADS = (
    Workload("llama3-8b", "Llama-3-8B, bfloat16", tuple(llama3_8b()), "bfloat16"),
    Workload("2000-tiny", "2000 tensors of 16, float32", tuple(tiny(2000)), "float32"),
    Workload("bf16-6000261x256", "one bfloat16 tensor of 6,000,261 x 256", ((6_000_261, 256),), "bfloat16"),
    Workload("gpt2", "GPT-2 124M, float32", tuple(gpt2()), "float32"),
    Workload("2000-1024x1024", "2000 tensors of 1024 x 1024, float32", ((1024, 1024),) * 2000, "float32"),
    Workload(
        "mixed-225m",
        "500 matrices, 225M elements, bfloat16 and float32",
        tuple(five_hundred_matrices()),
        "bfloat16+float32",
    ),
    Workload("resnet50", "ResNet-50, float32", tuple(resnet50()), "float32"),
    Workload("gpt2-bf16", "GPT-2 124M, bfloat16", tuple(gpt2()), "bfloat16"),
)
NUM_KEY_WORKLOADS = 5

# torch.compile makes one kernel of a few hundred tensors in a minute; of thousands in many.
COMPILED_WORKLOADS = ("bf16-6000261x256", "gpt2")

# Checked and not timed: one tensor with more elements than 32 bits can count.
LARGE = Workload("large", "more than 2^31 elements", ((2**31 + 12_345,),), "bfloat16")

# Small enough for a dry run on a CPU, with every property that the others have.
DRY_WORKLOADS = (
    Workload("dry-many", "200 tiny tensors", tuple(tiny(200)), "float32"),
    Workload("dry-mixed", "mixed dtypes", ((300, 70), (65,), (9, 9)), "bfloat16+float32"),
)
