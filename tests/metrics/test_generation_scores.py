"""Generation scores against closed forms, SacreBLEU's published example and torchmetrics where that is right."""

# ruff: noqa: RUF001 (full-width commas and curly quotes are what is tested)

import random
from math import exp

import pytest
import torch
from sacrebleu.metrics import CHRF
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore

from lightning_plugins.metrics import GenerationScores

CHINESE = ["用BERT做生成，速度很快。", "模型在中文摘要任务上的效果好", "深度学习", "３种方法，共2个"]
CHINESE_OTHER = ["用BERT做摘要，速度不快。", "模型在英文摘要任务上效果很好", "机器学习", "３种模型，共4个"]
ENGLISH = [
    'The U.S. spent $1,500.25 on "tests" - it\'s 50% of 2-3 years.',
    "A curly ‘quote’ and a café… naïve?",
    "Return a list of (name, value) pairs; see foo_bar(x).",
]
ENGLISH_OTHER = [
    "The U.S. spent $1,500.25 on 'tests' - that is 50% of 2-3 years.",
    "One curly ‘quote’ and a café… naïve?",
    "Return the list of (name, value) pairs, see foo_bar(x).",
]


def scores(predictions, references, **options):
    metric = GenerationScores(**options)
    metric.update(predictions, references)
    return {name: score.item() for name, score in metric.compute().items()}


def test_identical_is_one_and_disjoint_is_zero_in_both_languages():
    names = ["rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match"]
    for texts in (CHINESE, ENGLISH):
        assert scores(texts, texts) == pytest.approx(dict.fromkeys(names, 1.0))
    assert scores(["深度学习方法"], ["中文摘要任务"]) == dict.fromkeys(names, 0.0)
    assert scores(["abc def"], ["xyz uvw"]) == dict.fromkeys(names, 0.0)


def test_chinese_rouge_by_hand():
    """Six and five characters; 模型 and 很好 in common, in order, and no other: 2 * (4/6) * (4/5) / (4/6 + 4/5)."""
    got = scores(["模型效果很好"], ["模型也很好"])
    assert got["rougeL"] == pytest.approx(8 / 11)
    assert got["rouge1"] == pytest.approx(8 / 11)
    assert got["rouge2"] == pytest.approx(4 / 9)  # two of five bigrams, two of four
    assert scores(["很好模型效果"], ["模型也很好"])["rougeL"] == pytest.approx(4 / 11)  # only one of the two in order


def test_chinese_bleu_is_sacrebleu_zh_and_english_is_13a():
    for tokenize, predictions, references in (("zh", CHINESE, CHINESE_OTHER), ("13a", ENGLISH, ENGLISH_OTHER)):
        for lowercase in (False, True):
            stock = SacreBLEUScore(tokenize=tokenize, lowercase=lowercase)(predictions, [[r] for r in references])
            assert 0.1 < stock < 0.9
            assert scores(predictions, references, lowercase=lowercase)["bleu"] == pytest.approx(stock.item())


def test_english_rouge_is_the_stock_one_where_the_text_is_ascii():
    pairs = [ENGLISH[0], ENGLISH[2]], [ENGLISH_OTHER[0], ENGLISH_OTHER[2]]
    keys = ("rouge1", "rouge2", "rougeL")
    stock, got = rouge_score(*pairs, rouge_keys=keys), scores(*pairs)
    assert {key: got[key] for key in keys} == pytest.approx({key: stock[f"{key}_fmeasure"].item() for key in keys})
    assert scores(["the café"], ["the cafe"])["rouge1"] == 0.5  # not "caf" beside "e"


def test_chrf_by_hand_and_as_sacrebleus_readme_has_it():
    # "abcd" and "abce": 3 of 4, 2 of 3, 1 of 2, 0 of 1 n-grams; both have four orders; P = R = F
    assert scores(["ab cd"], ["abce"])["chrf"] == pytest.approx((3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)
    # a longer reference: P = 1, R = mean of 2/4 and 1/3
    recall = (2 / 4 + 1 / 3) / 2
    assert scores(["ab"], ["abcd"])["chrf"] == pytest.approx(5 * recall / (4 + recall))
    predictions = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    closest = ["The dog bit the man.", "No one was surprised.", "The man had bitten the dog."]  # of two each
    assert 100 * scores(predictions, closest)["chrf"] == pytest.approx(59.73, abs=0.005)


ODD = [
    "a",
    "ab",
    "the cat",
    "猫",
    "猫坐在垫子上",
    "naïve café",
    "x y z",
    "",
    "yes!",
    "日本語 text",
    "Ünïcode",
    "ha " * 9,
]


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_chrf_is_sacrebleus_on_odd_pairs(seed, lowercase):
    """References shorter than six characters among them, whose missing orders do not count."""
    generator = random.Random(seed)
    predictions, references = ([generator.choice(ODD) + generator.choice(ODD) for _ in range(40)] for _ in range(2))
    references = [reference or "?" for reference in references]
    stock = CHRF(lowercase=lowercase)
    expected = stock.corpus_score(predictions, [references]).score / 100
    assert scores(predictions, references, lowercase=lowercase)["chrf"] == pytest.approx(expected, abs=1e-6)
    for prediction, reference in zip(predictions, references, strict=True):
        expected = stock.corpus_score([prediction], [[reference]]).score / 100
        assert scores([prediction], [reference], lowercase=lowercase)["chrf"] == pytest.approx(expected, abs=1e-6)


def test_empty_predictions_count_as_wrong():
    got = scores(["", "the cat sat on the mat"], ["a reference of many words", "the cat sat on the mat"])
    assert [got[name] for name in ("rouge1", "rouge2", "rougeL", "exact_match")] == pytest.approx([0.5] * 4)
    assert got["bleu"] == pytest.approx(exp(1 - 11 / 6))  # all words right, and brevity
    recall = sum((17 - n + 1) / (17 - n + 1 + 21 - n + 1) for n in range(1, 7)) / 6  # characters: 17, and 21 missed
    assert got["chrf"] == pytest.approx(5 * recall / (4 + recall))
    assert scores([""], ["x"]) == dict.fromkeys(got, 0.0)
    assert scores([], []) == dict.fromkeys(got, 0.0)
    assert scores(["猫"], [""]) == dict.fromkeys(got, 0.0)


def test_case_and_spaces():
    """Decoders put spaces between Chinese characters; uncased tokenizers lose the case."""
    plain, lower = (scores(["用 bert 做 生成 ", "yes"], ["用BERT做生成", "No"], lowercase=low) for low in (False, True))
    assert (plain["exact_match"], lower["exact_match"]) == (0.0, 0.5)
    assert plain["rouge1"] == lower["rouge1"] == 0.5
    assert lower["chrf"] > plain["chrf"] and lower["bleu"] > plain["bleu"]
    assert scores(["a  b"], ["a b"])["exact_match"] == 1
    assert scores(["ab"], ["a b"])["exact_match"] == 0


def test_unequal_ranks_give_what_one_process_gives():
    predictions, references = CHINESE + ENGLISH, CHINESE_OTHER + ENGLISH_OTHER
    for shares in ((slice(0, 2), slice(2, 7)), (slice(0, 7), slice(7, 7))):
        here, there = GenerationScores(), GenerationScores()
        for rank, share in zip((here, there), shares, strict=True):
            rank.update(predictions[share], references[share])
        for name, metric in here.items():
            states = iter(there[name].metric_state.values())  # in the order in which they are gathered
            metric.distributed_available_fn = lambda: True
            metric.dist_sync_fn = lambda state, group, states=states: [state, next(states)]
        together = {name: score.item() for name, score in here.compute().items()}
        assert together == pytest.approx(scores(predictions, references), abs=1e-6)
        # one gathering call for each state: lists would take one for each pair, and hang
        assert all(
            isinstance(state, torch.Tensor) for metric in here.values() for state in metric.metric_state.values()
        )


def test_batches_add_up_and_reset():
    metric = GenerationScores()
    for prediction, reference in zip(ENGLISH, ENGLISH_OTHER, strict=True):
        metric.update([prediction], [reference])
    got = {name: score.item() for name, score in metric.compute().items()}
    assert got == pytest.approx(scores(ENGLISH, ENGLISH_OTHER))
    metric.reset()
    metric.update(CHINESE, CHINESE)
    assert metric.compute()["bleu"] == 1


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="Each prediction needs one reference: got 2 and 1"):
        GenerationScores().update(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="predictions='a' must be a list of texts"):
        GenerationScores().update("a", ["a"])
