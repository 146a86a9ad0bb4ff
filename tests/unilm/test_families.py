"""Every family obeys every mask, and nothing else: by gradients, by changed tokens, and against the stock encoders."""

import copy

import pytest
import torch

from lightning_plugins.unilm import backbones
from lightning_plugins.unilm.backbones import FAMILIES, check_for_leaks
from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import (
    MASKS,
    left_to_right_mask,
    permutation_mask,
    positions,
    pseudo_index,
    pseudo_mask,
    seq2seq_mask,
)

FIRST, VOCABULARY, PAD, SEP, MASK = 5, 48, 1, 3, 4
EXACT = 1e-10  # the models are float64; their logits are about 1
IDS = dict(pad_token_id=PAD, sep_token_id=SEP, mask_token_id=MASK)
# transformers 5.23: a 4-D mask is exact in eager and sdpa, and in eager only.
BOTH = (
    *("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "distilbert", "albert", "ernie"),
    *("data2vec-text", "roberta-prelayernorm", "nomic_bert", "gte", "eurobert", "modernbert", "esmc"),
)
EAGER = ("mpnet", "rembert", "roformer", "megatron-bert", "big_bird", "squeezebert", "luke", "ibert", "tapas")
BY_PLACE = ("roformer", "mpnet")  # distances are counted in places of the row, whatever the positions
RUNS = [*((family, kind) for family in BOTH for kind in ("sdpa", "eager")), *((family, "eager") for family in EAGER)]


def tolerance(family):
    """RoFormer's table of sines is fp32, and so are the others' rotations and eager softmax."""
    return 3e-6 if family in ("roformer", "eurobert", "modernbert") else EXACT


def test_the_list_of_families_is_complete():
    assert sorted(FAMILIES) == sorted((*BOTH, *EAGER))


def draw(shape, seed=0):
    return torch.randint(FIRST, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(values, width, side, value=0):
    room = width - values.shape[-1]
    return torch.nn.functional.pad(values, (room, 0) if side == "left" else (0, room), value=value)


def every_mask(width=11):
    """Rows of one batch, one per kind of mask, alone and packed, padded on the right and on the left in turn.

    Returns:
        segment_ids, position_ids ``(B, width)``, sample_ids and allow ``(B, width, width)``.
    """
    rows = []
    for segments, samples in (([1, 1, 1, 1, 2, 2, 2], [1] * 7), ([1, 1, 2, 2, 1, 1, 2], [1, 1, 1, 1, 2, 2, 2])):
        ids, samples = torch.tensor([segments]), torch.tensor([samples])
        places = positions(ids, samples)
        order = torch.tensor([[3, 0, 6, 2, 5, 1, 4]])
        index = pseudo_index(ids)
        allows = [mask(ids, samples) for mask in MASKS.values()] + [permutation_mask(ids, order, samples)]
        rows += [(ids, places, samples, allow) for allow in allows]
        copied = [torch.cat([of, of.gather(1, index)], 1) for of in (ids, places, samples)]
        rows.append((*copied, pseudo_mask(ids, index, samples)))
    batch = []
    for number, (ids, places, samples, allow) in enumerate(rows):
        side, n = ("right", "left")[number % 2], ids.shape[1]
        start = width - n if side == "left" else 0
        square = torch.eye(width, dtype=torch.bool)
        square[start : start + n, start : start + n] = allow[0]
        batch.append((*(padded(of[0], width, side) for of in (ids, places, samples)), square))
    return [torch.stack(column) for column in zip(*batch, strict=True)]


def tokens_of(segment_ids, seed=0):
    return torch.where(segment_ids > 0, draw(segment_ids.shape, seed), PAD)


def run(model, input_ids, segment_ids, allow, position_ids=None, sample_ids=None, **options):
    position_ids = positions(segment_ids, sample_ids) if position_ids is None else position_ids
    types = model.token_types(segment_ids, sample_ids=sample_ids)
    return model(input_ids, attention_mask=allow, position_ids=position_ids, token_type_ids=types, **options).logits


def dependence(model, forward):
    """``(B, T, T)`` bool: whether the logits of row i have a gradient with respect to the embedding of token j."""
    leaves = []

    def keep(module, inputs, output):
        first, *rest = output if isinstance(output, tuple) else (output,)
        leaves.append(first.detach().requires_grad_())
        return (leaves[-1], *rest) if rest else leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = forward()
    finally:
        handle.remove()
    (leaf,) = leaves
    direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3)).to(logits)
    rows = []
    for i in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad((logits[:, i] @ direction).sum(), leaf, retain_graph=True)
        rows.append(gradient.abs().amax(-1) > 0)
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("family", "implementation"), RUNS)
def test_a_token_depends_on_what_its_mask_shows_and_on_nothing_else(tiny_model, family, implementation):
    model = tiny_model(family, attn_implementation=implementation)
    segment_ids, position_ids, sample_ids, allow = every_mask()
    input_ids = tokens_of(segment_ids)
    pattern = dependence(model, lambda: run(model, input_ids, segment_ids, allow, position_ids, sample_ids))
    real = segment_ids > 0
    assert torch.equal(pattern[real], allow[real])
    assert not pattern[~real].logical_and(real[:, None].expand_as(pattern)[~real]).any()  # nor padding on a token


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_token_changes_the_logits_of_those_who_may_see_it(tiny_model, family):
    model = tiny_model(family)
    segment_ids, position_ids, sample_ids, allow = every_mask()
    input_ids = tokens_of(segment_ids)
    B, T = input_ids.shape
    changed = input_ids.repeat(T + 1, 1, 1)  # (T + 1, B, T): as it is, then token 0 changed, token 1, ...
    for j in range(T):
        changed[j + 1, :, j] = FIRST + (input_ids[:, j] - FIRST + 7) % (VOCABULARY - FIRST)
    repeated = (of.repeat(T + 1, *[1] * (of.dim() - 1)) for of in (segment_ids, allow, position_ids, sample_ids))
    with torch.no_grad():
        logits = run(model, changed.flatten(0, 1), *repeated).view(T + 1, B, T, -1)
    effect = (logits[1:] - logits[:1]).abs().amax(-1).permute(1, 2, 0)  # (B, row i, changed j)
    real = segment_ids > 0
    assert effect[real][allow[real]].min() > 1e-4
    assert effect[real][~allow[real]].max() < EXACT


def stock_types(model, types):
    """What a stock class is given as token types: by its own argument's name and form."""
    if types is None:
        return {}
    columns = len(getattr(model.config, "type_vocab_sizes", []))  # TAPAS: the segment is the first of seven kinds
    if columns:
        types = torch.stack([types, *[torch.zeros_like(types)] * (columns - 1)], -1)
    return {"token_type_ids": types}


def lengths_batch(sources=(6, 3, 5), targets=(3, 5, 1), width=12):
    """``segment_ids``; the middle row is padded on the left."""
    rows = [torch.tensor([1] * n + [2] * m) for n, m in zip(sources, targets, strict=True)]
    return torch.stack([padded(row, width, "left" if i == 1 else "right") for i, row in enumerate(rows)])


@pytest.mark.parametrize("family", FAMILIES)
def test_source_rows_are_what_the_stock_encoder_makes_of_the_source_alone(tiny_model, stock_model, family):
    """Also: positions as the family counts them, RoBERTa's from behind its padding id, ModernBERT's windows."""
    model, plain = tiny_model(family), stock_model(family)
    segment_ids = lengths_batch((14, 9, 5), (3, 5, 1), 18)  # longer than ModernBERT's window of 4 to each side
    input_ids = tokens_of(segment_ids)
    with torch.no_grad():
        logits = run(model, input_ids, segment_ids, seq2seq_mask(segment_ids))
        types = model.token_types(segment_ids)
        for b in range(len(input_ids)):
            own = segment_ids[b] == 1
            given = {} if types is None else stock_types(model, types[b, own][None])
            alone = plain(input_ids[b, own][None], **given).logits[0]
            torch.testing.assert_close(logits[b, own], alone, atol=tolerance(family), rtol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BY_PLACE])
def test_a_permutation_is_a_causal_mask_on_permuted_tokens(tiny_model, family):
    model = tiny_model(family)
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 0, 0, 0, 0]])
    input_ids, places = tokens_of(segment_ids), positions(segment_ids)
    order = torch.tensor([[3, 0, 6, 2, 5, 1, 4, 7], [2, 1, 0, 3, 4, 5, 6, 7]])
    by_rank = order.argsort(-1)
    types = model.token_types(segment_ids)
    with torch.no_grad():
        logits = run(model, input_ids, segment_ids, permutation_mask(segment_ids, order))
        permuted = [of if of is None else of.gather(1, by_rank) for of in (input_ids, segment_ids, places, types)]
        causal = model(
            permuted[0],
            attention_mask=left_to_right_mask(permuted[1]),
            position_ids=permuted[2],
            token_type_ids=permuted[3],
        ).logits
    real = permuted[1] > 0
    torch.testing.assert_close(logits[torch.arange(2)[:, None], by_rank][real], causal[real], atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BY_PLACE])
def test_a_pseudo_copy_predicts_what_a_mask_behind_the_known_tokens_does(tiny_model, family):
    """What objective 'pseudo' trains in one run is what decoding with [MASK]s asks for, step by step."""
    model = tiny_model(family)
    segment_ids = lengths_batch()
    input_ids, index = tokens_of(segment_ids), pseudo_index(segment_ids)
    place = index.clamp(min=0)
    copied = [torch.cat([of, of.gather(1, place)], 1) for of in (segment_ids, positions(segment_ids))]
    types = model.token_types(segment_ids)
    with torch.no_grad():
        logits = model(
            torch.cat([input_ids, torch.full_like(index, MASK)], 1),
            attention_mask=pseudo_mask(segment_ids, index),
            position_ids=copied[1],
            token_type_ids=None if types is None else torch.cat([types, types.gather(1, place)], 1),
        ).logits[:, segment_ids.shape[1] :]
        for b, places in enumerate(index.tolist()):
            for copy_number, p in enumerate(places):
                if p == -1:
                    continue
                known = segment_ids[b, : p + 1] > 0
                ids = torch.cat([input_ids[b, :p], torch.tensor([MASK])])[known][None]
                own = segment_ids[b, : p + 1][known][None]
                asked = run(model, ids, own, seq2seq_mask(own))[0, -1]
                torch.testing.assert_close(logits[b, copy_number], asked, atol=tolerance(family), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_the_same_alone_beside_longer_ones_and_packed(tiny_model, family):
    model = tiny_model(family)
    segment_ids = lengths_batch()
    input_ids = tokens_of(segment_ids)
    real = segment_ids > 0
    sample_ids = torch.tensor([[1] * 9 + [2] * 8 + [3] * 6 + [0]])
    packed_ids, packed_segments = (
        padded(input_ids[real], 24, "right", PAD)[None],
        padded(segment_ids[real], 24, "right"),
    )
    with torch.no_grad():
        beside = run(model, input_ids, segment_ids, seq2seq_mask(segment_ids))[real]
        alone = [
            run(model, ids[own][None], own_segments[None], seq2seq_mask(own_segments[None]))[0]
            for ids, own, own_segments in ((input_ids[b], real[b], segment_ids[b, real[b]]) for b in range(3))
        ]
        allow = seq2seq_mask(packed_segments[None], sample_ids)
        packed = run(model, packed_ids, packed_segments[None], allow, sample_ids=sample_ids)[0, :-1]
        assert (beside - torch.cat(alone)).abs().max() < tolerance(family)
        assert (packed - torch.cat(alone)).abs().max() < tolerance(family)
        chosen = torch.rand(segment_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
        full = run(model, input_ids, segment_ids, seq2seq_mask(segment_ids))
        some = run(model, input_ids, segment_ids, seq2seq_mask(segment_ids), logits_to_keep=chosen)
        assert some.shape == (int(chosen.sum()), full.shape[-1])
        torch.testing.assert_close(some, full[chosen], atol=EXACT, rtol=0)
        last = run(model, input_ids, segment_ids, seq2seq_mask(segment_ids), logits_to_keep=2)
        torch.testing.assert_close(last, full[:, -2:], atol=EXACT, rtol=0)


def test_the_head_is_run_on_the_chosen_places_only(tiny_model):
    segment_ids = lengths_batch()
    chosen = segment_ids == 2
    for family in FAMILIES:
        model, seen = tiny_model(family), []
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))  # noqa: B023
        with torch.no_grad():
            run(model, tokens_of(segment_ids), segment_ids, seq2seq_mask(segment_ids), logits_to_keep=chosen)
        handle.remove()
        assert seen == [int(chosen.sum())], family


@pytest.mark.parametrize("family", BOTH)
def test_eager_equals_sdpa(tiny_model, family):
    segment_ids, position_ids, sample_ids, allow = every_mask()
    models = [tiny_model(family, attn_implementation=kind) for kind in ("sdpa", "eager")]
    assert [model.attn_implementation for model in models] == ["sdpa", "eager"]
    with torch.no_grad():
        sdpa, eager = (
            run(model, tokens_of(segment_ids), segment_ids, allow, position_ids, sample_ids) for model in models
        )
    torch.testing.assert_close(sdpa[segment_ids > 0], eager[segment_ids > 0], atol=2e-6, rtol=0)  # eager: fp32 softmax


@pytest.mark.parametrize(("family", "implementation"), RUNS)
def test_half_precision_leaks_no_more(tiny_model, family, implementation):
    model = tiny_model(family, attn_implementation=implementation)
    segment_ids = lengths_batch()
    input_ids, allow = tokens_of(segment_ids), seq2seq_mask(segment_ids)
    with torch.no_grad():
        exact = run(model, input_ids, segment_ids, allow)
    half = copy.deepcopy(model).to(torch.bfloat16)
    real = segment_ids > 0

    def autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model, input_ids, segment_ids, allow)

    for used, forward in ((model, autocast), (half, lambda: run(half, input_ids, segment_ids, allow))):
        logits = forward()
        assert logits[real].isfinite().all()
        assert (logits[real].float() - exact[real]).abs().mean() < 0.1 * exact.abs().mean()
        pattern = dependence(used, forward)
        assert not (pattern & ~allow)[real].any()


@pytest.mark.parametrize("window", [2, 4])
def test_modernberts_windows_cut_the_mask_by_position(tiny_config, window):
    """All layers local: what two layers reach is what two steps of mask and window reach."""
    layers = dict(layer_types=["sliding_attention"] * 2, local_attention=2 * window)
    model = load_unilm(config=tiny_config("modernbert", **layers), **IDS).double().eval()
    segment_ids, position_ids, sample_ids, allow = every_mask()
    distance = position_ids[:, :, None] - position_ids[:, None, :]
    step = (allow & (distance.abs() <= window)).double()
    input_ids = tokens_of(segment_ids)
    pattern = dependence(model, lambda: run(model, input_ids, segment_ids, allow, position_ids, sample_ids))
    assert torch.equal(pattern[segment_ids > 0], (step @ step > 0)[segment_ids > 0])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_compiled_model_says_the_same(tiny_model, family):
    model = tiny_model(family)
    segment_ids = lengths_batch()
    input_ids, allow, chosen = tokens_of(segment_ids), seq2seq_mask(segment_ids), segment_ids == 2
    options = dict(attention_mask=allow, position_ids=positions(segment_ids))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        expected = model(input_ids, **options, logits_to_keep=chosen).logits
        torch.testing.assert_close(compiled(input_ids, **options, logits_to_keep=chosen).logits, expected)


REFUSED = ("convbert", "mobilebert", "fnet", "nystromformer", "longformer", "yoso", "deberta", "deberta-v2")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_obey_is_refused_by_name(tiny_config, family):
    with pytest.raises(ValueError, match=f"model_type='{family}' cannot be used: .*Choose another"):
        load_unilm(config=tiny_config(family), **IDS)


def test_an_unknown_family_and_a_foreign_implementation_are_refused_by_name(tiny_config):
    with pytest.raises(ValueError, match="model_type='gpt2' is not known to obey a mask; known are bert, roberta"):
        load_unilm(config={"model_type": "gpt2"}, **IDS)
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' cannot take UniLM's mask in 'bert'"):
        load_unilm(config=tiny_config("bert"), attn_implementation="flash_attention_2", **IDS)
    with pytest.raises(ValueError, match="attn_implementation='sdpa' cannot take UniLM's mask in 'mpnet'"):
        load_unilm(config=tiny_config("mpnet"), attn_implementation="sdpa", **IDS)


@pytest.mark.parametrize("family", ["convbert", "mobilebert"])
def test_the_probe_sees_the_leak_of_a_family_that_no_table_names(tiny_config, monkeypatch, family):
    monkeypatch.setattr(backbones, "_REFUSED", {})
    monkeypatch.setattr(backbones, "FAMILIES", (*FAMILIES, family))
    with pytest.raises(ValueError, match=f"model_type='{family}' leaks: a token changes the outputs of tokens that"):
        load_unilm(config=tiny_config(family), **IDS)


def test_the_probe_sees_a_boolean_in_eager_and_a_causal_prefix_and_leaves_no_trace(tiny_model, monkeypatch):
    model = tiny_model("bert", attn_implementation="eager")
    state = torch.get_rng_state()
    model.train()
    check_for_leaks(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    allows = {"leaks": lambda given: given, "does not read": lambda given: given.tril().float().log().clamp(min=-1e30)}
    for words, form in allows.items():
        monkeypatch.setattr(model, "_mask", lambda given, *args: form(given)[:, None])  # noqa: B023
        with pytest.raises(ValueError, match=words):
            check_for_leaks(model)
