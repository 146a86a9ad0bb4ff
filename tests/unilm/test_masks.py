import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.unilm.masks import (
    MASKS,
    attention_mask,
    bidirectional_mask,
    left_to_right_mask,
    permutation_mask,
    positions,
    pseudo_index,
    pseudo_mask,
    segments_from_lengths,
    seq2seq_mask,
)

few = settings(deadline=None, max_examples=30)  # of two rows and all kinds each
lengths = st.tuples(st.integers(0, 3), st.integers(0, 3))  # of a source and its target
pads = st.integers(0, 2)


@st.composite
def batches(draw, samples=3):
    """Two rows of up to three samples each; padding left, right, between samples, and between source and target."""
    rows = []
    for _ in range(2):
        tokens = [(0, 0)] * draw(pads)
        for sample, (source, target) in enumerate(draw(st.lists(lengths, max_size=samples)), 1):
            gap, after = draw(pads), draw(pads)
            tokens += [(1, sample)] * source + [(0, 0)] * gap + [(2, sample)] * target + [(0, 0)] * after
        rows.append(tokens)
    width = max(1, *map(len, rows))
    rows = torch.tensor([row + [(0, 0)] * (width - len(row)) for row in rows])
    segment_ids, sample_ids = rows.unbind(-1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    order = torch.stack([torch.randperm(width, generator=generator) for _ in rows])
    return segment_ids.contiguous(), sample_ids.contiguous(), order


def allowed(kind, segments, samples, order, i, j):
    """The definitions, one pair of tokens at a time; i and j are places of one row."""
    if i == j:
        return True
    if segments[i] == 0 or segments[j] == 0 or samples[i] != samples[j]:
        return False
    if kind == "bidirectional":
        return True
    if kind == "l2r":
        return j <= i
    if kind == "r2l":
        return j >= i
    if kind == "permutation":
        return order[j] <= order[i]
    assert kind == "seq2seq"
    return segments[j] == 1 or (segments[i] == 2 and j <= i)


def pseudo_allowed(segments, samples, index, i, j):
    """Rows and columns at and behind ``len(segments)`` are copies."""
    T = len(segments)
    if i == j:
        return True
    if j >= T or (i >= T and index[i - T] == -1):
        return False
    if i < T:
        return allowed("seq2seq", segments, samples, None, i, j)
    p = index[i - T]
    if segments[j] == 0 or samples[j] != samples[p]:
        return False
    return segments[j] == 1 or j < p


def make(kind, segment_ids, sample_ids, order):
    return (
        permutation_mask(segment_ids, order, sample_ids)
        if kind == "permutation"
        else MASKS[kind](segment_ids, sample_ids)
    )


def loops(size, rule):
    return torch.tensor([[rule(i, j) for j in range(size)] for i in range(size)])


KINDS = [*MASKS, "permutation"]


@few
@given(batches())
def test_every_kind_equals_its_definition(batch):
    segment_ids, sample_ids, order = batch
    for kind in KINDS:
        for samples in (sample_ids, None):
            mask = make(kind, segment_ids, samples, order)
            assert mask.dtype == torch.bool
            for b, row in enumerate(segment_ids.tolist()):
                owner = [1] * len(row) if samples is None else samples[b].tolist()
                ranks = order[b].tolist()
                expected = loops(len(row), lambda i, j: allowed(kind, row, owner, ranks, i, j))  # noqa: B023
                assert torch.equal(mask[b], expected), (kind, row, owner)


@few
@given(batches())
def test_pseudo_mask_equals_its_definition(batch):
    segment_ids, sample_ids, _ = batch
    index = pseudo_index(segment_ids)
    targets = [[place for place, segment in enumerate(row) if segment == 2] for row in segment_ids.tolist()]
    P = max(map(len, targets))
    assert index.dtype == torch.int64
    assert index.tolist() == [row + [-1] * (P - len(row)) for row in targets]
    shuffled = index.flip(-1)  # neither all places nor their order is taken for granted
    for some, samples in ((index, sample_ids), (index, None), (shuffled[:, : P // 2], sample_ids)):
        mask = pseudo_mask(segment_ids, some, samples)
        for b, row in enumerate(segment_ids.tolist()):
            owner = [1] * len(row) if samples is None else samples[b].tolist()
            places = some[b].tolist()
            expected = loops(len(row) + len(places), lambda i, j: pseudo_allowed(row, owner, places, i, j))  # noqa: B023
            assert torch.equal(mask[b], expected)


@few
@given(batches())
def test_every_mask_is_reflexive_and_transitive_so_that_no_number_of_layers_adds_a_dependence(batch):
    segment_ids, sample_ids, order = batch
    index = pseudo_index(segment_ids)
    masks = {kind: make(kind, segment_ids, sample_ids, order) for kind in KINDS}
    masks["pseudo"] = pseudo_mask(segment_ids, index, sample_ids)  # it too: a copy is seen by nobody but itself
    for kind, mask in masks.items():
        assert mask.diagonal(dim1=1, dim2=2).all(), kind
        reached = mask.double()
        for _ in range(2):
            reached = reached @ mask.double()
            assert torch.equal(reached > 0, mask), kind


@few
@given(batches())
def test_a_pseudo_copy_never_sees_its_own_token_by_any_path(batch):
    segment_ids, sample_ids, _ = batch
    index, T = pseudo_index(segment_ids), segment_ids.shape[1]
    reached = torch.linalg.matrix_power(pseudo_mask(segment_ids, index, sample_ids).double(), 3) > 0
    for b, places in enumerate(index.tolist()):
        for copy, place in enumerate(places):
            assert place == -1 or not reached[b, T + copy, place:T][segment_ids[b, place:] == 2].any()
    assert not reached[:, :T, T:].any()


@few
@given(batches())
def test_a_packed_row_is_its_samples_masks_one_by_one(batch):
    segment_ids, sample_ids, order = batch
    for kind in KINDS:
        packed = make(kind, segment_ids, sample_ids, order)
        assert not (packed & (sample_ids[:, :, None] != sample_ids[:, None, :])).any()
        for b in range(len(segment_ids)):
            for sample in range(1, int(sample_ids[b].max()) + 1):
                own = (sample_ids[b] == sample).nonzero().squeeze(1)
                alone = make(kind, segment_ids[b : b + 1, own], None, order[b : b + 1, own])
                assert torch.equal(packed[b][own][:, own], alone[0])


def test_what_sample_ids_say_at_padding_does_not_matter():
    """A loader may number a whole row through, its padding with it."""
    segments = torch.tensor([[0, 1, 1, 2, 0, 1, 2, 2, 0], [1, 2, 0, 0, 1, 2, 2, 0, 0]])
    clean = torch.tensor([[0, 1, 1, 1, 0, 2, 2, 2, 0], [1, 1, 0, 0, 2, 2, 2, 0, 0]])
    through = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2, 2, 3]])
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    for kind in KINDS:
        assert torch.equal(make(kind, segments, through, order), make(kind, segments, clean, order)), kind
    assert torch.equal(positions(segments, through), positions(segments, clean))
    index = pseudo_index(segments)
    assert torch.equal(pseudo_mask(segments, index, through), pseudo_mask(segments, index, clean))


def test_a_packed_pseudo_mask_is_its_samples_masks_one_by_one():
    segment_ids = torch.tensor([[0, 1, 1, 2, 2, 1, 2, 2, 2, 0]])
    sample_ids = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    index = pseudo_index(segment_ids)
    packed = pseudo_mask(segment_ids, index, sample_ids)[0]
    for sample, columns in ((1, [1, 2, 3, 4, 10, 11]), (2, [5, 6, 7, 8, 12, 13, 14])):
        alone = segment_ids[sample_ids == sample][None]
        assert torch.equal(packed[columns][:, columns], pseudo_mask(alone, pseudo_index(alone))[0])
        others = [column for column in range(packed.shape[0]) if column not in columns]
        assert not packed[columns][:, others].any()


@few
@given(batches(), st.booleans())
def test_the_kinds_meet_where_they_should(batch, packed):
    segment_ids, sample_ids, _ = batch
    samples = sample_ids if packed else None
    without_source = segment_ids.clamp(max=1) * 2
    assert torch.equal(seq2seq_mask(without_source, samples), left_to_right_mask(segment_ids, samples))
    without_target = segment_ids.clamp(max=1)
    assert torch.equal(seq2seq_mask(without_target, samples), bidirectional_mask(segment_ids, samples))
    identity = torch.arange(segment_ids.shape[1]).expand_as(segment_ids)
    assert torch.equal(permutation_mask(segment_ids, identity, samples), left_to_right_mask(segment_ids, samples))
    assert torch.equal(permutation_mask(segment_ids, -identity, samples), MASKS["r2l"](segment_ids, samples))
    assert torch.equal(permutation_mask(segment_ids, identity * 0, samples), bidirectional_mask(segment_ids, samples))


@few
@given(batches())
def test_a_permutation_is_a_causal_mask_on_the_permuted_tokens(batch):
    segment_ids, sample_ids, order = batch
    mask = permutation_mask(segment_ids, order, sample_ids)
    by_rank = order.argsort(-1)
    permuted = left_to_right_mask(segment_ids.gather(1, by_rank), sample_ids.gather(1, by_rank))
    for b, places in enumerate(by_rank):
        assert torch.equal(mask[b][places][:, places], permuted[b])


@pytest.mark.parametrize("kind", MASKS)
def test_without_padding_a_seq2seq_mask_is_su_and_bert4keras_cumulative_sum(kind):
    segment_ids = torch.tensor([[1, 1, 1, 2, 2]])
    expected = {
        "bidirectional": torch.ones(5, 5),
        "l2r": torch.ones(5, 5).tril(),
        "r2l": torch.ones(5, 5).triu(),
        "seq2seq": ((c := (segment_ids[0] == 2).cumsum(0))[None, :] <= c[:, None]),  # Su 2019, spaces.ac.cn/6933
    }[kind]
    assert torch.equal(MASKS[kind](segment_ids)[0], expected.bool())


@few
@given(st.lists(lengths, min_size=1, max_size=4), st.integers(0, 3), st.sampled_from(["left", "right"]))
def test_segments_from_lengths(pairs, extra, side):
    sources, targets = zip(*pairs, strict=True)
    width = max(map(sum, pairs)) + extra
    given_width = width if extra else None
    made = segments_from_lengths(torch.tensor(sources), torch.tensor(targets), given_width, side)
    expected = []
    for source, target in pairs:
        padding = [0] * (width - source - target)
        row = [1] * source + [2] * target
        expected.append(padding + row if side == "left" else row + padding)
    assert made.tolist() == expected
    assert made.dtype == torch.int64
    assert torch.equal(made, segments_from_lengths(sources, targets, given_width, side))
    for kind in MASKS:  # the side changes where the pattern stands, and nothing else
        other = segments_from_lengths(sources, targets, width, "right")
        for b, (source, target) in enumerate(pairs):
            n = source + target
            there, here = MASKS[kind](made)[b], MASKS[kind](other)[b]
            shift = width - n if side == "left" else 0
            assert torch.equal(there[shift : shift + n, shift : shift + n], here[:n, :n])


@few
@given(batches())
def test_positions_count_the_real_tokens_of_a_sample(batch):
    segment_ids, sample_ids, _ = batch
    for samples in (sample_ids, None):
        made = positions(segment_ids, samples)
        assert made.dtype == torch.int64
        for b, row in enumerate(segment_ids.tolist()):
            seen = {}
            for place, segment in enumerate(row):
                sample = 1 if samples is None else int(samples[b, place])
                expected = seen.get(sample, 0) if segment else 0
                seen[sample] = seen.get(sample, 0) + bool(segment)
                assert made[b, place] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_implementation_gets_what_it_obeys(dtype):
    allow = seq2seq_mask(segments_from_lengths([2, 1], [3, 2], padding_side="left"))
    sdpa, eager = attention_mask(allow, "sdpa", dtype), attention_mask(allow, "eager", dtype)
    assert sdpa.dtype == torch.bool and torch.equal(sdpa, allow[:, None])
    assert eager.dtype == dtype and eager.shape == sdpa.shape
    assert torch.equal(eager == 0, sdpa)
    assert (eager[~sdpa] == torch.finfo(dtype).min).all()  # a bool would be added to the scores as 0 and 1
    scores = (torch.randn(sdpa.shape, generator=torch.Generator().manual_seed(0)) * 40).to(dtype)
    seen = (scores + eager).softmax(-1)
    assert torch.equal(seen[~sdpa], torch.zeros_like(seen[~sdpa])) and seen.isfinite().all()


def test_flex_attention_gets_the_same_mask_in_blocks():
    from torch.nn.attention.flex_attention import BlockMask

    allow = seq2seq_mask(segments_from_lengths([200, 3], [60, 4]))
    blocks = attention_mask(allow, "flex_attention", torch.float32)
    assert isinstance(blocks, BlockMask) and blocks.seq_lengths == (260, 260)
    b, q, k = (axis.reshape(-1) for axis in torch.meshgrid(*(torch.arange(n) for n in allow.shape), indexing="ij"))
    assert torch.equal(blocks.mask_mod(b, torch.zeros_like(b), q, k), allow.flatten())
    whole = allow.float().view(2, 260, 260)
    some = torch.nn.functional.max_pool2d(whole[:, None], 128, ceil_mode=True) > 0  # which tiles hold anything
    assert torch.equal(blocks.to_dense()[:, :, : some.shape[2], : some.shape[3]].bool(), some)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "paged|sdpa", "sdpa_paged", ""])
def test_an_implementation_that_cannot_obey_is_refused(implementation):
    allow = torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attn_implementation='.*' cannot take a mask of one's own; use 'sdpa'"):
        attention_mask(allow, implementation, torch.float32)


def test_bad_input_is_named():
    ids = torch.tensor([[1, 1, 2, 0]])
    for bad in (
        torch.ones(1, 2, 2),
        torch.ones(1, 2, 2).long(),
        torch.ones(1, 1, 2, 2).bool(),
        torch.ones(2, 2).bool(),
    ):
        with pytest.raises(ValueError, match=r"allow must be a bool mask \(B, Q, K\), True = may attend, not torch"):
            attention_mask(bad, "sdpa", torch.float32)
    with pytest.raises(ValueError, match=r"dtype=torch\.int64 has no lowest number"):
        attention_mask(torch.ones(1, 2, 2).bool(), "eager", torch.int64)
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(B, T\), not \(4,\)"):
        seq2seq_mask(ids[0])
    with pytest.raises(ValueError, match=r"sample_ids has shape \(1, 3\); it must be segment_ids' \(1, 4\)"):
        bidirectional_mask(ids, ids[:, :3])
    with pytest.raises(ValueError, match=r"order has shape \(4,\); it must be segment_ids' \(1, 4\)"):
        permutation_mask(ids, torch.arange(4))
    for index in ([[1]], [[3]]):  # a source's copy would see the source's own token, a padding's copy nothing
        with pytest.raises(ValueError, match="index names a place that holds no target token"):
            pseudo_mask(ids, torch.tensor(index))
    with pytest.raises(ValueError, match=r"one number a row each, not of shapes \(2,\) and \(1,\)"):
        segments_from_lengths([1, 2], [1])
    with pytest.raises(ValueError, match="must not be negative"):
        segments_from_lengths([3, -1], [1, 2])
    with pytest.raises(ValueError, match="width=4 is less than the longest row's 5 tokens"):
        segments_from_lengths([3, 1], [2, 2], width=4)
    with pytest.raises(ValueError, match="padding_side must be 'right' or 'left', not 'both'"):
        segments_from_lengths([3], [2], padding_side="both")
