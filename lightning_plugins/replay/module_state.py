"""What a module keeps from call to call besides what training moves: found wherever it hangs, saved and put back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchmetrics import Metric

from lightning_plugins.core.lightning_internals import is_no_optimizer, trainer_of
from lightning_plugins.core.optimizers import parameters_of
from lightning_plugins.core.vectors import foreach_copy_
from lightning_plugins.replay.objects import (
    Kind,
    attributes_of,
    children_of,
    entries_of,
    filled_slots,
    get_state,
    has_entries,
    is_busy,
    kind_of,
    set_entries,
    set_state,
)
from lightning_plugins.replay.writes import Marks, bits, is_opaque

_TORCH = {*nn.Module().__dict__, "log", "log_dict", "training_step"}  # torch's own, and what a replay puts there
_TABLES = ("_parameters", "_buffers", "_modules")
_CHANGE: set[Kind | None] = {"dict", "list", "set", "deque", "bytes"}
_SMALL = 2**12  # elements that are copied sooner than compared
_LONG = 1000  # entries of a container; longer ones are data, which nothing else hangs on
_LEAST, _TIMES = 2**24, 2  # elements that a call saves besides buffers, or so many times the trained ones if more
_LARGEST = 2**20  # elements of a metric's states that each call saves, and of tensors where parameters are not kept


class ModuleState:
    """What a module keeps from call to call besides its trained parameters, at one time: the objects and their values.

    State is every parameter and buffer that no optimizer moves (by owning it, unless it is frozen), and every
    attribute, wherever it hangs: found from the module through its parts, attributes, lists, dicts, sets, deques,
    tuples and objects of one's own, whatever they hold: tensors, NumPy arrays, random generators, networks that are not
    registered, torchmetrics, optimizers that are not the trainer's. So are rates and other settings in the groups of
    the trainer's, and learning-rate schedulers. Not looked into are trainers, loaders, data sets, callbacks, loggers,
    what is made outside of Python (iterators, queues, files), objects that hold a thread, variables of functions,
    classes and Python modules. Containers of more than a thousand entries are saved, but what hangs on them is not.

    Tensors that are not buffers are saved up to twice the trained elements (16 million at least), those shaped like
    trained parameters and small ones first. The others may not be written to: see :attr:`unsaved`.

    Args:
        module: the module whose state is kept, with all that hangs on it.
        trained: parameters that training moves besides those of the trainer's optimizers. Without optimizers it moves
            the module's parameters that require a gradient.
        frozen: whether to keep parameters that no optimizer moves, large tensors that are no buffers, and the settings
            of optimizers, as a replay must, which ends within the step.
        attributes: whether to keep more than registered buffers.
        earlier: an earlier state, whose values are shared where they are the same still.

    Attributes:
        modules: all modules found, registered or not.
        metrics: the torchmetrics among them.
        leaves: tensors that may have a gradient.
        trained: what training moves.
        unsaved: tensors found but too many to be saved.
        values: copies of the saved tensors, by the identity of each.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Iterable[Tensor] = (),
        frozen: bool = True,
        attributes: bool = True,
        earlier: "ModuleState | None" = None,
    ) -> None:
        self._module = module
        trainer = trainer_of(module) if isinstance(module, LightningModule) else None
        optimizers = _optimizers_of(trainer)
        owned = [p for optimizer in optimizers for p in parameters_of(optimizer) if p.requires_grad] + list(trained)
        self.trained = owned or [p for p in module.parameters() if p.requires_grad]
        self.modules: list[nn.Module] = []
        self.metrics: list[Metric] = []
        self.leaves = list(self.trained)
        self.unsaved: list[Tensor] = []
        self._attributes, self._frozen = attributes, frozen
        self._sharded = any(isinstance(param, DTensor) for param in self.trained)
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._namespaces: list[tuple[dict[str, Any], dict[str, Any], int]] = []
        self._slots: list[tuple[Any, list[tuple[Any, Any]]]] = []
        self._containers: list[tuple[Any, Kind, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._found: list[Tensor] = []
        self._buffers: set[int] = set()
        self._search([module, *(_settings_of(trainer, optimizers) if attributes and frozen else [])], optimizers)
        self._save_tensors({} if earlier is None else earlier.values)
        self._metric_states = [(m, dict(vars(m)), _copies(_states_of(m))) for m in self.metrics if _is_small(m)]

    # What is found

    def _search(self, roots: list[Any], optimizers: list[Optimizer]) -> None:
        seen, waiting = {id(optimizer) for optimizer in optimizers}, roots[::-1]
        seen.update(map(id, self.trained))
        while waiting:
            thing = waiting.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            kind = kind_of(type(thing))
            if kind == "tensor":
                self._found.append(thing)
            elif kind == "module":
                waiting += self._look_into_module(thing)
            elif kind is not None:
                waiting += self._look_into(thing, kind)

    def _look_into_module(self, part: nn.Module) -> Iterable[Any]:
        self.modules.append(part)
        if isinstance(part, torch.jit.ScriptModule):  # its tables are not of Python
            self._buffers.update(map(id, part.buffers()))
            return [*part.parameters(), *part.buffers()]
        own = part.__dict__
        # FSDP2 puts other parameters in the place of its own
        names = _TABLES if self._attributes and not self._sharded else ("_buffers",)
        self._tables += ((own[name], dict(own[name])) for name in names)
        self._buffers.update(map(id, own["_buffers"].values()))
        within = [*own["_parameters"].values(), *own["_buffers"].values(), *own["_modules"].values()]
        if isinstance(part, Metric):
            self.metrics.append(part)
        elif self._attributes:
            kept = {"training": part.training}
            for name, value in own.items():
                if name not in _TORCH:
                    kept[name] = value
                    if kind_of(type(value)):
                        within.append(value)
            self._namespaces.append((own, kept, len(own)))
        return within

    def _look_into(self, thing: Any, kind: Kind) -> Iterable[Any]:
        if kind == "array" and thing.size <= _LARGEST and thing.flags.writeable:
            self._arrays.append((thing, thing.copy()))
        elif kind == "generator":
            self._generators.append((thing, get_state(thing)))
        elif kind in _CHANGE and not isinstance(thing, frozenset):
            self._containers.append((thing, kind, entries_of(thing, kind)))
            if len(thing) > _LONG:
                return ()
        if kind in ("array", "generator", "bytes", "busy"):
            return children_of(thing, kind) if kind == "array" else ()
        within = children_of(thing, kind)
        if kind == "object" and is_busy(within):
            return ()
        if attributes := attributes_of(thing):
            self._namespaces.append((attributes, dict(attributes), len(attributes)))
        if slots := filled_slots(thing):
            self._slots.append((thing, slots))
        return (value for value in within if kind_of(type(value)))

    # Tensors

    def _save_tensors(self, earlier: "dict[int, Tensor]") -> None:
        self.leaves += [t for t in self._found if t.requires_grad and t.is_leaf]
        kept = [t for t in self._found if _can_be_written(t)]
        others = [t for t in kept if id(t) not in self._buffers]
        if not self._frozen:
            others = [t for t in others if not isinstance(t, nn.Parameter) and t.numel() <= _LARGEST]
        left = max(_LEAST, _TIMES * sum(p.numel() for p in self.trained if not is_lazy(p)))
        if sum(t.numel() for t in others) > left:
            shapes = {p.shape for p in self.trained if not is_lazy(p)}  # a teacher has those of its student
            others.sort(key=lambda t: (t.shape not in shapes, t.numel()))
        saved = [t for t in kept if id(t) in self._buffers]
        for tensor in others:
            left -= tensor.numel()
            (saved if left >= 0 and not is_opaque(tensor) else self.unsaved).append(tensor)
        with torch.no_grad():
            self._tensors = [(tensor, _memory_of(tensor)) for tensor in saved]
            self.values = {id(t): _value(memory, earlier.get(id(t))) for t, memory in self._tensors}

    # Putting back

    def restore(self) -> None:
        """Put everything back but torchmetrics, also what torch wrote without counting, as batch norm does."""
        for table, before in self._tables:
            if (table or before) and not has_entries(table, "dict", before):
                set_entries(table, "dict", before)
        for owner, named, size in self._namespaces:
            for name, value in named.items():
                if owner.get(name, _TORCH) is not value:
                    owner[name] = value
            if len(owner) != size:
                for name in owner.keys() - named.keys() - _TORCH:
                    del owner[name]
        for thing, slots in self._slots:
            for place, value in slots:
                place.__set__(thing, value)
        for container, kind, entries in self._containers:
            if not has_entries(container, kind, entries):
                set_entries(container, kind, entries)
        for array, numbers in self._arrays:
            array[...] = numbers
        for generator, state in self._generators:
            set_state(generator, state)
        self._restore_tensors()

    @torch.no_grad()
    def _restore_tensors(self) -> None:
        plain: list[tuple[Tensor, Tensor]] = []
        for tensor, memory in self._tensors:
            if _has_address(tensor) and (tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape):
                tensor.data = memory  # it was given another: param.data = ...
            if memory.is_inference():
                with torch.inference_mode():
                    memory.copy_(self.values[id(tensor)])
            elif memory.layout != torch.strided:
                memory.copy_(self.values[id(tensor)])
            else:
                plain.append((memory, self.values[id(tensor)]))
        if plain:
            foreach_copy_(*map(list, zip(*plain, strict=True)))

    def restore_metrics(self) -> None:
        """Give torchmetrics copies of the states that they had; not the states, which others may share."""
        for metric, attributes, states in self._metric_states:
            _set_attributes(metric, attributes | _copies(states))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back on leaving, and hide from graphs yet to be differentiated that tensors were written.

        Raises:
            RuntimeError: a tensor that is not saved was written to.
        """
        metrics = [(metric, dict(vars(metric))) for metric in self.metrics]
        for metric, attributes in metrics:
            _set_attributes(metric, attributes | _copies(_states_of(metric)))
        marks = Marks(self._module, self.unsaved)
        counted = tuple(memory for _, memory in self._tensors if not memory.is_inference())
        with _unsafe_preserve_version_counter(counted):
            try:
                yield
            finally:
                for metric, attributes in metrics:
                    _set_attributes(metric, attributes)
                self.restore()
        if marks.written():
            raise RuntimeError(f"{WRITES_FIXED}, and running it again has moved them twice: {MOVE_THEM}.")


WRITES_FIXED = "training_step writes to parameters that are not trained, too many to be put back"
MOVE_THEM = "move them in on_train_batch_end, as a teacher that follows the trained parameters"


def _optimizers_of(trainer: Trainer | None) -> list[Optimizer]:
    return [] if trainer is None else [o for o in trainer.optimizers if not is_no_optimizer(o)]


def _settings_of(trainer: Trainer | None, optimizers: list[Optimizer]) -> list[Any]:
    """Of the optimizers' groups, and the schedulers of their rates: a training_step may turn them."""
    schedulers = [] if trainer is None else [config.scheduler for config in trainer.lr_scheduler_configs]
    return [*(optimizer.param_groups for optimizer in optimizers), *schedulers]


def _can_be_written(tensor: Tensor) -> bool:
    """Whether a module may write to it in place: not if it is of a graph, expanded, or yet without numbers."""
    if tensor.grad_fn is not None or is_lazy(tensor) or tensor.is_nested:
        return False
    return tensor.layout != torch.strided or all(
        stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _has_address(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def _memory_of(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, this process's shard of a sharded one."""
    with torch._C.DisableTorchFunctionSubclass():
        memory = tensor.detach()
    return memory.to_local() if isinstance(memory, DTensor) else memory


def _value(memory: Tensor, earlier: Tensor | None) -> Tensor:
    """A copy; the earlier one where its numbers still stand, so that many calls share one of a network that rests."""
    if earlier is None or memory.numel() <= _SMALL or memory.layout != torch.strided or memory.is_quantized:
        return memory.clone()
    same = earlier.shape == memory.shape and earlier.dtype == memory.dtype and earlier.device == memory.device
    return earlier if same and torch.equal(bits(memory), bits(earlier)) else memory.clone()


def _states_of(metric: Metric) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in metric._defaults}


def _copies(states: dict[str, Any]) -> dict[str, Any]:
    return {name: state.clone() if isinstance(state, Tensor) else list(state) for name, state in states.items()}


def _is_small(metric: Metric) -> bool:
    return sum(state.numel() for state in _states_of(metric).values() if isinstance(state, Tensor)) <= _LARGEST


def _set_attributes(metric: Metric, attributes: dict[str, Any]) -> None:
    vars(metric).clear()
    vars(metric).update(attributes)
