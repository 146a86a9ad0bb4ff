"""The cache with room against transformers' own, which copies everything at every step."""

import pytest
import torch
from transformers import DynamicCache

from lightning_plugins.unilm.cached_attention import roomy_cache

PAD, SEP, FIRST, VOCABULARY = 1, 3, 5, 48


def add(caches, rows, tokens, draw):
    """Give all caches the same new keys and values, in each of two layers."""
    for layer in range(2):
        keys, values = torch.randn(2, rows, 2, tokens, 4, generator=draw)
        (ours, ours_v), (theirs, theirs_v) = (cache.update(keys.clone(), values.clone(), layer) for cache in caches)
        assert torch.equal(ours, theirs) and torch.equal(ours_v, theirs_v)


@torch.no_grad()
def test_room_holds_what_transformers_own_cache_holds():
    draw = torch.Generator().manual_seed(0)
    caches = roomy_cache(), DynamicCache()
    for _ in range(2):
        add(caches, 2, 6, draw)
        add(caches, 2, 3, draw)  # room is made, and thrown away
        for cache in caches:
            cache.crop(-2)
            cache.batch_repeat_interleave(3)
        addresses = set()
        for step in range(50):
            add(caches, 6, 1, draw)
            addresses.add(caches[0].layers[0].keys.data_ptr())
            beams = torch.randint(3, (6,), generator=draw) + torch.tensor([0, 0, 0, 3, 3, 3])
            for cache in caches:
                cache.reorder_cache(beams)
            if step == 20:
                for cache in caches:
                    cache.crop(-4)
        assert len(addresses) == 2  # 7 + 33 tokens fit, then it grows once
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 53
        for cache in caches:
            cache.batch_select_indices(torch.tensor([5, 0]))
        add(caches, 2, 4, draw)
        for cache in caches:
            cache.reset()
        assert caches[0].get_seq_length() == 0


@pytest.mark.parametrize(
    ("family", "decoding"),
    [("bert", "next_token"), ("roberta", "mask"), ("albert", "next_token"), ("modernbert", "next_token")],
)
def test_beams_and_samples_share_the_reading_of_their_source(tiny_model, family, decoding):
    model = tiny_model(family, decoding=decoding)
    source = torch.randint(FIRST, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))
    source[:, -1], source[1, :3], fed = SEP, PAD, []
    table = model.get_input_embeddings()
    options = dict(max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    for search in (dict(num_beams=4, num_return_sequences=2), dict(do_sample=True, num_return_sequences=4)):
        found = []
        for cache in ({}, dict(past_key_values=DynamicCache())):
            torch.manual_seed(0)
            handle = table.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[0]))
            found.append(model.generate(source, **search, **options, **cache))
            handle.remove()
        assert fed == [3] + [12] * 5 + [12] * 6
        fed.clear()
        assert torch.equal(found[0].sequences, found[1].sequences)
        torch.testing.assert_close(found[0].scores, found[1].scores, atol=1e-5, rtol=0)
        states = model.generate(source, **search, **options, output_hidden_states=True).hidden_states
        assert states[0][-1].shape[0] == 12  # of every copy
