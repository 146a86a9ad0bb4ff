"""Learn from digits of which 40 % are labelled wrong: GradientPenalty and Flooding beside tuned weight decay.

600 training and 179 validation images with wrong labels, clean test labels, a network of 64-64-10 units. Within a seed
all methods start from the same weights and see the same labels and batches. ``stopped early`` is the test accuracy at
the epoch of lowest validation loss; each method's setting of lowest validation loss is bold, and in label_noise.png.
GradientPenalty gains ten points, and so does weight decay of the right size; Flooding gains a few at most.

    lightning-plugins copy label_noise . && python label_noise.py
"""

import argparse
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_plugins import Digits, Flooding, GradientPenalty

SETTINGS = {
    "nothing": [0],
    "GradientPenalty": [1, 2, 3],
    "Flooding": [1, 1.3, 1.5],
    "weight decay": [0.003, 0.01, 0.03],
}
MEASURES = ["training loss", "validation loss", r"$\|\nabla L\|^2$ of the training loss", "test accuracy"]
TRAIN, VAL, SLOPE, TEST = range(4)


class DigitClassifier(LightningModule):
    """A plain module, unaware of the callbacks. GELU: finite differences across the kinks of ReLU are unreliable."""

    def __init__(self, lr: float = 0.05, weight_decay: float = 0.0, image_shape=(1, 8, 8), num_classes=10) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = nn.Linear(torch.Size(image_shape).numel(), 64), nn.GELU(), nn.Linear(64, num_classes)
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        return self.net(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch."""
        loss = F.cross_entropy(self(batch["image"]), batch["label"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, split: str = "val") -> None:
        """Loss and accuracy."""
        logits, labels = self(batch["image"]), batch["label"]
        right = (logits.argmax(-1) == labels).float().mean()
        self.log_dict({f"{split}/loss": F.cross_entropy(logits, labels), f"{split}/accuracy": right}, sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same on the test set."""
        self.validation_step(batch, batch_idx, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), self.hparams.lr, 0.9, weight_decay=self.hparams.weight_decay)


class History(Callback):
    """After every epoch, the four ``MEASURES`` over whole splits."""

    def __init__(self, data: Digits) -> None:
        self.rows, self.splits = [], [data.images(split) for split in ("train", "val", "test")]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, without a trace in the gradients under way."""
        logits = [pl_module(split.pixels / 255) for split in self.splits]
        train, val = (F.cross_entropy(logits[n], self.splits[n].labels) for n in (0, 1))
        slope = sum(g.square().sum() for g in torch.autograd.grad(train, list(pl_module.parameters())))
        accuracy = (logits[2].argmax(-1) == self.splits[2].labels).float().mean()
        self.rows.append([value.item() for value in (train, val, slope, accuracy)])


def run(method: str, value: float, seed: int, epochs: int) -> Tensor:
    """Train once; returns the ``MEASURES`` ``(epochs, 4)``."""
    torch.set_num_threads(1)  # the network is too small to share
    seed_everything(seed, verbose=False)
    data = Digits(image_size=8, batch_size=100, seed=seed, label_noise=0.4, num_train=600)
    model = DigitClassifier(weight_decay=value if method == "weight decay" else 0.0)
    callbacks: list[Callback] = [history := History(data)]
    if method == "GradientPenalty":  # warm-up: in full from the start it delays learning
        callbacks += [GradientPenalty(coefficient=value, scope="microbatch", warmup_steps=60)]
    callbacks += [Flooding(level=value)] if method == "Flooding" else []
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, limit_val_batches=0, **quiet)
    trainer.fit(model, datamodule=data)
    return torch.tensor(history.rows)


def row(histories: Tensor, nothing: Tensor) -> str:
    """Cells of the table from one setting's ``(seeds, epochs, 4)``: mean and, of several seeds, standard deviation."""
    last, seeds = histories[:, -1], torch.arange(len(histories))
    stopped = histories[seeds, histories[:, :, VAL].argmin(1), TEST]
    gain = last[:, TEST] - nothing[:, -1, TEST]
    cells = (last[:, TEST], gain, stopped, last[:, VAL], histories[:, -10:, TRAIN].mean(1))
    return " | ".join(f"{cell.mean():.3f}" + (f" ± {cell.std():.3f}" if len(cell) > 1 else "") for cell in cells)


def draw(chosen: dict[str, Tensor], path: str) -> None:
    """Mean over the seeds of each method's measures ``(seeds, epochs, 4)``."""
    from matplotlib.figure import Figure

    styles = (("black", "-", 1), ("tab:blue", "-", 2.5), ("tab:orange", "--", 1.5), ("tab:green", ":", 2.5))
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    figure.suptitle("Digits with 40 % of training and validation labels wrong, clean test labels")
    for measure, axes in enumerate(figure.subplots(2, 2).flat):
        for (name, histories), (color, line, width) in zip(chosen.items(), styles, strict=True):
            mean = histories[:, :, measure].mean(0)
            axes.plot(range(1, len(mean) + 1), mean, line, color=color, linewidth=width, label=name)
        axes.set(title=MEASURES[measure], xlabel="epoch", yscale="log" if measure == SLOPE else "linear")
        axes.grid(alpha=0.3)
    figure.axes[TEST].set_ylim(bottom=0.7)  # the first epochs tell nothing
    figure.axes[TRAIN].legend()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Run everything, print the table, draw the picture; returns ``{"Flooding 1.3": (seeds, epochs, 4), ...}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--picture", default="label_noise.png")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    results, chosen = {}, {}
    print("| method | test accuracy | gain | stopped early | validation loss | training loss |\n" + "|---" * 6 + "|")
    for method, values in SETTINGS.items():
        tried = {}
        for value in values:
            runs = [run(method, value, seed, args.epochs) for seed in range(args.seeds)]
            tried[f"{method} {value:g}".removesuffix(" 0")] = torch.stack(runs)
        results |= tried
        best = min(tried, key=lambda name: tried[name][:, -1, VAL].mean())
        chosen[best] = tried[best]
        for name, histories in tried.items():
            print(f"| {f'**{name}**' if name == best else name} | {row(histories, results['nothing'])} |", flush=True)
    draw(chosen, args.picture)
    return results


if __name__ == "__main__":
    main()
