"""Lightning: the module wraps its optimizer and logs the norm; the Trainer goes on from a checkpoint."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from digits import BATCH_SIZE, Digits, make_net
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastclip

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(pl.LightningModule):
    """A network that is clipped inside its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Return the loss; the Trainer does the rest."""
        x, y = batch
        return cross_entropy(self.net(x), y)

    def on_train_batch_end(self, *args: Any) -> None:
        """Log what the step found."""
        self.log("grad_norm", self.optimizers().last.total_norm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Wrap the optimizer; leave the Trainer's `gradient_clip_val` alone."""
        return fastclip.ClippedOptimizer(torch.optim.AdamW(self.parameters(), lr=3e-3), max_norm=1.0)


def make_trainer(max_epochs: int) -> pl.Trainer:
    """Return a Trainer that prints nothing."""
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> float:
    """Train, stop, go on, print what happened, and return the accuracy."""
    digits = Digits()
    loader = DataLoader(TensorDataset(*digits.train), BATCH_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half.ckpt"
        trainer = make_trainer(max_epochs=3)
        trainer.fit(Classifier(), loader)
        trainer.save_checkpoint(checkpoint)
        model, trainer = Classifier(), make_trainer(max_epochs=6)
        trainer.fit(model, loader, ckpt_path=checkpoint)
    accuracy, stats = digits.accuracy(model.net), model.optimizers().stats()
    norm = trainer.logged_metrics["grad_norm"]
    print(f"accuracy {accuracy:.3f}; of {stats.steps} steps, {stats.clipped} clipped; last norm {norm:.3g}")
    return accuracy


if __name__ == "__main__":
    main()
