"""Trimmed vocabularies against the untrimmed tokenizers, resized models against themselves before, bit by bit."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)
from transformers.utils import logging

from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.surgery import extend_positions, extend_token_types, keep_rows, trim_vocabulary

LETTERS = "abcdefgh"


def words(count, seed=0):
    """Random words made of common syllables, so that pieces of several letters are worth learning."""
    draw = random.Random(seed)
    syllables = ["".join(draw.choices(LETTERS, k=draw.randint(1, 3))) for _ in range(30)]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count)]


def trained(kind):
    """A tokenizer of each algorithm, its vocabulary learned from the words."""
    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    if kind == "bpe":
        raw, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "bpe_prefix":
        raw, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer
        options = {"continuing_subword_prefix": "##"}
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "unigram":
        raw, trainer, options = Tokenizer(models.Unigram()), trainers.UnigramTrainer, {"unk_token": "<unk>"}
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
    else:
        raw, trainer, options = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer, {}
        raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
    size = 400 if kind == "bpe" else 150
    raw.train_from_iterator(
        words(2000), trainer(vocab_size=size, special_tokens=special, show_progress=False, **options)
    )
    raw.post_processor = processors.Sequence([processors.BertProcessing(("</s>", 2), ("<s>", 1))])
    names = {"cls_token": "<s>", "sep_token": "</s>"}
    names |= {f"{name}_token": f"<{name}>" for name in ("pad", "mask", "unk")}
    if kind == "wordpiece":
        return BertTokenizer(vocab=raw.get_vocab(), **names)
    if kind == "bpe":
        merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
        return RobertaTokenizer(vocab=raw.get_vocab(), merges=merges)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "bpe_prefix", "unigram"])
def test_a_trimmed_tokenizer_gives_the_same_tokens_where_they_are_kept(kind, tmp_path):
    tokenizer = trained(kind)
    tokenizer.add_tokens(["@extra"])
    before = tokenizer.get_vocab()
    texts = [" ".join(words(3, seed)) for seed in range(300)]
    covered = 0
    for seed in range(3):
        keep = {token for text in random.Random(seed).sample(texts, 12) for token in tokenizer.tokenize(text)}
        trimmed, kept_ids = trim_vocabulary(tokenizer, sorted(keep))
        kept = set(trimmed.get_vocab())
        assert keep <= kept < set(before)
        assert set(tokenizer.all_special_tokens) | {"@extra"} <= kept
        assert len(trimmed) == len(kept_ids) == len(kept)
        assert kept_ids.tolist() == [before[token] for token in trimmed.convert_ids_to_tokens(range(len(trimmed)))]
        for text in [*texts, "abc@extra", "xyz<mask>abc", "a\u4e2db"]:
            old, new = tokenizer(text)["input_ids"], trimmed(text)["input_ids"]
            if kept.issuperset(tokenizer.convert_ids_to_tokens(old)):
                covered += 1
                assert kept_ids[new].tolist() == old
            elif kind == "bpe":  # nothing is lost: every byte is a token
                assert trimmed.decode(new, skip_special_tokens=True) == text.replace("<mask>", "")
            else:
                assert trimmed.convert_ids_to_tokens(new)[0] == tokenizer.convert_ids_to_tokens(old)[0] == "<s>"
    assert 100 <= covered < 800
    trimmed.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == trimmed.get_vocab()
    assert again(texts, texts)["input_ids"] == trimmed(texts, texts)["input_ids"]
    assert tokenizer.get_vocab() == before


def test_unigram_keeps_the_price_of_the_unknown_token():
    """Without its least likely piece the unknown token is cheaper, and X + bcdef would win over Xb + c + d + e + f."""
    pieces = [("<unk>", 0.0), ("z", -100.0), ("bcdef", -3.0), ("Xb", -3.0), *((letter, -12.0) for letter in "cdef")]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    keep = [piece for piece, _ in pieces if piece not in ("<unk>", "z")]
    trimmed, _ = trim_vocabulary(tokenizer, keep)
    assert tokenizer.tokenize("Xbcdef") == trimmed.tokenize("Xbcdef") == ["Xb", "c", "d", "e", "f"]
    assert trimmed.tokenize("Q") == tokenizer.tokenize("Q")


def test_what_cannot_be_trimmed_is_said():
    tokenizer = trained("wordpiece")
    with pytest.raises(ValueError, match="keep is 'abc': give a list"):
        trim_vocabulary(tokenizer, "abc")
    with pytest.raises(ValueError, match=r"keep is \[\]: give a list"):
        trim_vocabulary(tokenizer, [])
    with pytest.raises(ValueError, match=r"keep names 2 tokens .* such as \['nowhere', 'Q'\]"):
        trim_vocabulary(tokenizer, ["a", "nowhere", "Q"])
    words_only = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ValueError, match="A WordLevel tokenizer cannot be trimmed"):
        trim_vocabulary(words_only, ["b"])
    with pytest.raises(ValueError, match="ByT5Tokenizer is not a fast tokenizer"):
        trim_vocabulary(ByT5Tokenizer(), ["a"])


SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
MORE = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "roformer": {"embedding_size": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "nomic_bert": {"head_dim": 8},
}
CAUSAL = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "megatron-bert", "rembert", "roformer"]
MASKED = ["bert", "roberta", "distilbert", "albert", "modernbert", "mpnet", "nomic_bert", "roberta-prelayernorm"]
WITHOUT_TYPES = ["distilbert", "modernbert", "mpnet"]


def build(family, auto, **arguments):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(family, **SIZES, **MORE.get(family, {}), **arguments)).eval()


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No progress bars; one thread, as two of them cost more than these small models."""
    threads = torch.get_num_threads()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(threads)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForMaskedLM])
def test_surgery_changes_no_bit_of_what_stays(auto, tmp_path):
    ids = torch.randint(5, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    kept_ids = torch.cat([torch.arange(50), torch.tensor([99])])
    for family in CAUSAL if auto is AutoModelForCausalLM else MASKED:
        model = build(family, auto)
        before, names = logits(model, ids), {name for name, _ in model.named_parameters()}
        offset = 2 if any(kind in family for kind in ("roberta", "mpnet", "camembert")) else 0
        extend_positions(model, 60)
        assert model.config.max_position_embeddings == 60 + offset
        if family not in WITHOUT_TYPES:
            extend_token_types(model)
            assert model.config.type_vocab_size == 6
        assert torch.equal(logits(model, ids), before), family
        keep_rows(model, kept_ids)
        assert torch.equal(logits(model, ids), before[..., kept_ids]), family
        assert {name for name, _ in model.named_parameters()} == names  # what was tied is tied
        assert model.config.vocab_size == model.get_output_embeddings().out_features == 51
        assert sum(100 in parameter.shape for parameter in model.parameters()) == 0, family
        folder = tmp_path / family
        model.save_pretrained(folder)
        again = auto.from_pretrained(folder).eval()
        long = ids.repeat(1, 2)
        assert torch.equal(logits(again, ids), before[..., kept_ids]), family
        assert torch.equal(logits(again, long), logits(model, long)), family
        model.base_model.get_input_embeddings()(torch.tensor([50])).sum().backward()


def test_new_positions_repeat_the_old_and_new_types_start_as_unilm_has_them():
    for family, offset in (("bert", 0), ("roberta", 2), ("mpnet", 2)):
        model = build(family, AutoModelForMaskedLM)
        extend_positions(model, 40 - offset)  # what it has
        extend_positions(model, 90)
        table = model.base_model.embeddings.position_embeddings.weight
        n = 40 - offset
        assert table.shape == (90 + offset, 32)
        assert torch.equal(table[offset + n : offset + 2 * n], table[offset : offset + n])
        assert torch.equal(table[offset + 2 * n :], table[offset : offset + 90 - 2 * n])
    model = build("roformer", AutoModelForMaskedLM)
    extend_positions(model, 60)
    positions = torch.arange(60)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    expected = torch.cat([positions.sin(), positions.cos()], dim=1)
    torch.testing.assert_close(model.roformer.encoder.embed_positions.weight, expected)
    for types in (1, 2):
        model = build("bert", AutoModelForMaskedLM, type_vocab_size=types)
        extend_token_types(model)
        table = model.bert.embeddings.token_type_embeddings.weight
        assert table.shape == (6, 32) and table.requires_grad
        starts = [0, types - 1, 0, 0, 0, types - 1]
        assert torch.equal(table, table[starts])


def test_special_ids_follow_their_tokens():
    model = build("roberta", AutoModelForCausalLM, bos_token_id=4, eos_token_id=[7, 30, 31])
    model.generation_config.update(eos_token_id=7, bos_token_id=30)
    keep_rows(model, torch.tensor([1, 4, 7, 31]))
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, [2, 3])
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (2, None)
    assert model.get_input_embeddings().padding_idx == 0


def test_a_model_of_ours_is_trimmed_with_its_settings(tiny_config):
    config = tiny_config("bert")
    model = load_unilm(config=config, pad_token_id=1, sep_token_id=3, mask_token_id=4)
    with pytest.raises(ValueError, match=r"leaves out \{'sep_token_id': 3\} of the model's settings"):
        keep_rows(model, torch.tensor([1, 4]))
    model.train()
    keep_rows(model, torch.tensor([1, 3, 4, 40]))
    settings, defaults = model.settings, model.generation_config
    assert (settings.pad_token_id, settings.sep_token_id, settings.mask_token_id) == (0, 1, 2)
    assert (defaults.pad_token_id, defaults.eos_token_id) == (0, 1)
    extend_positions(model, 60)
    assert model.max_length == 60
    assert model.generate(torch.tensor([[3, 1]]), max_new_tokens=55).shape[1] <= 57
    without = load_unilm(config=config, pad_token_id=1, sep_token_id=3, mask_token_id=None)
    keep_rows(without, torch.tensor([1, 3]))
    assert without.settings.mask_token_id is None


def test_what_cannot_be_resized_is_said():
    model = build("bert", AutoModelForMaskedLM)
    with pytest.raises(ValueError, match="max_positions is 39, fewer than the 40 that BertForMaskedLM has"):
        extend_positions(model, 39)
    with pytest.raises(ValueError, match="kept_ids leaves out 1, the padding token"):
        keep_rows(model, torch.tensor([0, 2]))
    for wrong in ([], [1, 1], [1, 100], [-1, 1]):
        with pytest.raises(ValueError, match="kept_ids must be distinct ids from 0 to 99"):
            keep_rows(model, torch.tensor(wrong, dtype=torch.long))
    for family in WITHOUT_TYPES:
        with pytest.raises(ValueError, match="has no table of token types"):
            extend_token_types(build(family, AutoModelForMaskedLM))
    with pytest.raises(ValueError, match="positions of IBertForMaskedLM cannot be extended"):
        extend_positions(build("ibert", AutoModelForMaskedLM), 60)
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    scaled = build("nomic_bert", AutoModelForMaskedLM, rope_parameters=rope)
    with pytest.raises(ValueError, match="rotary positions of NomicBertForMaskedLM are scaled"):
        extend_positions(scaled, 60)
    with pytest.raises(ValueError, match="IBertForMaskedLM keeps its words in QuantEmbedding"):
        keep_rows(build("ibert", AutoModelForMaskedLM), torch.arange(50))
