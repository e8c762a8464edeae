"""What is clipped: the lists that other projects publish figures of, and whole models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.bench.models import SEED, Shape, Workload, gpt2, llama3_8b_layer, resnet50


@dataclass(frozen=True)
class DeviceWorkload:
    """A list of shapes, with the dtypes that take turns over it."""

    workload: Workload
    dtypes: tuple[torch.dtype, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients."""
        sizes = [torch.Size(shape).numel() for shape in self.workload.shapes]
        return sum(n * self.dtypes[i % len(self.dtypes)].itemsize for i, n in enumerate(sizes))

    def parameters(self, device: torch.device) -> list[torch.nn.Parameter]:
        """Return parameters with standard normal gradients; their own values take no memory."""
        generator = torch.Generator(device).manual_seed(SEED)
        parameters = []
        for i, shape in enumerate(self.workload.shapes):
            dtype = self.dtypes[i % len(self.dtypes)]
            grad = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            parameters.append(parameter_of(grad))
        return parameters


def parameter_of(grad: Tensor) -> torch.nn.Parameter:
    """Return a parameter with this gradient, whose own values are one element."""
    parameter = torch.nn.Parameter(grad.new_zeros(()).expand(grad.shape))
    parameter.grad = grad
    return parameter


def llama3_8b(depth: int = 32, width: int = 4096, vocabulary: int = 128_256) -> list[Shape]:
    """Llama 3 8B: 291 tensors, 8,030,261,248 elements.

    Source: Grattafiori et al., The Llama 3 Herd of Models, 2024, table 3.
    """
    return [(vocabulary, width), *llama3_8b_layer() * depth, (width,), (vocabulary, width)]


def five_hundred_matrices(num_tensors: int = 500, numel: int = 225_000_000) -> list[Shape]:
    """500 matrices of 225 million elements together: widths 256 to 1024, as even as these allow."""
    widths = [256, 512, 768, 1024]
    each = numel // num_tensors
    return [(each // widths[i % 4], widths[i % 4]) for i in range(num_tensors)]


def workload(name: str, title: str, shapes: list[Shape], *dtypes: torch.dtype) -> DeviceWorkload:
    """Return a workload whose tensors take the dtypes in turn."""
    return DeviceWorkload(Workload(name, title, tuple(shapes)), dtypes)


# The key rows first: a run that is short of time leaves the others out.
WORKLOADS = (
    workload("llama3-8b", "Llama-3-8B, bfloat16", llama3_8b(), torch.bfloat16),
    workload("2000-tiny", "2000 tensors of 16, float32", [(16,)] * 2000, torch.float32),
    workload(
        "bf16-6000261x256", "one bfloat16 tensor of 6,000,261 x 256", [(6_000_261, 256)], torch.bfloat16
    ),
    workload("gpt2", "GPT-2 124M, float32", gpt2(), torch.float32),
    workload("2000-1024x1024", "2000 tensors of 1024 x 1024, float32", [(1024, 1024)] * 2000, torch.float32),
    workload(
        "mixed-225m",
        "500 matrices, 225M elements, bfloat16 and float32",
        five_hundred_matrices(),
        torch.bfloat16,
        torch.float32,
    ),
    workload("resnet50", "ResNet-50, float32", resnet50(), torch.float32),
    workload("gpt2-bf16", "GPT-2 124M, bfloat16", gpt2(), torch.bfloat16),
)

NUM_KEY_WORKLOADS = 5

# torch.compile makes one kernel of a few hundred tensors in a minute; of thousands in many.
COMPILED_WORKLOADS = ("bf16-6000261x256", "gpt2")

# Small enough for a dry run on a CPU, with every property that the others have.
DRY_WORKLOADS = (
    workload("dry-many", "200 tiny tensors", [(16,)] * 200, torch.float32),
    workload("dry-mixed", "mixed dtypes", [(300, 70), (65,), (9, 9)], torch.bfloat16, torch.float32),
)
