"""The tokenizer that is learnt from the data."""

from collections import Counter
from itertools import pairwise

import pytest

from lightning_plugins.core.pretrained import pack_tokenizer, unpack_tokenizer
from lightning_plugins.data.wordpiece import SPECIAL_TOKENS, train_wordpiece

TEXTS = [
    "She sells sea shells by the sea shore, the shells she sells are sea shells for sure.",
    "Peter Piper picked a peck of pickled peppers; a peck of pickled peppers Peter Piper picked.",
    "How much wood would a woodchuck chuck if a woodchuck could chuck wood?",
    "基于惩罚误差矩阵的节能方法, a method",
]


def test_special_tokens_and_frame():
    tokenizer = train_wordpiece(TEXTS, 200)
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    assert tuple(getattr(tokenizer, name) for name in names) == SPECIAL_TOKENS
    encoded = tokenizer("sea", "shore")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["[CLS]", "sea", "[SEP]", "shore", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("Ж [MASK]")["input_ids"]) == ["[CLS]", "[UNK]", "[MASK]", "[SEP]"]


def test_the_same_texts_give_the_same_tokenizer():
    """The library numbers characters by a hash that every training draws anew, unless they are given to it."""
    first, *others = (train_wordpiece(TEXTS, 120).get_vocab() for _ in range(4))
    assert all(first == other for other in others)
    assert sorted(first.values()) == list(range(120))


def naive_vocabulary(words, vocab_size):
    """WordPiece learnt by the book: merge the most frequent pair, the one with the lowest ids among equals."""
    characters = sorted({c for word in words for c in word})
    vocabulary = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in sorted({c for word in words for c in word[1:]}))]
    split = {word: [word[0], *(f"##{c}" for c in word[1:])] for word in words}
    while len(vocabulary) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(split[word]):
                pairs[pair] += count
        rank = {token: n for n, token in enumerate(vocabulary)}
        best = min(pairs, key=lambda pair: (-pairs[pair], rank[pair[0]], rank[pair[1]]))
        merged = best[0] + best[1].removeprefix("##")
        vocabulary.append(merged)
        for word, parts in split.items():
            n = 0
            while n < len(parts) - 1:
                if (parts[n], parts[n + 1]) == best:
                    split[word] = parts = [*parts[:n], merged, *parts[n + 2 :]]
                n += 1
    return vocabulary


def test_vocabulary_is_the_one_learnt_by_the_book():
    text = "low lower lowest newer newest wider widest new wide slow slower slowest low low"
    words = Counter(text.split())
    tokenizer = train_wordpiece([text], 36)
    assert tokenizer.convert_ids_to_tokens(range(36)) == naive_vocabulary(words, 36)


def test_chinese_characters_are_single_tokens():
    tokenizer = train_wordpiece([*TEXTS, "误差误差误差 误差误差"], 200)
    assert tokenizer.tokenize("误差矩阵 a") == ["误", "差", "矩", "阵", "a"]
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and "误" in token]


def test_lowercase_is_an_option():
    kept, folded = (train_wordpiece(["Élan ELAN élan elan Peter"], 60, lowercase) for lowercase in (False, True))
    assert kept.tokenize("Élan") == ["Élan"] or kept.tokenize("Élan")[0].startswith("É")
    assert folded.tokenize("Élan ELAN") == ["elan", "elan"]
    assert folded.tokenize("PETER") == folded.tokenize("peter") != [folded.unk_token]


def test_survives_files():
    tokenizer = train_wordpiece(TEXTS, 200, lowercase=True)
    again = unpack_tokenizer(pack_tokenizer(tokenizer))
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in (*TEXTS, "Unknown Ж"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError) as error:
        train_wordpiece(["abc"], 9)
    assert str(error.value) == (
        "vocab_size=9 is too small: the special tokens and single characters of the text are already 10."
    )
    assert len(train_wordpiece(["abc"], 10)) == 10
