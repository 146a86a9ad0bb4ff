"""UniLMSeq2Seq in the trainer's hands: callbacks for gradients and averages of weights, devices, foreign files."""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import trainers
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import letter_pairs

from lightning_plugins import Flooding, GradientPenalty, ODEDiagnostics, Seq2SeqData, UniLMSeq2Seq

LR, LEVEL, C = 0.05, 4.1, 0.02
CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


class Recording(UniLMSeq2Seq):
    """Remembers its batches, and the gradients that each of its steps takes."""

    def on_train_batch_start(self, batch, batch_idx):
        self.__dict__.setdefault("batches", []).append(batch)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.__dict__.setdefault("gradients", []).append(flat(param.grad for param in self.parameters()))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR)


@pytest.fixture(scope="session")
def data():
    """20 pairs of letters, of unlike lengths, and 4 for validation; their tokenizer is learnt."""
    sizes = {"vocab_size": 40, "max_source_length": 12, "max_target_length": 12, "batch_size": 5}
    return lambda: Seq2SeqData(pairs=letter_pairs(24), val_size=4, length_grouping=False, **sizes)


@pytest.fixture(scope="session")
def tokenizer(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    data().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def module(tokenizer):
    def build(kind=Recording, **arguments):
        torch.manual_seed(3)
        defaults = {"config": CONFIG, "tokenizer": tokenizer, "optimizer": sgd, "attn_implementation": "eager"}
        return kind(**(defaults | {"generation": {"max_new_tokens": 4}} | arguments))

    return build


fit = partial(trainers.fit, num_sanity_val_steps=0, log_every_n_steps=1)


def written(model, batches, flooding, penalty):
    """The gradients of each step by autograd, and the signs that occurred."""
    params, gradients, signs = list(model.parameters()), [], []
    for batch in batches:
        loss = model.loss(batch)["nll"]
        first = torch.autograd.grad(loss, params, create_graph=True)
        objective = (loss - LEVEL).abs() + LEVEL if flooding else loss
        if penalty:
            objective = objective + C * sum(part.square().sum() for part in first)
        gradients.append(torch.autograd.grad(objective, params))
        signs.append(loss.item() < LEVEL)
        with torch.no_grad():
            torch._foreach_add_(params, gradients[-1], alpha=-LR)
    return [flat(gradient) for gradient in gradients], signs


@pytest.mark.parametrize(("flooding", "engine"), [(True, None), (False, "exact"), (True, "finite_difference")], ids=str)
def test_flooding_and_penalty_are_the_written_objective(module, data, flooding, engine):
    """``|L - b| + b + c |grad L|^2`` with L over the targets' tokens, generation in validation included."""
    model = module()
    model.network  # noqa: B018
    reference = copy.deepcopy(model).double()
    callbacks = [Flooding(LEVEL)] if flooding else []
    callbacks += [GradientPenalty(C, engine=engine, difference="central", relative_step=1e-6)] if engine else []
    trainer = fit(model, data(), *callbacks, precision="64-true")
    assert "val/rougeL" in trainer.callback_metrics
    expected, signs = written(reference, model.batches, flooding, engine is not None)
    assert not flooding or {True, False} == set(signs)
    tolerance = 1e-6 if engine == "finite_difference" else 1e-12
    for found, right in zip(model.gradients, expected, strict=True):
        assert (found - right).norm() < tolerance * right.norm()


def test_diagnostics_see_the_curvature_along_the_step(module, data):
    model = module()
    model.network  # noqa: B018
    reference = copy.deepcopy(model).double()
    diagnostics = ODEDiagnostics(every_n_steps=1)
    fit(model, data(), diagnostics, precision="64-true")
    params, batch = list(reference.parameters()), model.batches[0]
    loss = reference.loss(batch)["nll"]
    gradient = torch.autograd.grad(loss, params)
    with torch.no_grad():
        torch._foreach_add_(params, gradient, alpha=-LR)
    moved = reference.loss(batch)["nll"]
    change = flat(torch.autograd.grad(moved, params)) - flat(gradient)
    row = diagnostics.history[0]
    assert row["ode/actual_dloss"] == pytest.approx((moved - loss).item(), rel=1e-9)
    # Euler's edge lies at h * curvature = 2, and the move is -h times the gradient
    curvature = -(change @ flat(gradient)) / (LR * flat(gradient).square().sum())
    assert row["ode/edge_ratio_step"] == pytest.approx(LR * curvature.item() / 2, rel=1e-9)


@pytest.mark.parametrize("callback", [lambda: Flooding(LEVEL), lambda: GradientPenalty(C), ODEDiagnostics])
def test_callbacks_that_cannot_see_the_weights_of_accumulated_batches_are_refused(module, data, callback):
    with pytest.raises(MisconfigurationException, match="weighs accumulated batches by their tokens: set accumulate"):
        fit(module(), data(), callback(), accumulate_grad_batches=2)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_an_average_of_weights_is_one(module, data):
    model = module(tokenizer=None)
    states = []

    class Watched(EMAWeightAveraging):
        def on_train_batch_end(self, trainer, pl_module, *args):
            states.append(flat(param.detach().clone() for param in pl_module.parameters()))
            super().on_train_batch_end(trainer, pl_module, *args)

    fit(model, data(), Watched(decay=0.5), limit_val_batches=0)
    average = states[0]
    for state in states[1:]:
        average = (average + state) / 2
    torch.testing.assert_close(flat(model.parameters()), average, rtol=0, atol=1e-6)
    assert len(model.generate_text(["a b"])) == 1


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging_needs_the_network_first(module, data):
    swa = {"swa_lrs": LR, "swa_epoch_start": 1}
    with pytest.raises(MisconfigurationException, match=r"would average nothing: touch module\.network before fit"):
        fit(module(), data(), StochasticWeightAveraging(**swa))
    model = module()
    model.network  # noqa: B018
    callback = StochasticWeightAveraging(**swa)
    fit(model, data(), callback, max_epochs=3, limit_val_batches=0)
    assert len(list(callback._average_model.parameters())) == len(list(model.parameters())) > 0


def test_validation_before_training_leaves_nothing_behind(module, data):
    """Its inference mode makes tensors that training must not meet."""
    model, datamodule = module(tokenizer=None), data()
    trainer = trainers.quiet_trainer(max_epochs=1)
    (before,) = trainer.validate(model, datamodule, verbose=False)
    trainer.fit(model, datamodule)
    fresh = module(tokenizer=None)
    other = fit(fresh, data(), num_sanity_val_steps=2)
    assert before["val/loss"] != trainer.callback_metrics["val/loss"]
    assert trainer.callback_metrics["val/loss"] == other.callback_metrics["val/loss"]


def test_the_network_begins_on_cpu_whatever_the_trainers_device(module, data, tmp_path, monkeypatch):
    """Lightning makes new tensors on its device, where the leak probe and the split of the data have no generator."""

    @contextmanager
    def other_device(strategy, empty_init=None):
        with torch.device("meta"):
            yield

    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", other_device)
    learnt = module(tokenizer=None)
    trainers.quiet_trainer().validate(learnt, data(), verbose=False)
    learnt.export(tmp_path / "pretrained")
    pretrained = UniLMSeq2Seq(str(tmp_path / "pretrained"), max_positions=50, generation={"max_new_tokens": 4})
    (result,) = trainers.quiet_trainer().validate(pretrained, data(), verbose=False)
    assert result["val/loss"] > 0
    for model in (learnt, pretrained):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_a_network_that_is_built_late_is_where_its_module_is(module):
    model = module().eval().to("meta")
    assert model.network.device.type == "meta"
    assert not model.network.training


def test_mistakes_are_told_in_a_sentence(module, data):
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = trainers.fit(BoringModel(), [torch.zeros(1, 32)], max_steps=1, limit_val_batches=0)
    trainer.save_checkpoint("other.ckpt")
    with pytest.raises(ValueError, match="describes no network of UniLMSeq2Seq: it is another module's"):
        trainer.validate(module(), data(), ckpt_path="other.ckpt", verbose=False)
    with pytest.raises(ValueError, match="max_positions extends a pretrained model: write max_position_embeddings"):
        module(max_positions=60)
    for sources in ("one text", []):
        with pytest.raises(ValueError, match=r"sources=.* must be a list of texts, at least one"):
            module().generate_text(sources)
