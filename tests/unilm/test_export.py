"""Exported folders in plain transformers, in a process that has never seen this package."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from clients import asked_for, run_client
from packaging.version import Version
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    pipeline,
)
from transformers.utils import logging

from lightning_plugins.unilm.backbones import FAMILIES
from lightning_plugins.unilm.export import TESTED, export_model
from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import segments_from_lengths, seq2seq_mask

TEXTS = ["a first source", "another source, which is longer than the first"]  # those of the model card
NEW = 10
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*dict.fromkeys(re.findall(r"\w+|,", " ".join(TEXTS))), *"bcdefghijklmnopqrstuvwxy"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *("##" + word for word in "abcdefgh")])}
NAMES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}


def bert_tokenizer():
    return BertTokenizer(vocab=VOCABULARY)


def bert_processing_tokenizer():
    """WordPiece with the post-processor of old tokenizer files."""
    raw = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.Sequence([processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **NAMES)


def roberta_tokenizer():
    tokens = ["<unk>", "<pad>", "<s>", "</s>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocabulary, merges=[], mask_token=AddedToken("<mask>", lstrip=True, special=True))


BYTES = {"vocab_size": 261}
CASES = {  # name: family, its tokenizer, changes of its configuration, scheme
    "bert": ("bert", bert_tokenizer, {}, "sep_as_bos"),
    "bert_none": ("bert", bert_tokenizer, {}, "none"),
    "electra": ("electra", bert_processing_tokenizer, {}, "sep_as_bos"),
    "roberta": (
        "roberta",
        roberta_tokenizer,
        {"type_vocab_size": 1, "max_position_embeddings": 80, **BYTES},
        "sep_as_bos",
    ),
    "roberta_types": ("xlm-roberta", roberta_tokenizer, {"max_position_embeddings": 80, **BYTES}, "sep_as_bos"),
    **{
        name: (name, bert_tokenizer, {}, "sep_as_bos")
        for name in ("ernie", "rembert", "roformer", "megatron-bert", "big_bird", "roberta-prelayernorm")
    },
}
WRONG = {"bert": "types", "electra": "is_decoder", "roberta": "positions"}  # what a user must not change

# Runs the model card's own code in each folder, then writes what it gave.
PLAIN = r"""
import json, os, re, sys
import torch

root, names, wrong = sys.argv[1], sys.argv[2].split(","), json.loads(sys.argv[3])
given = {}
for name in names:
    os.chdir(os.path.join(root, name))
    space = {}
    with open("README.md", encoding="utf-8") as card:
        exec(re.search(r"```python\n(.*?)```", card.read(), re.S).group(1), space)
    model, inputs, width = space["model"], dict(space["inputs"]), space["inputs"]["input_ids"].shape[1]
    given[name] = {"greedy": space["output"][:, width:].tolist(), "class": type(model).__name__}
    given[name]["beam"] = model.generate(**inputs, num_beams=4)[:, width:].tolist()
    if wrong.get(name) == "types":
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    elif wrong.get(name) == "positions":
        model = type(model).from_pretrained(".").eval()
    elif wrong.get(name) == "is_decoder":
        model = type(model).from_pretrained(".", is_decoder=True).eval()
    given[name]["wrong"] = model.generate(**inputs)[:, width:].tolist()
assert not [name for name in sys.modules if name.startswith("lightning")], "only transformers is needed"
with open(os.path.join(root, "given.json"), "w") as file:
    json.dump(given, file)

# An export that is killed at its last step.
import pathlib, signal
from lightning_plugins.unilm.export import export_model
from lightning_plugins.unilm.loading import load_unilm

os.chdir(root)
tokenizer = space["AutoTokenizer"].from_pretrained("bert")
model = load_unilm("bert", pad_token_id=1, sep_token_id=3, mask_token_id=4)
pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export_model(model, tokenizer, "killed")
"""


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No progress bars; one thread, as two of them cost more than these small models."""
    threads = torch.get_num_threads()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def build(tiny_config):
    """A model whose outputs depend on everything: large random weights."""

    def make(family, changes=None, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = tiny_config(family, **(changes or {}))
            model = load_unilm(config=config, pad_token_id=1, sep_token_id=3, mask_token_id=4, **options).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.1))
        return model

    return make


def new_tokens(model, tokenizer, **options):
    rows = tokenizer(TEXTS, padding=True, return_tensors="pt")  # padded on the right
    output = model.generate(rows["input_ids"], attention_mask=rows["attention_mask"], max_new_tokens=NEW, **options)
    return output[:, rows["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory, build):
    """A folder of exported models, what they give here and what they gave in plain transformers."""
    root = tmp_path_factory.mktemp("exported")
    for name, (family, make_tokenizer, changes, segment) in CASES.items():
        model, tokenizer = build(family, changes, segment=segment), make_tokenizer()
        assert model.exportable
        folder = export_model(model, tokenizer, root / name, generation={"max_new_tokens": NEW})
        expected = {"greedy": new_tokens(model, tokenizer), "beam": new_tokens(model, tokenizer, num_beams=4)}
        (root / f"{name}.json").write_text(json.dumps(expected))
        assert folder == root / name
    command = [sys.executable, "-W", "error", "-c", PLAIN, str(root), ",".join(CASES), json.dumps(WRONG)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert answer.returncode == -signal.SIGKILL, answer.stderr[-3000:]
    return root


def test_plain_transformers_generates_the_same_tokens(root):
    given = json.loads((root / "given.json").read_text())
    for name in CASES:
        expected = json.loads((root / f"{name}.json").read_text())
        assert given[name]["greedy"] == expected["greedy"], name
        assert given[name]["beam"] == expected["beam"], name
    for name in WRONG:  # the test would see a mistake
        assert given[name]["wrong"] != given[name]["greedy"], name
    assert given["bert"]["class"] == "BertLMHeadModel" and given["roberta"]["class"] == "RobertaForCausalLM"


def test_a_killed_export_leaves_only_a_folder_named_so(root):
    left = [path.name for path in root.iterdir() if path.name.startswith("killed")]
    assert len(left) == 1 and left[0].startswith("killed.partial-")


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_a_folder_comes_back_bit_by_bit(root, build, name):
    family, make_tokenizer, changes, segment = CASES[name]
    model = build(family, changes, segment=segment)
    weights = model.state_dict()
    for again in (
        AutoModelForMaskedLM.from_pretrained(root / name),
        load_unilm(str(root / name), pad_token_id=1, sep_token_id=3, mask_token_id=4),
    ):
        assert again.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in again.state_dict().items())
    segments = segments_from_lengths([4, 6], [3, 2])
    inputs = {
        "input_ids": torch.randint(5, 40, segments.shape),
        "attention_mask": seq2seq_mask(segments),
        "token_type_ids": model.token_types(segments),
    }
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    assert new_tokens(again, make_tokenizer()) == new_tokens(model, make_tokenizer())
    config = json.loads((root / name / "config.json").read_text())
    assert config["is_decoder"] is False and config["architectures"] == [model.backbone.stock.__name__]
    assert model.config.is_decoder is True  # as it was


def test_the_tokenizer_frames_texts_by_the_scheme(root):
    for name, (_, make_tokenizer, _, _) in CASES.items():
        before, after = make_tokenizer(), AutoTokenizer.from_pretrained(root / name)
        assert after.padding_side == "left"
        for text in (*TEXTS, "a [MASK] b [SEP] c", "a  <mask> b</s>c"):
            assert after(text)["input_ids"] == before(text)["input_ids"]
            assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
        assert after("a", "b")["input_ids"] == before("a", "b")["input_ids"]
    bert = AutoTokenizer.from_pretrained(root / "bert")
    assert bert(["a", "a first"], padding=True)["token_type_ids"] == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert bert.model_max_length == 40
    assert bert("a", "first")["token_type_ids"] == [0, 0, 0, 0, 1]
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(root / "bert_none")("a")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(root / "roberta")("a")
    assert AutoTokenizer.from_pretrained(root / "roberta_types")("a", "b")["token_type_ids"] == [0, 0, 0, 0, 0, 1]


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def run_card(folder, monkeypatch):
    monkeypatch.chdir(folder)
    space = {}
    exec(re.search(r"```python\n(.*?)```", card_of(folder), re.S).group(1), space)
    return space["output"][:, space["inputs"]["input_ids"].shape[1] :].tolist()


NOT_PLAIN = {  # family, scheme, decoding: why not, as the card says it
    ("distilbert", "sep_as_bos", "next_token"): "no class that generates with `distilbert`",
    ("albert", "sep_as_bos", "next_token"): "no class that generates with `albert`",
    ("mpnet", "sep_as_bos", "next_token"): "no class that generates with `mpnet`",
    ("modernbert", "sep_as_bos", "next_token"): "no class that generates with `modernbert`",
    ("bert", "su", "next_token"): r"token types \(`su`\)",
    ("bert", "unilm_v1", "next_token"): r"token types \(`unilm_v1`\)",
    ("bert", "sep_as_bos", "mask"): r"filling a \[MASK\]",
}


def test_what_plain_generate_cannot_do_is_said_and_done_here(build, tmp_path, monkeypatch):
    for number, ((family, segment, decoding), why) in enumerate(NOT_PLAIN.items()):
        model = build(family, segment=segment, decoding=decoding)
        expected = nullcontext()
        if family == "bert":
            told = f"segment='{segment}' and decoding='{decoding}'.* refuses the folder"
            expected = pytest.warns(UserWarning, match=told)
        with expected:
            folder = export_model(model, bert_tokenizer(), tmp_path / str(number), generation={"max_new_tokens": NEW})
        assert re.search(why, card_of(folder)) and "needs the package `lightning_plugins`" in card_of(folder)
        assert run_card(folder, monkeypatch) == new_tokens(model, bert_tokenizer()), family
        with pytest.raises(ValueError, match=r"none in plain transformers: load this|Unrecognized configuration class"):
            AutoModelForCausalLM.from_pretrained(folder)
        ids = {"pad_token_id": 1, "sep_token_id": 3, "mask_token_id": 4}
        again = load_unilm(str(folder), segment=segment, decoding=decoding, **ids)
        assert again.generation_config.max_new_tokens == NEW and again.generation_config.cache_implementation is None
        again = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def test_an_interrupted_export_leaves_nothing(build, tmp_path, monkeypatch):
    model, folder = build("bert"), tmp_path / "some" / "model"
    for place, error in ((Path, KeyboardInterrupt), (PreTrainedTokenizerFast, OSError)):

        def fail(*_, error=error, **__):
            raise error("now")

        with monkeypatch.context() as patch, pytest.raises(error, match="now"):
            patch.setattr(place, "rename" if place is Path else "save_pretrained", fail)
            export_model(model, bert_tokenizer(), folder)
        assert list(folder.parent.iterdir()) == []
    folder.mkdir()
    export_model(model, bert_tokenizer(), folder)  # an empty folder is filled
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    with pytest.raises(FileExistsError, match="model exists and is not empty: export to a new folder"):
        export_model(model, bert_tokenizer(), folder)
    with pytest.raises(FileExistsError, match=r"README.md exists"):
        export_model(model, bert_tokenizer(), folder / "README.md")


def test_gathered_weights_are_written_and_sharded_ones_refused(root, build, tmp_path):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    model = fully_shard(build("bert"), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="sharded over processes: give state_dict"):
        export_model(model, bert_tokenizer(), tmp_path / "sharded")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    weights = {name: tensor.clone() for name, tensor in weights.items()}  # no storage is shared
    folder = export_model(
        model, bert_tokenizer(), tmp_path / "sharded", state_dict=weights, generation={"max_new_tokens": NEW}
    )
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"):
        assert (folder / name).read_bytes() == (root / "bert" / name).read_bytes(), name
    assert len(weights) == len(model.state_dict())  # the caller's dict is not changed
    with pytest.raises(ValueError, match=r"state_dict is not this model's: \d+ names differ, such as 'bert.emb"):
        export_model(
            model, bert_tokenizer(), tmp_path / "other", state_dict={f"net.{k}": v for k, v in weights.items()}
        )


def test_weights_that_are_no_longer_tied_stay_apart(build, tmp_path):
    model = build("bert")
    decoder = model.get_output_embeddings()
    decoder.weight = torch.nn.Parameter(decoder.weight.detach() + 1)
    weights = load_file(export_model(model, bert_tokenizer(), tmp_path / "model") / "model.safetensors")
    assert torch.equal(weights["cls.predictions.decoder.weight"], decoder.weight)


def test_the_card_and_the_generation_settings(build, tmp_path):
    model = build("bert")
    (tmp_path / "private").mkdir()
    folder = export_model(
        model,
        bert_tokenizer(),
        tmp_path / "one",
        metrics={"val/rougeL": 0.31234567, "val/rouge1": 0.4, "test/bleu": 0.05},
        generation={"num_beams": 4, "no_repeat_ngram_size": 3, "use_cache": False, "cache_implementation": "static"},
        training={"data": "a|b", "lr": 5e-5},
        name=str(tmp_path / "private"),
    )
    card = card_of(folder)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "other",
        "tags": ["unilm", "seq2seq"],
        "metrics": ["rouge", "bleu"],
    }
    assert "| val/rougeL | 0.3123 |\n| val/rouge1 | 0.4 |\n| test/bleu | 0.05 |" in card
    assert "| data | a\\|b |\n| lr | 5e-05 |" in card
    assert "started from private." in card and str(tmp_path) not in card
    settings = json.loads((folder / "generation_config.json").read_text())
    settings.pop("transformers_version")
    new = {"max_new_tokens": 20, "eos_token_id": 3, "pad_token_id": 1, "do_sample": False}  # half of the 40 positions
    assert settings == {"num_beams": 4, "no_repeat_ngram_size": 3, **new}
    model.generation_config.update(repetition_penalty=2.0, max_new_tokens=7)  # as a checkpoint's own file may do
    folder = export_model(
        model, bert_tokenizer(), tmp_path / "two", generation={"max_new_tokens": 9}, name="google/bert"
    )
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (settings["repetition_penalty"], settings["max_new_tokens"]) == (2.0, 9)
    card = card_of(folder)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "google/bert"
    assert "## Results" not in card and "## Training" not in card and "metrics:" not in card


def test_what_cannot_be_exported_is_said(build, tmp_path):
    model = build("bert")
    for tokenizer, words in (
        (ByT5Tokenizer(), "ByT5Tokenizer is not a fast tokenizer"),
        (roberta_tokenizer(), "The tokenizer knows token 260, the model only 48 tokens"),
        (BertTokenizer(vocab={**VOCABULARY, "[CLS]": 3, "[SEP]": 2}), "does not end a text with the model's"),
    ):
        with pytest.raises(ValueError, match=words):
            export_model(model, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="max_new_tokens=40, which leaves no room for a source in the model's 40"):
        export_model(model, bert_tokenizer(), tmp_path / "model", generation={"max_new_tokens": 40})
    assert list(tmp_path.iterdir()) == []


def test_every_family_with_a_class_that_generates_is_tried_here(tiny_config):
    from transformers import AutoConfig

    from lightning_plugins.unilm.backbones import find_backbone

    own = {f for f in FAMILIES if find_backbone(AutoConfig.for_model(f)).cache == "own"}
    same_code = {"camembert", "data2vec-text", "xlm-roberta-xl"}  # as RoBERTa's
    assert own - same_code == {case[0] for case in CASES.values()}


def test_a_pipeline_samples_only_where_the_user_does(root, build, tmp_path):
    """The one pipeline that could be meant, where scheme and family leave out nothing that it does not pass on."""
    writes = pipeline("text-generation", model=str(root / "bert_none"), device="cpu")
    expected = json.loads((root / "bert_none.json").read_text())["greedy"]
    for text, tokens in zip(TEXTS, expected, strict=True):
        ids = writes(text, return_tensors=True)[0]["generated_token_ids"]
        new = list(ids)[len(writes.tokenizer(text)["input_ids"]) :]
        assert new == tokens[: len(new)] and set(tokens[len(new) :]) <= {1}
    with pytest.raises(KeyError, match="Unknown task other"):  # what the card's header names is no pipeline
        pipeline("other", model=str(root / "bert"))
    sampled = {"do_sample": True, "top_p": 0.9, "max_new_tokens": NEW}
    folder = export_model(build("bert"), bert_tokenizer(), tmp_path / "sampled", generation=sampled)
    assert json.loads((folder / "generation_config.json").read_text()).items() > sampled.items()


def test_the_card_names_the_versions_that_were_run(root):
    """A newer transformers than the newest named: run make test-clients with it, then name it in TESTED."""
    assert f"tested with {', '.join(TESTED[:-1])} and {TESTED[-1]};" in card_of(root / "bert")
    assert sorted(TESTED, key=Version) == list(TESTED)
    assert Version(TESTED[0]) < Version(transformers.__version__) <= Version(TESTED[-1])


def test_earlier_versions_read_the_tokenizers_file(root, build, tmp_path):
    tokenizer = bert_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["b", "c"]})
    folder = export_model(build("bert"), tokenizer, tmp_path / "extra")
    again = AutoTokenizer.from_pretrained(folder)
    assert again.extra_special_tokens == ["b", "c"] and again("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    for path in (root / "roberta", folder):
        settings = json.loads((path / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    assert settings["additional_special_tokens"] == ["b", "c"]


# Runs each card's code, or shows that nothing loads the folder in silence; prints what came of each.
CLIENT = r"""
import contextlib, io, json, os, re, sys
import transformers
from transformers import AutoModelForCausalLM, pipeline

root, version = sys.argv[1:]
assert transformers.__version__ == version, transformers.__file__
given = {}
for name in sorted(os.listdir(root)):
    os.chdir(os.path.join(root, name))
    code, space = re.search(r"```python\n(.*?)```", open("README.md", encoding="utf-8").read(), re.S).group(1), {}
    if "lightning_plugins" in code:
        try:
            AutoModelForCausalLM.from_pretrained(".")
        except ValueError as error:
            given[name] = str(error)
        continue
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, space)
    width = space["inputs"]["input_ids"].shape[1]
    given[name] = [space["output"][:, width:].tolist()]
    given[name].append(space["model"].generate(**space["inputs"], num_beams=4)[:, width:].tolist())
    try:
        pipeline("other", model=".")  # what the card's header names
    except KeyError:
        given[name].append("no pipeline")
print(json.dumps(given))
"""


@asked_for
@pytest.mark.slow
@pytest.mark.parametrize("version", TESTED)
def test_the_versions_named_write_the_same_tokens(build, tmp_path, version):
    expected, folders = {}, tmp_path / "folders"
    for name, (family, make_tokenizer, changes, segment) in CASES.items():
        model, tokenizer = build(family, changes, segment=segment), make_tokenizer()
        export_model(model, tokenizer, folders / name, generation={"max_new_tokens": NEW})
        expected[name] = [new_tokens(model, tokenizer), new_tokens(model, tokenizer, num_beams=4), "no pipeline"]
    for options in ({"segment": "su"}, {"segment": "unilm_v1"}, {"decoding": "mask"}):
        (name,) = options.values()
        with pytest.warns(UserWarning, match="AutoModelForCausalLM refuses the folder"):
            export_model(build("bert", **options), bert_tokenizer(), folders / name)
    export_model(build("distilbert"), bert_tokenizer(), folders / "distilbert")
    answer = run_client(tmp_path / "packages", [f"transformers=={version}"], CLIENT, folders, version)
    given = json.loads(answer)
    assert "Unrecognized configuration class" in given.pop("distilbert")
    for name in ("su", "unilm_v1", "mask"):
        assert "none in plain transformers: load this folder with lightning_plugins" in given.pop(name)
    assert given == expected
