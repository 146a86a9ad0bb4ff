"""Training seen as the steps of an ODE solver, for any module and the usual optimizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.callbacks.ode_diagnostics.optimizer_flow import (
    Rule,
    descent_sign,
    implicit_term,
    largest_rate,
    rule_of,
)
from lightning_plugins.callbacks.ode_diagnostics.probe import Engine, Probe
from lightning_plugins.callbacks.ode_diagnostics.rows import (
    LR,
    EdgeWatch,
    Step,
    as_columns,
    clipping,
    first_order_rows,
    implicit_sum,
    start_rows,
    suggested_lr,
)
from lightning_plugins.callbacks.ode_diagnostics.step_watch import StepWatch
from lightning_plugins.callbacks.run_checks import NeedsTrainer, put_in_order, require_strategy
from lightning_plugins.core import arguments as must
from lightning_plugins.core.lightning_internals import (
    batches_that_stepped,
    is_no_optimizer,
    own_state_key,
    skips_backward,
)
from lightning_plugins.core.vectors import local, norm
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.twice import why_not_exact

OnEdge = Literal["log", "warn"]


@dataclass
class _Begun:
    """A logged step under way, from its gradient on."""

    params: Sequence[Tensor]  # with a gradient
    grad_norm: Tensor
    probes: bool = False  # the window can be run again
    loss: Tensor | None = None  # raw mean
    signed_loss: Tensor | None = None  # mean with the calls' signs
    implicit: Tensor | None = None  # the implicit term
    theta: list[Tensor] | None = None  # copy of the parameters, in due steps
    gradient: list[Tensor] | None = None  # copy of the raw gradients, in due steps


class ODEDiagnostics(NeedsTrainer):
    r"""See training as the steps of an ODE solver: flow time, local error, distance to the stability limit.

    In optimizer step ``n`` with ``n`` a multiple of ``every_n_steps`` the window of batches is run once more at the new
    parameters. With ``theta``, ``g0`` (raw, unclipped) before and ``theta + d``, ``g1`` after the step, ``h`` the
    learning rate, ``P`` the preconditioner, ``b`` the momentum:

    ====================  ==========================================  ===========  ======  ============
    row (``ode/...``)     formula                                     unit         cost    optimizers
    ====================  ==========================================  ===========  ======  ============
    ``time``              sum of the steps' flow times                1/curvature  0       known
    ``grad_norm``         ``|g0|``                                    loss/theta   0       all
    ``clip_factor``       norm of the clipped gradient / ``|g0|``     1            0       known
    ``skipped_steps``     steps that a GradScaler has skipped so far  steps        0       all
    ``loss``              ``L``, the raw mean over the window         loss         0       all
    ``igr_term``          ``phi(h) |g0|^2``                           loss         0       SGD family
    ``igr_ratio``         ``igr_term / L``                            1            0       SGD family
    ``update_norm``       ``|d|``                                     theta        copy    all
    ``rel_update``        ``|d| / |theta|``                           1            copy    all
    ``cos_descent``       ``-<d,g0> / (|d| |g0|)``                    1            copy    all
    ``effective_lr``      ``-<d,g0> / |g0|^2``                        lr           copy    all
    ``predicted_dloss``   ``<g0,d>``                                  loss         copy    all
    ``predicted2_dloss``  ``<d,g0+g1> / 2``                           loss         probe   known
    ``actual_dloss``      ``L1 - L0``                                 loss         probe   known
    ``dloss_ratio``       ``(L1 - L0) / <g0,d>``                      1            probe   known
    ``curvature_step``    ``<d,g1-g0> / |d|^2``                       1/lr         probe   known
    ``edge_ratio_step``   ``h <d,g1-g0> / <d,Pd> / limit``            1            probe   known
    ``local_error``       ``h/2 |P^-1 (g1-g0)|``                      theta        probe   no momentum
    ``rel_local_error``   ``local_error / |d|``                       1            probe   no momentum
    ``lr_for_tol``        ``h tol / rel_local_error``                 lr           probe   no momentum
    ``sharpness``         top eigenvalue of ``P^-1/2 H P^-1/2``       1/lr         search  known
    ``edge_ratio``        ``h sharpness / limit``                     1            search  known
    ``stiffness``         ``sharpness / |<d,g1-g0> / <d,Pd>|``        1            search  known
    ``damping_ratio``     ``(1-b) / (2 sqrt(h sharpness))``           1            search  SGD momentum
    ====================  ==========================================  ===========  ======  ============

    Known optimizers: ``torch.optim`` SGD (momentum, dampening, Nesterov), RMSprop, Adam, AdamW with any of their
    options, and NormRMSprop; "no momentum": all but Adam. Limits, flow times, coupled and decoupled decay and groups
    with rates of their own: see ``optimizer_flow.py``. ``phi(h)`` is ``h/4`` for SGD without momentum. A quantity that
    an optimizer, a step or a setting does not define is omitted, never zero; one that is not finite too.

    What to keep in mind:

    - All is of the window's batches, with their dropout masks: gradient noise is in it. Curvatures are secants over the
      step; with bf16 or fp16 the gradients' rounding hides ratios below some 1e-2.
    - ``actual_dloss`` is the change of what the gradients belong to (an epoch's incomplete window counts by its share).
    - For RMSprop and Adam an edge ratio above one is no divergence: ``v`` grows and corrects it.
    - ``clip_factor < 1``: the local error is that of the shortened step if the norm was clipped, and omitted if values
      were; the implicit term is omitted; time counts the step in full. Edge ratios are of the unclipped method.
    - Sharpness is at the new parameters, and of the loss plus coupled decay.
    - The objective is the one that is trained. Under Flooding gradients, loss changes and sharpness carry its sign.
      Under GradientPenalty gradients include the penalty's; the loss changes, which do not, are omitted, and sharpness
      is that of the loss.
    - Manual optimization: rows that need neither ``L`` nor a second run of the window, as ``training_step`` steps its
      optimizers itself. ``grad_norm`` is of the gradient that the optimizer receives, which may be a clipped one:
      ``clip_factor`` and the implicit term are omitted.
    - Unknown optimizers, also subclasses with a ``step`` of their own: the rows for all.
    - A second run of the window gets copies of the batches, and leaves no trace in what hangs on the module (weights,
      buffers, teachers, attributes, objects, generators), its metrics, logs and torch's, NumPy's and Python's random
      numbers. What ``training_step`` prints, writes to files, takes from iterators or keeps outside of the module
      cannot be undone: ask :func:`~lightning_plugins.is_replaying` there.
    - An error in a second run (a module that refuses a loss or a batch which it would not meet in training, too little
      memory) is said once for each kind, the rows that need it are left out, and later probes try again.

    Training is never changed: weights are bit for bit those of a run without the callback. Under DDP and FSDP2
    everything is of all ranks. Rows go to the trainer's loggers and ``callback_metrics`` in probing steps; those that
    cost no second gradient also every ``log_every_n_steps``. Time, step and skip counts are in the checkpoint.

    Cost, by the table's words. 0: next to nothing. Copy: two copies of the parameters during the step. Probe: one more
    forward and backward pass, two more copies, and the batches once more. Search: ``sharpness_products`` times two such
    passes (finite differences) or some four (exact), and eight copies. Other steps cost what they cost without the
    callback; those at ``log_every_n_steps`` two norms more. The first, second, fourth, eighth and so on of the probes
    also runs the window at the old parameters, to see that it can be repeated.

    Args:
        every_n_steps: optimizer steps from one probe to the next, 1 or more; the default of 50 adds one forward and
            backward pass to fifty.
        sharpness_every_n_steps: optimizer steps from one search for the sharpness to the next, 1 or more; a step in
            which it is searched for is probed as well. The default of None leaves out the four rows of the search,
            which costs tens of passes.
        tol: relative local error that a step may have, above 0, for the row lr_for_tol; 0.1 is a step that bends by a
            tenth of its length. The default of None leaves that row out.
        on_edge: what happens when the edge ratio was above one in three probes in a row. With warn it is said once,
            with log, the default, it only shows in the rows.
        optimizer_index: place of the watched optimizer among those of configure_optimizers, counted from 0, the
            default. Give one ODEDiagnostics to each that is to be watched: rows of optimizer 0 are logged as ode/...,
            those of optimizer 1 as ode/1/....
        sharpness_engine: how products with the Hessian are computed. With exact the loss is differentiated twice; with
            finite_difference the window is run at displaced parameters (central differences), which also works with
            fused attention, compiled modules and FSDP2. The default of auto is exact where that is possible, and warns
            once where it is not: with kinks (ReLU, max pooling) gradients jump between displaced points, which the
            search takes for curvature; smooth nets agree to some 1e-2 in fp32.
        sharpness_rtol: relative change of the eigenvalue, above 0, at which the search for the sharpness ends, if each
            of two products in a row changes it by less; 1e-3 by default.
        sharpness_max_products: most products of one search for the sharpness, 1 or more; 50 by
            default.
        picture: whether one page of panels is logged at the end of training, if the trainer has a logger; true by
            default.

    Attributes:
        history: one dict for each logged step of this run, with ``"step"``, the rows as ``"ode/..."`` (whatever the
            index), and for known optimizers ``"lr-ODEDiagnostics"``, the largest learning rate of the groups. A second
            ``fit`` of the same trainer goes on with it, as with steps and flow time; any other begins anew.
        sharpness_products: Hessian products of the last search for the sharpness.

    Raises:
        ValueError: an argument out of range, or two for one optimizer.
        MisconfigurationException: before training, for a strategy whose gradients cannot be read, or where
            sharpness_engine="exact" is known to be impossible.

    Source:
        Su, kexue.fm/archives/5655, 6234, 7787 (optimizers as flows, error control); Barrett and Dherin 2021, eq. 4
        (implicit term); Cohen et al. 2021, https://arxiv.org/abs/2103.00065 (edge of stability).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ODEDiagnostics(every_n_steps=50)], logger=False, accelerator="cpu")
    """

    gradient_order = 3

    def __init__(
        self,
        every_n_steps: int = 50,
        sharpness_every_n_steps: int | None = None,
        tol: float | None = None,
        on_edge: OnEdge = "log",
        optimizer_index: int = 0,
        sharpness_engine: Engine = "auto",
        sharpness_rtol: float = 1e-3,
        sharpness_max_products: int = 50,
        picture: bool = True,
    ) -> None:
        must.check(
            locals(),
            every_n_steps=must.count,
            sharpness_every_n_steps=must.optional(must.count),
            tol=must.optional(must.positive),
            on_edge=must.one_of(OnEdge),
            optimizer_index=must.whole(0, why="optimizers are counted from 0"),
            sharpness_engine=must.one_of(Engine),
            sharpness_rtol=must.positive,
            sharpness_max_products=must.count,
            picture=must.flag,
        )
        self.every_n_steps, self.sharpness_every_n_steps, self.tol = every_n_steps, sharpness_every_n_steps, tol
        self.on_edge, self.optimizer_index, self.picture = on_edge, optimizer_index, picture
        self.sharpness_engine = sharpness_engine
        self.sharpness_rtol, self.sharpness_max_products = sharpness_rtol, sharpness_max_products
        self.history: list[dict[str, float]] = []
        self._loaded: dict[str, Any] | None = None
        self._recorder: StepRecorder | None = None
        self._probe: Probe | None = None
        self._watch: StepWatch | None = None
        self._begun: _Begun | None = None
        self._left: tuple[int, int] | None = None  # which trainer, and at which step

    @property
    def state_key(self) -> str:
        """One for each optimizer."""
        index = self.optimizer_index
        return own_state_key(self, optimizer_index=index) if index else super().state_key

    # A step: its gradient, the optimizer's move, the rows

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradient before it is clipped; of several evaluations in one step (LBFGS) at the first."""
        if self._watch is None or skips_backward(trainer) or not (params := self._watch.begin(optimizer)):
            return
        step = self._watch.steps
        logs = trainer.loggers and trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0
        due = self._is_due(step)
        self._begun = self._begin(params, step, due) if due or logs else None

    @torch.no_grad()
    def _begin(self, params: Sequence[Tensor], step: int, due: bool) -> _Begun:
        """What the moved parameters will be compared with; copies in due steps only."""
        rule, grads = rule_of(self._watch.optimizer), [p.grad for p in params]
        begun = _Begun(params, norm(grads))
        if self._probe is not None:
            begun.loss, begun.signed_loss = self._probe.losses()
            begun.probes = due and self._can_probe() and self._probe.is_ready(params, step)
            if isinstance(rule, Rule) and (terms := implicit_term(self._watch.optimizer, rule, params)):
                begun.implicit = implicit_sum(terms, params, rule.sign)
        if due:
            begun.theta, begun.gradient = [p.detach().clone() for p in params], [g.clone() for g in grads]
        return begun

    @torch.no_grad()
    def _end(self, moved: bool) -> None:
        """The optimizer has moved the parameters, or the GradScaler has skipped the step; the watch calls this."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        rule = rule_of(self._watch.optimizer)
        rows = {"skipped_steps": self._watch.skipped}
        rows |= {"time": self._watch.time.time} if isinstance(rule, Rule) else {}
        self._write(rows | self._rows(begun, rule) if moved else rows, rule)

    def _rows(self, begun: _Begun, rule: Rule | str) -> dict[str, float]:
        """By cost: the gradient alone, the move beside it, the gradient after it, the sharpness there."""
        length, factor, turned = begun.grad_norm.item(), None, False
        if self._probe is not None and isinstance(rule, Rule):  # others may write to their gradients
            factor, turned = clipping(begun.gradient, length, [p.grad for p in begun.params])
        loss, implicit = (None if tensor is None else tensor.item() for tensor in (begun.loss, begun.implicit))
        rows = start_rows(length, factor, loss, implicit)
        if begun.theta is None:
            return rows
        start, move = norm(begun.theta), begun.theta
        for p, theta in zip(local(begun.params), local(move), strict=True):
            torch.sub(p, theta, out=theta)  # where it was is needed no more
        step = Step(begun.gradient, move, start, factor, turned, descent_sign(self._watch.optimizer), length)
        rows |= first_order_rows(step)
        if begun.probes and isinstance(rule, Rule):
            search = (self.sharpness_rtol, self.sharpness_max_products)
            search = search if self._finds_sharpness(self._watch.steps) else None
            optimizer, before = self._watch.optimizer, begun.signed_loss
            rows |= self._probe.rows(optimizer, rule, begun.params, step, before, self.tol, search)
        return rows

    def _write(self, rows: dict[str, float], rule: Rule | str) -> None:
        """To the loggers at once: Lightning would repeat its values of this step in later ones."""
        found = {name: float(value) for name, value in rows.items() if math.isfinite(value)}
        step = batches_that_stepped(self._trainer)
        row = {"step": step} | {f"ode/{name}": value for name, value in found.items()}
        logged = {f"{self._prefix}{name}": value for name, value in found.items()}
        self._trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logged.items()})
        for logger in self._trainer.loggers:
            logger.log_metrics(logged, step=step)
        if isinstance(rule, Rule):
            row[LR] = largest_rate(self._watch.optimizer)
            if self.on_edge == "warn" and (sentence := self._edge.sentence(row, rule)):
                self._warn_once(sentence)
        self.history.append(row)

    # When a step is looked at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch if its step will be probed."""
        if self._watch is not None:
            self._watch.batch_begins()
        if self._recorder is not None:
            self._recorder.keep(self, self._is_due(self._watch.steps + 1) and self._can_probe())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """A step that the GradScaler skipped calls no hook of the optimizer."""
        if self._watch is not None:
            self._watch.end_without_hook()

    def _is_due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or self._finds_sharpness(step)

    def _finds_sharpness(self, step: int) -> bool:
        return self.sharpness_every_n_steps is not None and step % self.sharpness_every_n_steps == 0

    def _can_probe(self) -> bool:
        known = isinstance(rule_of(self._watch.optimizer), Rule)
        return known and self._probe is not None and self._probe.repeats is not False

    # Before and after training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place after Flooding and GradientPenalty; go on where this trainer's last fit ended."""
        if stage != "fit":
            return
        put_in_order(trainer)
        others = (c for c in trainer.callbacks if isinstance(c, ODEDiagnostics) and c is not self)
        if any(other.optimizer_index == self.optimizer_index for other in others):
            raise ValueError(
                f"two ODEDiagnostics have optimizer_index={self.optimizer_index}: give each optimizer one of them."
            )
        if self._watch is not None and self._left == (id(trainer), batches_that_stepped(trainer)):
            state = self._watch.state_dict()
            self._loaded = state | {"flow": state["flow"] | {"fill": None}}  # the optimizer is a new one
        else:
            self._loaded, self.history = None, []
        self._watch = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer, and begin to watch its steps."""
        require_strategy("ODEDiagnostics", trainer)
        self._require_engine(trainer, pl_module)
        if not 0 <= self.optimizer_index < len(trainer.optimizers):
            raise ValueError(
                f"optimizer_index={self.optimizer_index}, but {type(pl_module).__name__} has "
                f"{len(trainer.optimizers)} optimizer(s), counted from 0."
            )
        self._release()  # of a run within the run, as a search for the learning rate is
        optimizer = trainer.optimizers[self.optimizer_index]
        if is_no_optimizer(optimizer):
            return  # configure_optimizers gave none, and Lightning has said so
        self._trainer, self._warned = trainer, set[str]()
        self._watch = StepWatch(trainer, optimizer, self._end, self._warn_once)
        if self._loaded is not None:
            self._watch.load_state_dict(self._loaded)
            self._loaded = None
        self.history = [row for row in self.history if row["step"] < batches_that_stepped(trainer)]
        self._begun = None
        self._edge = EdgeWatch()
        if pl_module.automatic_optimization:
            self._recorder = StepRecorder.attach(trainer, pl_module, self)
            self._probe = Probe(trainer, pl_module, self._recorder, self.sharpness_engine)
        self._explain(trainer, pl_module)

    def _require_engine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.sharpness_engine != "exact" or self.sharpness_every_n_steps is None:
            return
        if pl_module.automatic_optimization and (reason := why_not_exact(trainer, pl_module)):
            reason = reason.replace("engine='finite", "sharpness_engine='finite")
            raise MisconfigurationException(f"ODEDiagnostics(sharpness_engine='exact') is not possible: {reason}.")

    def _explain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is read, and warn of what cannot be."""
        flooded = any(getattr(callback, "gradient_order", None) == 0 for callback in trainer.callbacks)
        penalised = self._probe is not None and self._probe.penalty is not None
        objective = "the loss" + " with Flooding's sign" * flooded + " plus GradientPenalty's term" * penalised
        rest = "; sharpness is that of the loss without the term" * penalised
        rank_zero_info(f"ODEDiagnostics reads the objective that is trained: {objective}{rest}.")
        if isinstance(rule := rule_of(self._watch.optimizer), str):
            self._warn_once(f"{rule}. Only rows that hold for any optimizer are logged.")
        elif self._probe is None:
            self._warn_once(
                f"{type(pl_module).__name__} has automatic_optimization=False, so that its training_step cannot be run "
                "again. Rows that need the loss or a second gradient are omitted."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the picture, if any row is drawn."""
        from lightning_plugins.callbacks.ode_diagnostics.figure import DRAWN, ode_figure

        drawn = any(name in row for row in self.history for name in DRAWN)
        if self.picture and drawn and trainer.loggers and trainer.is_global_zero:
            from lightning_plugins.core.logging import figure_to_image, log_image

            figure = ode_figure(as_columns(self.history))
            log_image(trainer, f"{self._prefix}diagnostics", figure_to_image(figure), trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give ``training_step`` and the optimizer back; forget what a checkpoint held that no fit has used."""
        self._release()
        self._loaded = None
        self._left = id(trainer), batches_that_stepped(trainer)

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.detach()
        if self._recorder is not None:
            self._recorder.detach(self)
        self._recorder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` and the optimizer back."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Flow time, and the counts of steps and of skipped ones."""
        if self._watch is None:
            return self._loaded or {}
        return self._watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there if a fit starts with it."""
        self._loaded = state_dict or None

    # Results

    @property
    def _prefix(self) -> str:
        return f"ode/{self.optimizer_index}/" if self.optimizer_index else "ode/"

    @property
    def sharpness_products(self) -> int:
        """Hessian products of the last search for the sharpness, each two runs of the window."""
        return self._probe.products if self._probe is not None else 0

    def suggest_lr(self) -> float:
        """A learning rate for this optimizer from what was seen, for instance in a short run at a cautious rate.

        Returns:
            With ``tol``, where the optimizer has a local error: the rate of the median error per rate, which is the
            median of ``lr_for_tol``. Else half the rate at which the edge ratio would be one, by the median of ratios
            per rate over all probes, negative ones too: of ``edge_ratio``, or for optimizers without momentum, where
            sharpness was not asked for, of ``edge_ratio_step``, which sees one direction only and so suggests more.
            For RMSprop and Adam the edge follows the rate, so that this says little late in training.

        Raises:
            RuntimeError: no probe tells; the sentence says what to do.
        """
        rule = None if self._watch is None else rule_of(self._watch.optimizer)
        return suggested_lr(self.history, rule, self.tol)

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            rank_zero_warn(f"ODEDiagnostics: {sentence}")
