"""Whole training iterations of a GPT-2: what clipping costs beside forward, backward and update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastclip
from fastclip.bench.devices import Cuda
from fastclip.bench.timing import Call

MAX_NORM = 1.0
ITERATIONS_A_ROUND = 4


@dataclass(frozen=True)
class Shape:
    """A model and a batch.

    Attributes:
        name: Key in files.
        title: What readers see.
        batch: Sequences.
        length: Tokens of each.
    """

    name: str
    title: str
    num_layers: int
    num_heads: int
    width: int
    vocabulary: int
    batch: int
    length: int


# A batch that makes the device the limit: with fewer tokens the host is, and figures move from run to run.
GPT2 = Shape("gpt2-124m", "GPT-2 124M, 8 x 1024 tokens", 12, 12, 768, 50_257, 8, 1024)
DRY = Shape("dry-gpt", "a tiny GPT", 2, 2, 16, 64, 2, 8)


class Gpt(nn.Module):
    """GPT-2's architecture, the output tied to the embedding.

    Source: Radford et al., Language models are unsupervised multitask learners, 2019.
    """

    def __init__(self, shape: Shape = GPT2) -> None:
        """Make the weights."""
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        block = nn.TransformerEncoderLayer(
            *(shape.width, shape.num_heads, 4 * shape.width),
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(shape.width)
        self.blocks = nn.TransformerEncoder(block, shape.num_layers, norm, enable_nested_tensor=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, indices: Tensor) -> Tensor:
        """Return the loss of predicting each next token of (batch, length + 1) indices."""
        inputs, targets = indices[:, :-1], indices[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=x.device)
        logits = F.linear(self.blocks(x, mask=mask, is_causal=True), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def iterations(model: nn.Module, indices: Tensor, device: Cuda) -> tuple[dict[str, Call], dict[str, Any]]:
    """Return one iteration of each way to clip, over the same model, and the clipped optimizers by name.

    `none` does not clip, `torch` and `fastclip` clip before torch's fused AdamW, `clipped` and
    `clipped_fused` are `ClippedOptimizer` around torch's default AdamW and its fused one.
    """
    parameters = list(model.parameters())

    def adamw(fused: bool | None = None) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=1e-5, fused=fused)

    clipped = {
        "clipped": fastclip.ClippedOptimizer(adamw(), MAX_NORM),
        "clipped_fused": fastclip.ClippedOptimizer(adamw(fused=True), MAX_NORM),
    }
    clips = {
        "none": lambda: None,
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM),
        "fastclip": lambda: fastclip.clip_grad_norm_(parameters, MAX_NORM),
    }

    def iteration(optimizer: torch.optim.Optimizer, clip: Call) -> Call:
        def run() -> None:
            for _ in range(ITERATIONS_A_ROUND):
                with torch.autocast(device.torch_device.type, torch.bfloat16):
                    loss = model(indices)
                loss.backward()
                clip()
                optimizer.step()
                optimizer.zero_grad()

        return run

    calls = {name: iteration(adamw(fused=True), clip) for name, clip in clips.items()}
    calls |= {name: iteration(optimizer, lambda: None) for name, optimizer in clipped.items()}
    return calls, clipped


def time_training(
    device: Cuda, *, budget_s: float, compiled: Sequence[bool] = (False,)
) -> Iterator[dict[str, Any]]:
    """Time iterations interleaved, until the device is done; with torch.compile'd model where asked.

    Yields rows of plain values: milliseconds per iteration, quantiles over rounds of ITERATIONS_A_ROUND.
    """
    shape = GPT2 if device.is_accelerator else DRY
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.length + 1)
    indices = torch.randint(shape.vocabulary, size, generator=generator).to(device.torch_device)
    for with_compile in compiled:
        torch.manual_seed(0)
        model = Gpt(shape).to(device.torch_device)
        run: Any = torch.compile(model) if with_compile else model
        calls, clipped = iterations(run, indices, device)
        times = device.interleave(calls, device.whole_seconds, budget_s)
        quantiles = {
            name: {q: ms / ITERATIONS_A_ROUND for q, ms in measured.quantiles_ms.items()}
            for name, measured in times.items()
        }
        yield {
            "workload": shape.name,
            "title": shape.title,
            "compiled": with_compile,
            "ms": quantiles,
            "num_rounds": {name: measured.num_rounds for name, measured in times.items()},
            "routes": {name: optimizer.route for name, optimizer in clipped.items()},
        }
