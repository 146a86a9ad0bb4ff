"""Tiny random models of every family, built once: two layers, hidden size 32, weights large enough to show a leak."""

import functools

import pytest
import torch

PAD, CLS, SEP, MASK, FIRST, VOCABULARY = 1, 2, 3, 4, 5, 48  # FIRST: the first ordinary token; 0 has no meaning
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=40,
    pad_token_id=PAD,
    initializer_range=0.2,
)
OWN_SIZES = {
    "albert": dict(embedding_size=16),
    "big_bird": dict(attention_type="original_full"),
    "electra": dict(embedding_size=16),
    "esmc": dict(num_key_value_heads=2, head_dim=16),
    "eurobert": dict(num_key_value_heads=1, head_dim=16),
    "luke": dict(entity_vocab_size=5, entity_emb_size=16),
    "mobilebert": dict(embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=1),
    "modernbert": dict(local_attention=8, layer_types=["full_attention", "sliding_attention"]),
    "nomic_bert": dict(head_dim=16),
    "rembert": dict(input_embedding_size=16, output_embedding_size=24),
    "roformer": dict(embedding_size=16),
    "squeezebert": dict(embedding_size=32),
}


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    torch.set_num_threads(1)  # tiny models only wait for a second one


@pytest.fixture(scope="session")
def tiny_config():
    """``tiny_config(family, **changes)``: a plain config dict."""
    return lambda family, **changes: {"model_type": family, **SIZES, **OWN_SIZES.get(family, {}), **changes}


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """``tiny_model(family, attn_implementation=..., segment=..., decoding=...)``: in eval mode, the same each time.

    In float64: what differs by more than 1e-10 differs by an error.
    """
    from lightning_plugins.unilm.loading import load_unilm

    @functools.cache
    def build(family, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = dict(pad_token_id=PAD, sep_token_id=SEP, mask_token_id=MASK)
            return load_unilm(config=tiny_config(family), **ids, **options).double().eval()

    return build


@pytest.fixture(scope="session")
def stock_model(tiny_config, tiny_model):
    """``stock_model(family)``: transformers' own masked language model, an encoder, with ``tiny_model``'s weights."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    @functools.cache
    def build(family):
        config = AutoConfig.for_model(**tiny_config(family))
        with torch.random.fork_rng():
            made = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").double().eval()
        assert not getattr(made.config, "is_decoder", False)
        made.load_state_dict(tiny_model(family).state_dict())
        return made

    return build
