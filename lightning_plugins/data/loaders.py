"""What data modules give Lightning: one loader a split."""

from lightning.pytorch import LightningDataModule

from lightning_plugins.data.keys import KeyLoader


class SplitLoaders(LightningDataModule):
    """A data module whose loaders differ by the name of their split alone; a subclass writes :meth:`_loader`."""

    predict_split = "predict"
    """Split that is predicted."""

    def _loader(self, split: str) -> KeyLoader:
        """Of ``train``, ``val``, ``test`` or ``predict_split``, with this process's share."""
        raise NotImplementedError(f"{type(self).__name__} must write _loader(split).")

    def __str__(self) -> str:
        """The class's name: Lightning's own text goes through all batches, and the command line asks for it."""
        return type(self).__name__

    def train_dataloader(self) -> KeyLoader:
        """The training batches, in an order that is new in each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> KeyLoader:
        """The validation batches, always the same."""
        return self._loader("val")

    def test_dataloader(self) -> KeyLoader:
        """The test batches, always the same."""
        return self._loader("test")

    def predict_dataloader(self) -> KeyLoader:
        """The batches to predict, in their order."""
        return self._loader(self.predict_split)
