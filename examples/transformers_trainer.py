"""transformers: the Trainer's own optimizer is wrapped, and its own clipping switched off."""

import tempfile
from typing import Any

import torch
from digits import BATCH_SIZE, Digits, make_net
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainingArguments

import fastclip


class Classifier(torch.nn.Module):
    """What a Trainer takes for a model: keywords in, the loss among what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss."""
        return {"loss": cross_entropy(self.net(x), labels)}


class ClippingTrainer(Trainer):
    """A Trainer that clips inside its optimizer."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Wrap what the arguments ask for."""
        if self.optimizer is None:
            self.optimizer = fastclip.ClippedOptimizer(super().create_optimizer(model), max_norm=1.0)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Put the share of clipped steps beside the loss; the wrapped optimizer is in accelerate's."""
        clipped = self.optimizer.optimizer
        super().log({**logs, "clip_fraction": clipped.stats().clip_fraction}, *args, **kwargs)


def main() -> float:
    """Train, print what happened, and return the accuracy."""
    digits, model = Digits(), Classifier()
    samples = [{"x": x, "labels": y} for x, y in zip(*digits.train, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_grad_norm=0.0,  # the optimizer clips
            learning_rate=3e-3,
            num_train_epochs=6,
            per_device_train_batch_size=BATCH_SIZE,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
        )
        trainer = ClippingTrainer(model, arguments, train_dataset=samples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    accuracy, stats = digits.accuracy(model.net), trainer.optimizer.optimizer.stats()
    print(f"accuracy {accuracy:.3f}; of {stats.steps} steps, {stats.clip_fraction:.0%} clipped")
    return accuracy


if __name__ == "__main__":
    main()
