"""The state of a run besides its weights, kept before a step and put back if the step is left out."""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins.core.lightning_internals import logged_so_far
from lightning_plugins.replay.module_state import ModuleState


class StateOfRun:
    """Buffers and attributes of a module, states of its torchmetrics, and Lightning's means of what was logged.

    Args:
        trainer: the running trainer.
        module: the trained module. Its weights, trained or frozen, are not kept, nor its attributes under manual
            optimization, where other optimizers of the same ``training_step`` go on.

    Attributes:
        is_due: whether all is put back at the end of the batch.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self.is_due = trainer, False
        self._module_state = ModuleState(module, frozen=False, attributes=module.automatic_optimization)
        self._metrics = [_MetricState(metric) for metric in self._module_state.metrics]
        self._logged = {name: _MetricState(metric) for name, metric in logged_so_far(trainer).items()}

    def restore(self) -> None:
        """Put everything back; values that were logged for the first time since then are in no mean."""
        self._module_state.restore()
        for state in self._metrics:
            state.restore()
        for name, metric in logged_so_far(self._trainer).items():
            if name in self._logged:
                self._logged[name].restore()
            elif metric.meta.on_epoch:
                cache = metric._forward_cache
                metric.reset()
                metric._forward_cache = cache


class _MetricState:
    """One torchmetric's states: tensors as copies, lists by their entries."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        states = {name: getattr(metric, name) for name in metric._defaults}
        self._tensors = {name: state.clone() for name, state in states.items() if isinstance(state, Tensor)}
        self._lists = {name: (state, list(state)) for name, state in states.items() if isinstance(state, list)}
        self._counts = metric._update_count, metric._computed

    def restore(self) -> None:
        metric = self._metric
        for name, tensor in self._tensors.items():
            setattr(metric, name, tensor)
        for name, (entries, kept) in self._lists.items():
            entries[:] = kept  # Metric.forward clears them
            setattr(metric, name, entries)
        metric._update_count, metric._computed = self._counts
