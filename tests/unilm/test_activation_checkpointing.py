"""UniLMSeq2Seq(activation_checkpointing=True): less is kept, and not a bit is another, in any family and any job."""

import pytest
import torch
import trainers
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from saved_activations import kept_bytes
from tiny import letter_pairs

from lightning_plugins import GradientPenalty, ODEDiagnostics, Seq2SeqData, UniLMSeq2Seq
from lightning_plugins.core.activation_checkpointing import checkpoint_activations
from lightning_plugins.unilm.backbones import FAMILIES
from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import segments_from_lengths, seq2seq_mask

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

REFUSED = {  # families whose classes in transformers keep all activations
    "albert": "AlbertForMaskedLM",
    "mpnet": "MPNetForMaskedLM",
    "squeezebert": "SqueezeBertForMaskedLM",
    "ibert": "IBertForMaskedLM",
}
CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}  # with BERT's dropout of 0.1


def fit(model, *args, **options):
    """The network is built when this begins, and its dropout drawn in it."""
    torch.manual_seed(3)
    return trainers.fit(model, *args, **({"num_sanity_val_steps": 0, "precision": "64-true"} | options))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


@pytest.fixture(scope="module")
def data():
    sizes = {"vocab_size": 40, "max_source_length": 12, "max_target_length": 12, "batch_size": 4}
    return lambda: Seq2SeqData(pairs=letter_pairs(20), val_size=4, length_grouping=False, **sizes)


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    data().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def module(tokenizer):
    def build(kind=UniLMSeq2Seq, **arguments):
        defaults = {"config": CONFIG, "tokenizer": tokenizer, "optimizer": sgd}
        return kind(**(defaults | {"generation": {"max_new_tokens": 4}} | arguments))

    return build


def same_weights(one, other, tolerance=0.0):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen embeddings"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_less_and_has_the_same_gradients_or_is_refused(family, frozen, tiny_config):
    """In float64, in train mode with dropout: the masks of the second pass are those of the first."""
    torch.manual_seed(0)
    model = load_unilm(config=tiny_config(family), pad_token_id=1, sep_token_id=3, mask_token_id=4).double().train()
    if family in REFUSED:
        with pytest.raises(ValueError, match=rf"activation_checkpointing=True is not possible with {REFUSED[family]}"):
            checkpoint_activations(model, model.backbone.stock)
        return
    model.get_input_embeddings().requires_grad_(not frozen)
    segments = segments_from_lengths([9, 7], [6, 8])
    ids = torch.randint(5, 48, segments.shape)

    def loss():
        torch.manual_seed(5)
        inputs = dict(attention_mask=seq2seq_mask(segments), use_cache=False, logits_to_keep=segments == 2)
        return model(ids, **inputs).logits.square().sum()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected, whole = kept_bytes(loss, model.parameters())
    gradients = torch.autograd.grad(expected, trained)
    checkpoint_activations(model)
    found, kept = kept_bytes(loss, model.parameters())
    assert kept < 0.4 * whole and torch.equal(found, expected)
    for gradient, again in zip(gradients, torch.autograd.grad(found, trained), strict=True):
        assert torch.equal(gradient, again)


@pytest.mark.parametrize("objective", ["lm", "masked", "pseudo"])
def test_training_with_dropout_is_the_same_to_the_bit(module, data, objective):
    runs = [module(objective=objective, activation_checkpointing=on) for on in (False, True)]
    trained = [fit(model, data(), max_epochs=2) for model in runs]
    on = [any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) for model in runs]
    assert on == [False, True]
    same_weights(*runs)
    ours, theirs = (trainer.callback_metrics for trainer in trained)
    assert "val/rougeL" in ours and all(torch.equal(ours[key], theirs[key]) for key in ours if "tokens" not in key)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_in_lower_precisions_too(module, data, precision):
    runs = [module(activation_checkpointing=on) for on in (False, True)]
    for model in runs:
        fit(model, data(), precision=precision)
    same_weights(*runs)


class Widths(Callback):
    """How many tokens each forward call of the network is fed in validation."""

    def __init__(self):
        self.widths = []

    def on_validation_start(self, trainer, pl_module):
        def add(module, args, kwargs):
            self.widths.append((args[0] if args else kwargs["input_ids"]).shape[1])

        self.handle = pl_module.network.register_forward_pre_hook(add, with_kwargs=True)

    def on_validation_end(self, trainer, pl_module):
        self.handle.remove()


def test_validation_between_epochs_decodes_with_its_cache(module, data):
    """One token a step: transformers takes the cache away in train mode alone."""
    fed = []
    for on in (False, True):
        watch, model = Widths(), module(activation_checkpointing=on)
        fit(model, data(), watch, max_epochs=2)
        fed.append(watch.widths)
        assert model.network.training
        texts = model.generate_text(["a b c", "d"], num_beams=2)
        assert texts == model.eval().generate_text(["a b c", "d"], num_beams=2)
    assert fed[0] == fed[1] and fed[1].count(1) >= 4


def test_a_run_goes_on_from_its_checkpoint_with_or_without(module, data, tmp_path):
    """The switch is in no key and no weight: a checkpoint of the one serves the other."""
    dropless = CONFIG | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    whole = module(config=dropless)
    fit(whole, data(), max_epochs=2)
    for first, second in ((True, False), (False, True), (True, True)):
        folder = tmp_path / f"{first}{second}"
        half = module(config=dropless, activation_checkpointing=first)
        fit(half, data(), ModelCheckpoint(folder, "half"), max_epochs=1)
        assert torch.load(folder / "half.ckpt", weights_only=True)["state_dict"].keys() == whole.state_dict().keys()
        rest = module(config=dropless, activation_checkpointing=second)
        fit(rest, data(), max_epochs=2, ckpt_path=folder / "half.ckpt")
        same_weights(whole, rest)
    path = tmp_path / "TrueTrue" / "half.ckpt"
    loaded = UniLMSeq2Seq.load_from_checkpoint(path, weights_only=True, optimizer=sgd)
    assert loaded.activation_checkpointing and loaded.generate_text(["a b"])


def test_the_exported_folder_is_the_same(module, data, tmp_path):
    from transformers import AutoModelForCausalLM

    folders = []
    for on in (False, True):
        model = module(activation_checkpointing=on)
        fit(model, data())
        folders.append(model.export(tmp_path / str(on)))
    files = ("config.json", "generation_config.json", "model.safetensors")
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)
    assert not any("checkpointing" in name for name in vars(AutoModelForCausalLM.from_pretrained(folders[1]).config))


@pytest.mark.parametrize("engine", ["exact", "finite_difference"])
def test_the_gradient_penalty_is_the_same(module, data, engine):
    """Double backward through the layers that are computed again, and a second run with the first's dropout."""
    runs = [module(activation_checkpointing=on, attn_implementation="eager") for on in (False, True)]
    for model in runs:
        fit(model, data(), GradientPenalty(0.02, engine=engine))
    same_weights(*runs, tolerance=1e-12)


def test_diagnostics_see_the_same_curvature(module, data):
    logged = []
    for on in (False, True):
        model = module(activation_checkpointing=on, attn_implementation="eager")
        metrics = fit(model, data(), ODEDiagnostics(every_n_steps=1)).callback_metrics
        logged.append({name: float(value) for name, value in metrics.items() if name.startswith("ode/")})
    assert len(logged[0]) >= 3
    timed = {name for name in logged[0] if "seconds" in name or "time" in name}
    for name in logged[0].keys() - timed:
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-9, abs=1e-12), name


def test_a_family_without_it_is_refused_before_training(module, data):
    albert = CONFIG | {"model_type": "albert", "embedding_size": 16}
    with pytest.raises(ValueError, match=r"^activation_checkpointing=True is not possible with AlbertForMaskedLM, "):
        fit(module(config=albert, activation_checkpointing=True), data())
    with pytest.raises(ValueError, match="activation_checkpointing='yes' must be"):
        module(activation_checkpointing="yes")
