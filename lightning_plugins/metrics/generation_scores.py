"""ROUGE, BLEU, chrF and exact match of generated text, in English as published and in Chinese by characters."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, tensor
from torchmetrics import MetricCollection
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore

from lightning_plugins.core import arguments as must
from lightning_plugins.core.merging import Merging

# Han, kana, their punctuation and full-width forms; not Hangul, which is written with spaces.
_CJK = re.compile(
    "([\u2e80-\u312f\u31a0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U000323af])"
)
_WORD = re.compile(r"[^\W_]+")
_CHRF_ORDER, _CHRF_BETA = 6, 2


class GenerationScores(MetricCollection):
    r"""ROUGE-1, ROUGE-2, ROUGE-L, BLEU, chrF and exact match of predictions with one reference each, all in [0, 1].

    Pairs are compared one by one: this is not the protocol of qgevalcap (PTB tokens; all questions of a sentence are
    its references), whose figures lie several points higher. Chinese and Japanese characters are words of their own,
    with or without spaces between them; nothing else is changed, so that English scores are the published ones.

    - ``rouge1``, ``rouge2``, ``rougeL``: F-measure, mean over pairs, of lower-cased runs of letters and digits, without
      a stemmer. As the package rouge-score, except that letters beyond a-z count.
    - ``bleu``: corpus BLEU-4 of SacreBLEU's tokens 13a, without smoothing: 0 if no four words in a row are right.
    - ``chrf``: corpus chrF2 of SacreBLEU: character n-grams up to 6 without spaces, recall counts twice:

      .. math:: \mathrm{chrF} = \frac{(1 + \beta^2) \, P R}{\beta^2 P + R}, \quad \beta = 2,

      with the precision P and the recall R averaged over the orders that both sides have; where a reference is
      shorter than an order, the prediction's n-grams of that order do not count.
    - ``exact_match``: share of predictions equal to their reference, word by word.

    A WordPiece tokenizer writes spaces around most punctuation (``file - like``), which costs BLEU and exact match:
    references of :class:`PythonDocstrings`, encoded and decoded, reach 0.93 and 0.73, and 1.0 of ROUGE and chrF.

    All are 0 before the first pair. States are sums, so that ranks may hold different numbers of pairs, or none.

    Args:
        lowercase: whether BLEU, chrF and exact match pass over upper and lower case, as models with uncased tokens need
            it.

    Example:
        >>> scores = GenerationScores()
        >>> scores.update(["the cat sat on a mat", "猫坐在垫子上"], ["the cat sat on the mat", "猫坐在垫子上"])
        >>> {name: round(score.item(), 3) for name, score in scores.compute().items()}
        {'bleu': 0.778, 'chrf': 0.716, 'exact_match': 0.5, 'rouge1': 0.917, 'rouge2': 0.8, 'rougeL': 0.917}

    Source: Lin 2004 (ROUGE); Papineni et al. 2002, Post 2018 (BLEU, SacreBLEU); Popović 2015 (chrF).
    """

    def __init__(self, lowercase: bool = False) -> None:
        must.flag("lowercase", lowercase)
        parts = {
            "rouge1": _Rouge("rouge1"),
            "rouge2": _Rouge("rouge2"),
            "rougeL": _Rouge("rougeL"),
            "bleu": _Bleu(lowercase=lowercase),
            "chrf": _ChrF(lowercase),
            "exact_match": _ExactMatch(lowercase),
        }
        super().__init__(parts, compute_groups=False)  # equal sums in the first batch do not make scores equal

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Take more pairs.

        Args:
            predictions: N generated texts; empty ones are wrong, not left out.
            references: N texts, one for each.

        Raises:
            ValueError: not as many references as predictions, or one text in place of a list.
        """
        _check_pairs(predictions, references)
        super().update(predictions, references)

    def forward(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        """Take more pairs, and say their own scores.

        Args:
            predictions: as for :meth:`update`.
            references: as for :meth:`update`.

        Raises:
            ValueError: as for :meth:`update`; what came before is kept.
        """
        _check_pairs(predictions, references)
        return super().forward(predictions, references)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    texts = must.each(must.text, of="a list of texts", empty=True)
    must.check(locals(), predictions=texts, references=texts)
    if len(predictions) != len(references):
        raise ValueError(f"Each prediction needs one reference: got {len(predictions)} and {len(references)}.")


def space_cjk(text: str) -> str:
    """The text with a space on both sides of each Chinese or Japanese character.

    >>> space_cjk("用BERT做摘要").split()
    ['用', 'BERT', '做', '摘', '要']
    """
    return _CJK.sub(r" \1 ", text)


class _Mean(Merging):
    """Mean of a score over pairs, as a sum and a count: a list of scores would hang ranks of different lengths."""

    is_differentiable, higher_is_better, full_state_update = False, True, False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


class _Rouge(_Mean):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        _check_pairs(predictions, references)
        if predictions:
            pairs = list(predictions), list(references)
            scores = rouge_score(*pairs, rouge_keys=self.key, normalizer=_lower_spaced, tokenizer=_WORD.findall)
            self.total = self.total + scores[f"{self.key}_fmeasure"].to(self.device) * len(predictions)
            self.count = self.count + len(predictions)


def _lower_spaced(text: str) -> str:
    return space_cjk(text.lower())


class _ExactMatch(_Mean):
    def __init__(self, lowercase: bool) -> None:
        super().__init__()
        self.lowercase = lowercase

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        _check_pairs(predictions, references)
        self.total = self.total + sum(
            self._words(p) == self._words(r) for p, r in zip(predictions, references, strict=True)
        )
        self.count = self.count + len(predictions)

    def _words(self, text: str) -> list[str]:
        return space_cjk(text.lower() if self.lowercase else text).split()


class _Bleu(Merging, SacreBLEUScore):
    full_state_update = False  # its states are sums; torchmetrics would merge none

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        _check_pairs(predictions, references)
        super().update([space_cjk(text) for text in predictions], [[space_cjk(text)] for text in references])


class _ChrF(Merging):
    """torchmetrics' own leaves out the references of predictions without any right character, and scores too high."""

    is_differentiable, higher_is_better, full_state_update = False, True, False
    ngrams: Tensor

    def __init__(self, lowercase: bool) -> None:
        super().__init__()
        self.lowercase = lowercase
        # rows: shared, predicted, in the reference; columns: orders 1 to 6
        self.add_state("ngrams", torch.zeros(3, _CHRF_ORDER, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        _check_pairs(predictions, references)
        for prediction, reference in zip(predictions, references, strict=True):
            columns = []
            for n in range(1, _CHRF_ORDER + 1):
                predicted, wanted = self._count(prediction, n), self._count(reference, n)
                guessed = predicted.total() if wanted else 0  # as SacreBLEU: no reference could have them
                columns.append([(predicted & wanted).total(), guessed, wanted.total()])
            self.ngrams = self.ngrams + tensor(columns, device=self.device).T

    def _count(self, text: str, n: int) -> Counter[str]:
        text = "".join((text.lower() if self.lowercase else text).split())
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    def compute(self) -> Tensor:
        shared, predicted, wanted = self.ngrams[:, (self.ngrams[1:] > 0).all(0)]  # orders that both sides have
        if not shared.any():
            return torch.zeros((), device=self.device)
        precision, recall = (shared / predicted).mean(), (shared / wanted).mean()
        return (1 + _CHRF_BETA**2) * precision * recall / (_CHRF_BETA**2 * precision + recall)
