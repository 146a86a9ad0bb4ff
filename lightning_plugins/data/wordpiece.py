"""A WordPiece tokenizer trained from the data, for models that start from nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_plugins.core import arguments as must

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_wordpiece(texts: Sequence[str], vocab_size: int = 8000, lowercase: bool = False) -> "BertTokenizer":
    """Learn the word pieces of a text, for a tokenizer that splits it as BERT's does.

    The ids 0 to 4 are ``[PAD] [UNK] [CLS] [SEP] [MASK]``; every Chinese character is a token of its own; a text is
    encoded as ``[CLS] text [SEP]``. The same texts give the same tokenizer, in every process.

    Args:
        texts: texts to learn from, which are read twice.
        vocab_size: most tokens; a small text has fewer.
        lowercase: whether to fold upper case and strip accents, as "uncased" models do.

    Returns:
        ``transformers.BertTokenizer``; what it saves needs nothing of this package.

    Raises:
        ValueError: no texts; or ``vocab_size`` has no room for the special tokens and the single characters.

    Source: Schuster and Nakajima 2012; learnt as the library ``tokenizers`` does, by pair frequency as in BPE.

    Example:
        >>> tokenizer = train_wordpiece(["to be or not to be"], vocab_size=100)
        >>> tokenizer.convert_ids_to_tokens(tokenizer("be not")["input_ids"])
        ['[CLS]', 'be', 'not', '[SEP]']
    """
    must.check(locals(), texts=must.each(must.text, of="a list of texts"), vocab_size=must.count, lowercase=must.flag)
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertTokenizer

    backend = BertTokenizer(do_lower_case=lowercase).backend_tokenizer  # splits as the finished one will
    # Characters go before all else, in order: left to itself the library numbers them by a hash that each process
    # draws anew, and breaks ties between pairs by these numbers.
    first = [*SPECIAL_TOKENS, *_characters(backend, texts)]
    if vocab_size < len(first):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the special tokens and single characters of the text are already "
            f"{len(first)}."
        )
    learner = Tokenizer(WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=learner.get_vocab(), do_lower_case=lowercase)


def _characters(backend: "Tokenizer", texts: Sequence[str]) -> list[str]:
    """The characters that begin a word, then those that go on with one (``##c``), each sorted."""
    begin, inside = set(), set()
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            begin.add(word[0])
            inside.update(word[1:])
    return sorted(begin | inside) + [f"##{character}" for character in sorted(inside)]
