"""What is hidden and predicted under each objective, against the definitions, token by token."""

import math

import pytest
import torch

from lightning_plugins.unilm.objectives import (
    InputBuilder,
    Vocabulary,
    check_objective,
    choose,
    draw_kinds,
    hide,
    mask_candidates,
    next_tokens,
)

PAD, CLS, SEP, MASK = 0, 1, 2, 3
WORDS = Vocabulary(size=50, pad=PAD, mask=MASK, special=(PAD, CLS, SEP, MASK))
# [CLS] 10 11 [SEP] 20 21 [SEP] and a shorter one
IDS = torch.tensor([[CLS, 10, 11, SEP, 20, 21, SEP, PAD], [CLS, 12, SEP, 22, SEP, PAD, PAD, PAD]])
SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 0, 0, 0]])


def builder(objective="lm", mask="seq2seq", **arguments):
    shares = check_objective(objective, mask)
    defaults = {"mask_probability": 0.7, "target_noise": 0.0, "token_types": lambda segments, kind, samples: segments}
    return InputBuilder(objective, shares, vocabulary=WORDS, **(defaults | arguments))


def build(objective="lm", mask="seq2seq", noisy=False, **arguments):
    generator = torch.Generator().manual_seed(0)
    return builder(objective, mask, **arguments)({"input_ids": IDS, "segment_ids": SEGMENTS}, noisy, generator)


def pairs(inputs):
    """Row, place and label of everything that is predicted."""
    rows, places = inputs.predict.nonzero(as_tuple=True)
    return list(zip(rows.tolist(), places.tolist(), inputs.labels.tolist(), strict=True))


def test_lm_predicts_each_target_token_from_the_one_before():
    inputs = build()
    assert pairs(inputs) == [(0, 3, 20), (0, 4, 21), (0, 5, SEP), (1, 2, 22), (1, 3, SEP)]
    torch.testing.assert_close(inputs.input_ids, IDS)
    assert inputs.position_ids[1].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_lm_from_left_and_from_right_predicts_every_token_but_one():
    left, right = build(mask="l2r"), build(mask="r2l")
    assert pairs(left)[:6] == [(0, 0, 10), (0, 1, 11), (0, 2, SEP), (0, 3, 20), (0, 4, 21), (0, 5, SEP)]
    assert pairs(right)[:6] == [(0, 1, CLS), (0, 2, 10), (0, 3, 11), (0, 4, SEP), (0, 5, 20), (0, 6, 21)]
    assert len(left.labels) == len(right.labels) == 6 + 4


def test_lm_in_packed_rows_stays_within_its_sample():
    ids = torch.tensor([[CLS, 10, SEP, 20, SEP, CLS, 11, SEP, 21, SEP, PAD]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 1, 1, 1, 2, 2, 0]])
    samples = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    predict, labels = next_tokens(ids, segments, samples, ["seq2seq"])
    assert predict.nonzero()[:, 1].tolist() == [2, 3, 7, 8]
    assert labels.tolist() == [20, SEP, 21, SEP]
    for kind, places in (("l2r", [0, 1, 2, 3, 5, 6, 7, 8]), ("r2l", [1, 2, 3, 4, 6, 7, 8, 9])):
        assert next_tokens(ids, segments, samples, [kind])[0].nonzero()[:, 1].tolist() == places


def test_masked_hides_a_rounded_share_of_the_targets_and_predicts_those():
    for seed in range(20):
        inputs = builder("masked")(
            {"input_ids": IDS, "segment_ids": SEGMENTS}, False, torch.Generator().manual_seed(seed)
        )
        assert inputs.predict.sum(1).tolist() == [2, 1]  # 0.7 of 3 and of 2
        assert not (inputs.predict & (SEGMENTS != 2)).any()
        torch.testing.assert_close(inputs.labels, IDS[inputs.predict])
        torch.testing.assert_close(inputs.input_ids[~inputs.predict], IDS[~inputs.predict])


def test_choose_takes_at_least_one_and_never_what_is_no_candidate():
    candidates = torch.tensor([[True] * 10, [True] + [False] * 9, [False] * 10])
    assert choose(candidates, 0.15).sum(1).tolist() == [2, 1, 0]
    counts = torch.stack([choose(candidates, 0.5)[0] for _ in range(2000)]).float().mean(0)
    torch.testing.assert_close(counts, torch.full((10,), 0.5), atol=0.06, rtol=0)


def test_hidden_tokens_are_mostly_mask_sometimes_random_sometimes_themselves():
    ids = torch.full((1, 100_000), 10)
    hidden = hide(ids, torch.ones_like(ids, dtype=torch.bool), WORDS, torch.Generator().manual_seed(0))
    shares = [(hidden == MASK).float().mean().item(), (hidden == 10).float().mean().item()]
    assert shares == pytest.approx([0.8 + 0.1 / 50, 0.1 + 0.1 / 50], abs=0.005)
    torch.testing.assert_close(hide(ids, torch.zeros_like(ids, dtype=torch.bool), WORDS), ids)


def test_pretraining_hides_words_everywhere_and_the_last_sep_of_a_target_alone():
    kinds = ["bidirectional", "seq2seq"]
    chosen = mask_candidates(IDS, SEGMENTS, kinds, WORDS, alone=False)
    assert chosen[0].nonzero().flatten().tolist() == [1, 2, 4, 5]
    assert chosen[1].nonzero().flatten().tolist() == [1, 3, 4]


def test_kinds_are_drawn_by_their_shares():
    shares = check_objective("masked", {"bidirectional": 2, "l2r": 1, "r2l": 1, "seq2seq": 2})
    assert shares == pytest.approx({"bidirectional": 1 / 3, "l2r": 1 / 6, "r2l": 1 / 6, "seq2seq": 1 / 3})
    drawn = draw_kinds(shares, 12_000, torch.Generator().manual_seed(0))
    for kind, share in shares.items():
        assert drawn.count(kind) / 12_000 == pytest.approx(share, abs=5 * math.sqrt(share / 12_000))


def test_every_row_has_the_mask_and_the_types_of_its_kind():
    shares = {"bidirectional": 1, "l2r": 1, "r2l": 1, "seq2seq": 1}
    names = list(shares)
    build_mixed = builder(
        "masked", shares, token_types=lambda segments, kind, samples: segments * 0 + names.index(kind)
    )
    ids, segments = IDS[:1].repeat(64, 1), SEGMENTS[:1].repeat(64, 1)
    inputs = build_mixed({"input_ids": ids, "segment_ids": segments}, False, torch.Generator().manual_seed(0))
    sees = {  # does the first token see the last, and the last the first
        "bidirectional": (True, True),
        "l2r": (False, True),
        "r2l": (True, False),
        "seq2seq": (False, True),
    }
    assert {int(t) for t in inputs.token_type_ids[:, 0]} == {0, 1, 2, 3}
    for allow, types in zip(inputs.allow, inputs.token_type_ids, strict=True):
        kind = names[int(types[0])]
        assert (bool(allow[0, 6]), bool(allow[6, 0])) == sees[kind]
        assert bool(allow[0, 3]) == (kind != "l2r")  # the source's end


def test_pseudo_predicts_every_target_token_at_its_copy():
    inputs = build("pseudo")
    assert inputs.input_ids[:, 8:].tolist() == [[MASK, MASK, MASK], [MASK, MASK, PAD]]
    assert inputs.position_ids[:, 8:].tolist()[0] == [4, 5, 6]
    assert inputs.position_ids[1, 8:10].tolist() == [3, 4]
    assert inputs.labels.tolist() == [20, 21, SEP, 22, SEP]
    assert inputs.predict[:, 8:].tolist() == [[True] * 3, [True, True, False]]
    assert not inputs.predict[:, :8].any()
    assert inputs.segment_ids[1].tolist() == [1, 1, 1, 2, 2, 0, 0, 0, 2, 2, 0]
    assert inputs.token_type_ids[1, 8:10].tolist() == [2, 2]


def test_noise_falls_on_target_inputs_in_training_only_and_never_on_labels():
    quiet, noisy = build(target_noise=0.9), build(target_noise=0.9, noisy=True)
    torch.testing.assert_close(quiet.input_ids, IDS)
    changed = noisy.input_ids != IDS
    assert changed.any()
    assert not (changed & (SEGMENTS != 2)).any()
    torch.testing.assert_close(noisy.labels, quiet.labels)


@pytest.mark.parametrize(
    ("objective", "mask", "words"),
    [
        ("clm", "seq2seq", "objective='clm' must be one of lm, masked, pseudo"),
        ("lm", "prefix", "mask='prefix' is unknown; the kinds are"),
        ("lm", "bidirectional", "mask='bidirectional' shows"),
        ("lm", {"seq2seq": 1, "permutation": 1}, "use objective='masked'"),
        ("pseudo", "l2r", "mask must be 'seq2seq', got 'l2r'"),
        ("masked", {}, "names no kind of mask"),
        ("masked", {"l2r": 0.0}, r"mask\['l2r'\]=0.0 must be positive: leave the kind out"),
    ],
)
def test_what_cannot_be_trained_is_refused(objective, mask, words):
    with pytest.raises(ValueError, match=words):
        check_objective(objective, mask)
