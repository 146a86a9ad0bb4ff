"""Cached decoding of every family equals encoding each row anew, alone, without padding, by transformers' own class."""

import pytest
import torch

from lightning_plugins.unilm.backbones import FAMILIES

PAD, SEP, MASK, FIRST, VOCABULARY = 1, 3, 4, 5, 48
NEW, WINDOW = 6, 4
SOURCES = (9, 5, 7)
CACHELESS = ("mpnet", "squeezebert", "luke", "ibert", "tapas")
EAGER_ONLY = (*CACHELESS, "rembert", "roformer", "megatron-bert", "big_bird")
CLOSE = 3e-6  # the models are float64, but generate() gives their logits, of about 1, in fp32


def sources():
    """``(B, T)`` ids and mask; padded on the right, on the left, and on both sides."""
    ids, real = torch.full((3, 9), PAD), torch.zeros(3, 9, dtype=torch.long)
    for b, (length, start) in enumerate(zip(SOURCES, (0, 4, 1), strict=True)):
        generator = torch.Generator().manual_seed(b)
        ids[b, start : start + length - 1] = torch.randint(FIRST, VOCABULARY, (length - 1,), generator=generator)
        ids[b, start + length - 1] = SEP
        real[b, start : start + length] = 1
    return ids, real


def additive(allow):
    zeros = torch.zeros(allow.shape, dtype=torch.float64)
    return zeros.masked_fill(~allow, torch.finfo(torch.float64).min)[None, None]


def encode_anew(plain, tokens, num_source):
    """Logits ``(T, V)`` of one row by the stock class, under a mask written out by the definition."""
    T = len(tokens)
    allow = torch.tensor([[j < num_source or (j <= i and i >= num_source) for j in range(T)] for i in range(T)])
    mask = additive(allow)
    if plain.config.model_type == "modernbert":
        near = torch.tensor([[abs(i - j) <= WINDOW for j in range(T)] for i in range(T)])
        mask = {"full_attention": mask, "sliding_attention": additive(allow & near)}
    types = torch.tensor([[int(i >= num_source - 1) for i in range(T)]])  # the source's last [SEP] opens the target
    columns = len(getattr(plain.config, "type_vocab_sizes", []))
    num_types = plain.config.type_vocab_sizes[0] if columns else getattr(plain.config, "type_vocab_size", 0)
    given = {}
    if num_types >= 2:
        given["token_type_ids"] = torch.nn.functional.pad(types[..., None], (0, columns - 1)) if columns else types
    with torch.no_grad():
        return plain(tokens[None], attention_mask=mask, **given).logits[0]


def expected_logits(plain, source, targets, decoding):
    """What must be predicted at each step: ``(new tokens, V)``."""
    if decoding == "next_token":
        return encode_anew(plain, torch.cat([source, targets]), len(source))[len(source) - 1 : -1]
    steps = [torch.cat([source, targets[:t], torch.tensor([MASK])]) for t in range(len(targets))]
    return torch.stack([encode_anew(plain, tokens, len(source))[-1] for tokens in steps])


def decode(model, **options):
    """Greedy tokens ``(B, NEW)`` and raw logits ``(B, NEW, V)``, and how many tokens each step fed."""
    ids, real = sources()
    fed = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda m, inputs: fed.append(inputs[0].shape[1]))
    out = model.generate(
        ids,
        attention_mask=real,
        max_new_tokens=NEW,
        suppress_tokens=[PAD, SEP, MASK],  # so that no row ends; the logits are those before
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    handle.remove()
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1), fed


RUNS = [(family, kind) for family in FAMILIES for kind in (("eager",) if family in EAGER_ONLY else ("sdpa", "eager"))]


@pytest.mark.parametrize("decoding", ["next_token", "mask"])
@pytest.mark.parametrize(("family", "implementation"), RUNS)
def test_each_step_is_what_encoding_the_row_anew_says(tiny_model, stock_model, family, implementation, decoding):
    model = tiny_model(family, attn_implementation=implementation, decoding=decoding)
    plain = stock_model(family)
    tokens, logits, fed = decode(model)
    extra = int(decoding == "mask")
    if family in CACHELESS:
        assert fed == [9 + extra + t for t in range(NEW)]
    else:
        assert fed == [9 + extra] + [1 + extra] * (NEW - 1)  # the source once, then one token a step
    ids, real = sources()
    for b in range(3):
        expected = expected_logits(plain, ids[b][real[b].bool()], tokens[b], decoding).float()
        torch.testing.assert_close(logits[b], expected, atol=CLOSE, rtol=0)
        expected[:, [PAD, SEP, MASK]] = -torch.inf
        assert torch.equal(tokens[b], expected.argmax(-1))
    if implementation == "eager" and family not in CACHELESS:
        without, logits_without, fed = decode(model, use_cache=False)
        assert torch.equal(without, tokens) and fed == [9 + extra + t for t in range(NEW)]
        torch.testing.assert_close(logits_without, logits, atol=CLOSE, rtol=0)
