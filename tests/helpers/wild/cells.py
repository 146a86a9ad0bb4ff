"""A cell of the table: one module, one choice of callbacks, one setting, and what is asserted of it."""

import json
import math
import os
import re
import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.optimization.automatic import Closure
from trainers import quiet_trainer

from lightning_plugins import Flooding, GradientPenalty, ODEDiagnostics, RandomState
from wild import autograd, data, language, teachers, training, vision
from wild.reference import Objective, random_state, set_random_state, step, train
from wild.zoo import ZOO, batches_of, default_dtype, make

FAMILIES = {
    module.__name__.rpartition(".")[2]: module for module in (language, vision, teachers, data, autograd, training)
}
CALLBACKS = ("none", "diagnostics", "difference", "exact", "auto", "flooding", "all")
SETTINGS = ("plain", "accumulation", "clipping", "bf16-mixed", "resume")
RESULTS = "WILD_RESULTS"  # the variable with the path of a file to which every cell adds a line

EPS = {"64-true": torch.finfo(torch.float64).eps, "islands": torch.finfo(torch.float32).eps}
EPS["bf16-mixed"] = torch.finfo(torch.bfloat16).eps
STEPS = {"64-true": 1e-5, "islands": 3e-4, "bf16-mixed": 1e-1}  # of central differences: about the cube root of EPS
ROOM = {"64-true": 1e5, "islands": 10, "bf16-mixed": 16}  # how many of these may add up in a run


def kind_of(cls, setting):
    """In which precision the loss is known."""
    return "bf16-mixed" if setting == "bf16-mixed" else "islands" if cls.islands else "64-true"


def step_of(cls, setting):
    """The relative displacement of differences."""
    kind = kind_of(cls, setting)
    return cls.step if cls.step and kind != "bf16-mixed" else STEPS[kind]


# Runs


def shape(cls, setting):
    """Epochs, batches of one, batches of a step."""
    return (max(1, cls.epochs // 2), 5, 2) if setting == "accumulation" else (cls.epochs, 2, 1)


def dtype_of(setting):
    return torch.float32 if setting == "bf16-mixed" else torch.float64


@cache
def measured(cls):
    """Numbers that make the callbacks matter, from plain training: coefficient, level, largest norm of a gradient."""
    path = written(cls, "plain", None)
    if not path.losses:
        return {"coefficient": 0.1, "level": 0.0, "clip": 0.1}
    way = "difference" if cls.movable else "autograd"
    first = written(cls, "first", Objective(coefficient=1e-30, way=way, relative_step=step_of(cls, "plain")))
    losses = sorted(path.losses)
    middle = len(losses) // 2
    # the penalty's gradient is three tenths of the loss's; some steps descend and some climb; every step is clipped
    coefficient = 0.15 * first.lengths[0] / first.products[0]
    return {
        "coefficient": coefficient,
        "level": sum(losses[middle - 1 : middle + 1]) / 2,
        "clip": min(path.lengths) / 2,
    }


@cache
def written(cls, setting, objective, probes=False):
    """Training written out: ``None`` as the objective is the loss alone; the setting ``"first"`` is one step."""
    epochs, n, k = (1, 1, 1) if setting == "first" else shape(cls, setting)
    dtype = dtype_of(setting)
    module, batches = make(cls, dtype), batches_of(cls, n, dtype)
    options = {"autocast": setting == "bf16-mixed", "clip": measured(cls)["clip"] if setting == "clipping" else None}
    with own_numbers(), default_dtype(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(module, batches, epochs, k, objective=objective or Objective(), probes=probes, **options)


def trained(cls, setting, callbacks, tmp_path=None, modules=None):
    """The module after a Trainer's run, and its callbacks; ``"resume"`` is a run that was stopped half-way and resumed.

    ``modules`` is a list to which each module is added before it is trained.
    """
    modules = [] if modules is None else modules
    epochs, n, k = shape(cls, setting)
    options = {"accumulate_grad_batches": k, "log_every_n_steps": 1, "max_epochs": epochs}
    options["precision"] = "bf16-mixed" if setting == "bf16-mixed" else "64-true"
    options["gradient_clip_val"] = measured(cls)["clip"] if setting == "clipping" else None
    loader = cls.loader(batches_of(cls, n, dtype_of(setting)))
    modules.append(make(cls, dtype_of(setting)))
    Closure.warning_cache.clear()  # else what one run has said the next would not say
    with own_numbers():
        if setting == "resume":
            first = quiet_trainer(*callbacks(), RandomState(), **options | {"max_epochs": epochs // 2})
            first.fit(modules[-1], loader)
            first.save_checkpoint(tmp_path / "stopped.ckpt")
            modules.append(make(cls, dtype_of(setting)))
            Closure.warning_cache.clear()
            callbacks, options["ckpt_path"] = with_random_state(callbacks), tmp_path / "stopped.ckpt"
        made, ckpt_path = callbacks(), options.pop("ckpt_path", None)
        quiet_trainer(*made, **options).fit(modules[-1], loader, ckpt_path=ckpt_path)
    return modules[-1], made


def with_random_state(callbacks):
    return lambda: [*callbacks(), RandomState()]


@contextmanager
def own_numbers():
    """Random numbers from the run's own seed on."""
    before = random_state()
    torch.manual_seed(2)
    try:
        yield
    finally:
        set_random_state(before)


# What is asserted


def cells(family):
    """The parameters of a family's test; what takes longer than the rest is marked slow."""
    for position, cls in enumerate(cls for cls in ZOO.values() if cls.family == family):
        for column, callback in enumerate(CALLBACKS):
            for row, setting in enumerate(SETTINGS):
                # large modules meet each callback in the first setting and one other by default, by turns
                turn = row == 0 or (position + column) % (len(SETTINGS) - 1) + 1 == row
                short = not cls.slow and (turn or not cls.large)
                marks = () if short else (pytest.mark.slow,)
                yield pytest.param(cls.title, callback, setting, marks=marks, id=f"{cls.title}-{callback}-{setting}")


def check(title, callback, setting, tmp_path):
    """Assert what the cell stands for, and write it down if a file is named for that."""
    cls = ZOO[title]
    outcome = outcome_of(cls, callback, setting, tmp_path)
    if os.environ.get(RESULTS):
        line = {"module": title, "callback": callback, "setting": setting} | outcome
        with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def outcome_of(cls, callback, setting, tmp_path):
    """One of ``{"refused": sentence}``, ``{"equal": 0}`` (bit for bit) and ``{"equal": relative error}``."""
    if sentence := asserted(cls, callback, setting):
        return assert_refused(cls, callback, setting, sentence, tmp_path)
    choices = chosen(cls, callback, setting)
    with said(cls, callback, setting):
        module, made = trained(cls, setting, choices, tmp_path)
    state = module.state()
    if setting == "resume":
        with said(cls, callback, setting):
            expected = trained(cls, "plain", with_random_state(choices))[0].state()
    else:
        expected = written(cls, setting, objective_of(cls, callback, setting)).state
    assert state.keys() == expected.keys()
    if callback == "diagnostics":
        assert_rows(cls, setting, made[0])
    if setting == "resume" or callback in ("none", "diagnostics", "flooding"):
        unequal = [name for name in state if not same(state[name], expected[name])]
        assert unequal == []
        return {"equal": 0}
    without = make(cls, dtype_of(setting)).state() if cls.faint and setting == "bf16-mixed" else None
    without = without or written(cls, setting, None).state
    error, effect = distance(state, expected), distance(expected, without)
    assert effect > 0
    way = objective_of(cls, callback, setting).way
    assert error / effect < tolerance(cls, setting, way)
    if way == "difference" and not (cls.seen or cls.twice or setting == "bf16-mixed"):
        true = written(cls, setting, objective_of(cls, callback, setting, "autograd")).state
        assert distance(state, true) / effect < truncation(cls)
    return {"equal": error / effect}


def asserted(cls, callback, setting):
    """The sentence with which the cell is refused; ``None`` where numbers must be equal."""
    refused = cls.unsuited.get(setting) or cls.refused.get(callback) or cls.refused.get(f"{callback}, {setting}")
    return refused or (twice_of(cls, setting) if callback == "exact" else None)


def is_doubted(cls, setting):
    """Whether differences are too rough to tell whether a custom function's backward is right."""
    return bool(cls.doubted) and setting == "bf16-mixed"


def twice_of(cls, setting):
    """Why differentiating twice is impossible, if that is seen."""
    return None if is_doubted(cls, setting) else cls.twice


def chosen(cls, callback, setting):
    """A function that makes the callbacks."""
    numbers = measured(cls)
    step = step_of(cls, setting)
    penalty = {"coefficient": numbers["coefficient"], "difference": "central", "relative_step": step}
    if setting == "resume":  # as most users have them: what is chosen on the way must be kept
        penalty = {"coefficient": numbers["coefficient"]}
    kinds = {
        "diagnostics": lambda: ODEDiagnostics(1, sharpness_every_n_steps=2, sharpness_rtol=0.1, picture=False),
        "difference": lambda: GradientPenalty(**penalty),
        "exact": lambda: GradientPenalty(numbers["coefficient"], engine="exact"),
        "auto": lambda: GradientPenalty(**penalty, engine="auto"),
        "flooding": lambda: Flooding(numbers["level"]),
    }
    names = {"none": (), "all": ("diagnostics", "difference", "flooding")}.get(callback, (callback,))
    return lambda: [kinds[name]() for name in names]


def objective_of(cls, callback, setting, way=None):
    """What the callbacks train on."""
    numbers = measured(cls)
    level = numbers["level"] if callback in ("flooding", "all") else None
    if callback not in ("difference", "exact", "auto", "all"):
        return Objective(level)
    exact = callback == "exact" or (callback == "auto" and not twice_of(cls, setting))
    way = way or ("autograd" if exact else "difference")
    within = cls.within and way == "autograd"
    return Objective(level, numbers["coefficient"], way, step_of(cls, setting), within)


def tolerance(cls, setting, way):
    """Relative error of the penalty's part in a run: roundings, over the displacement for differences.

    In float64 all that is known to the last bits; in fp32 and bf16 both runs round the same numbers, but for a few
    that lie on the edge.
    """
    kind = kind_of(cls, setting)
    if way == "difference":
        return (1 if kind == "bf16-mixed" else ROOM[kind]) * EPS[kind] / step_of(cls, setting)
    return ROOM[kind] * EPS[kind]


def truncation(cls):
    """Relative error of central differences, quadratic in the displacement."""
    return 1e-1 if cls.islands else 1e-4


def distance(one, other):
    """Of two states, over all their floating-point tensors; whole numbers must be equal."""
    total = 0.0
    for name, tensor in one.items():
        if tensor.is_floating_point() or tensor.is_complex():
            total += (tensor - other[name]).abs().double().square().sum().item()
        else:
            assert torch.equal(tensor, other[name]), name
    return math.sqrt(total)


def same(one, other):
    """Bit for bit, NaN beside NaN."""
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def assert_refused(cls, callback, setting, sentence, tmp_path):
    """One sentence, and the trained weights are as they were."""
    modules = []
    with (
        said(cls, callback, setting, all_of_it=False),
        pytest.raises((RuntimeError, MisconfigurationException, ValueError, ArithmeticError), match=sentence) as raised,
    ):
        trained(cls, setting, chosen(cls, callback, setting), tmp_path, modules)
    trainer = modules[-1]._trainer
    if trainer is not None and trainer.global_step:
        assert trainer.global_step <= 2 * cls.late
        return {"refused": str(raised.value)}
    before = called(cls, setting)
    unequal = [name for name, param in modules[-1].named_parameters() if not same(param, before[name])]
    assert unequal == []
    return {"refused": str(raised.value)}


@cache
def called(cls, setting):
    """The parameters after the calls of training_step for one optimizer step, which may write to them itself."""
    (_, n, k), dtype = shape(cls, setting), dtype_of(setting)
    module = make(cls, dtype)
    module.log = lambda *args, **kwargs: None
    with own_numbers(), default_dtype(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, batch in enumerate(deepcopy(batches_of(cls, n, dtype)[:k]) if module.automatic_optimization else ()):
            module.on_train_batch_start(batch, index)
            step(module, batch, index, setting == "bf16-mixed")
    return dict(module.named_parameters())


def assert_rows(cls, setting, diagnostics):
    """The diagnostics' rows against the written run: lengths of gradients, curvature along each step, sharpness."""
    path = written(cls, setting, None, probes=True)
    rows = [row for row in diagnostics.history if "ode/update_norm" in row]
    if cls.unlogged:
        assert rows == []
        return
    if not path.losses or (cls.late and cls.omitted):  # manual optimization: other rows than a written loop has
        return
    epochs = shape(cls, setting)[0]
    resumed = len(path.losses) * (epochs // 2) // epochs if setting == "resume" else 0
    assert len(rows) == len(path.losses) - resumed
    kind = kind_of(cls, setting)
    bound = (1 if kind == "bf16-mixed" else ROOM[kind]) * EPS[kind]
    for row, length, bend in zip(rows, path.lengths[resumed:], path.bends[resumed:], strict=True):
        assert row["ode/grad_norm"] == pytest.approx(length, rel=bound)
        probed = not (cls.omitted or math.isnan(bend))
        assert ("ode/curvature_step" in row) == probed
        if probed:
            rounding = bound * length / row["ode/update_norm"]
            assert row["ode/curvature_step"] == pytest.approx(bend, rel=bound, abs=rounding)
    if not cls.omitted and not any(map(math.isnan, path.bends)):
        assert any(row.get("ode/sharpness", 0) for row in rows)  # a graph that hides something has none


@contextmanager
def said(cls, callback, setting, all_of_it=True):
    """What is to be said is said, each of it, and nothing else; a run that is refused may not come to say it."""
    names = {"all": ("diagnostics", "difference", "flooding")}.get(callback, (callback,))
    patterns = [pattern for name in ("any", *names) for pattern in cls.warned.get(name, ())]
    twice = twice_of(cls, setting)
    if twice and "diagnostics" in names:
        patterns.append(f"ODEDiagnostics takes finite differences for the sharpness: .*({twice})")
    if twice and "auto" in names:
        patterns.append(f"takes finite differences: .*({twice})")
    if is_doubted(cls, setting) and {"diagnostics", "exact", "auto"}.intersection(names):
        patterns.append(f"Function {cls.doubted} .*taken as (its|that) backward says")
    with warnings.catch_warnings(record=True) as found:
        for pattern in patterns:
            warnings.filterwarnings("always", f"(?s).*({pattern})")
        # by default a displacement is chosen, and what kinks do to it is told again after a resume
        for pattern in (*cls.unheard, *["resolve this loss's curvature"] * (setting == "resume")):
            warnings.filterwarnings("ignore", f"(?s).*{pattern}")
        yield
    texts = [str(warning.message) for warning in found]
    missing = (
        []
        if not all_of_it
        else [pattern for pattern in patterns if not any(re.search(pattern, text) for text in texts)]
    )
    assert missing == []
