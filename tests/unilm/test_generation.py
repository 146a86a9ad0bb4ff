"""generate() against the stock encoders, which encode each sample's whole row anew, alone and without padding."""

import copy
import logging
import pickle

import pytest
import torch
from torch.nn.functional import log_softmax, pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    TextIteratorStreamer,
)

from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import seq2seq_mask

PAD, SEP, MASK, FIRST, VOCABULARY = 1, 3, 4, 5, 48
IDS = dict(pad_token_id=PAD, sep_token_id=SEP, mask_token_id=MASK)
LENGTHS, NEW = (9, 5, 7), 6
STEPS = dict(max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
CASES = [
    ("bert", "sdpa"),
    ("bert", "eager"),
    ("roberta", "sdpa"),
    ("roberta", "eager"),
    ("albert", "sdpa"),
    ("modernbert", "eager"),
    ("roformer", "eager"),
    ("squeezebert", "eager"),
]


def sources(side="right", lengths=LENGTHS):
    draw = torch.Generator().manual_seed(1)
    rows = [
        torch.cat([torch.randint(FIRST, VOCABULARY, (n - 1,), generator=draw), torch.tensor([SEP])]) for n in lengths
    ]
    gaps = [max(lengths) - n for n in lengths]
    return torch.stack(
        [pad(row, (0, gap) if side == "right" else (gap, 0), value=PAD) for row, gap in zip(rows, gaps, strict=True)]
    )


class Reference:
    """The stock MaskedLM class with the same weights, fed one unpadded row with mask, positions and types by hand."""

    def __init__(self, model):
        config = copy.deepcopy(model.config)
        config.is_decoder = False
        self.stock = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
        self.stock.load_state_dict(model.state_dict())
        self.family, self.appended = config.model_type, [MASK] if model.settings.decoding == "mask" else []
        self.scheme, self.window = model.settings.segment, getattr(config, "sliding_window", None)

    @torch.no_grad()
    def next_logits(self, source, target):
        """Logits of the token that follows ``target``."""
        row = torch.tensor([[*source, *target, *self.appended]])
        place, n = torch.arange(row.shape[1]), len(source)
        allow = (place < n) | (place <= place[:, None])
        inputs = {"input_ids": row}
        if self.family not in ("roformer",):
            inputs["position_ids"] = place[None] + (PAD + 1 if self.family == "roberta" else 0)
        if self.family != "modernbert" and self.scheme != "none":
            starts = {"sep_as_bos": n - 1, "su": n, "unilm_v1": n}[self.scheme]
            inputs["token_type_ids"] = (place >= starts).long()[None] + (4 if self.scheme == "unilm_v1" else 0)
        masks = {"full_attention": allow}
        if self.family == "modernbert":
            masks["sliding_attention"] = allow & ((place - place[:, None]).abs() <= self.window)
        masks = {kind: torch.zeros(1, 1, *m.shape).masked_fill(~m, torch.finfo().min) for kind, m in masks.items()}
        inputs["attention_mask"] = masks if self.family == "modernbert" else masks["full_attention"]
        return self.stock(**inputs).logits[0, -1]

    def score(self, source, target):
        """Log-probability of ``target``, up to its first [SEP]."""
        target = target[: target.index(SEP) + 1] if SEP in target else target
        logs = [log_softmax(self.next_logits(source, target[:i]), -1)[token] for i, token in enumerate(target)]
        return float(sum(logs)), len(logs)


def assert_steps_are_right(model, out, tolerance=1e-5):
    """Every step's logits are those of the stock encoder, and large enough that a wrong mask would show."""
    reference, logits = Reference(model), torch.stack(out.logits, 1)
    for i, n in enumerate(LENGTHS):
        source, target = sources()[i, :n].tolist(), out.sequences[i, max(LENGTHS) :].tolist()
        for t in range(NEW):
            expected = reference.next_logits(source, target[:t])
            torch.testing.assert_close(logits[i, t], expected, atol=tolerance, rtol=1e-5)
            masked_by_one_less = reference.next_logits(source[1:], target[:t])
            assert (masked_by_one_less - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_each_step_equals_encoding_its_sample_anew(tiny_model, family, kind):
    model = tiny_model(family, attn_implementation=kind)
    right = model.generate(sources("right"), **STEPS)
    assert_steps_are_right(model, right)
    assert torch.equal(right.sequences[:, : max(LENGTHS)], sources("left"))
    left = model.generate(sources("left"), attention_mask=sources("left").ne(PAD).long(), **STEPS)
    torch.testing.assert_close(torch.stack(left.logits), torch.stack(right.logits), atol=1e-5, rtol=0)
    anew = model.generate(sources(), use_cache=False, **STEPS)
    assert_steps_are_right(model, anew)
    if model.backbone.cache != "none":
        assert_steps_are_right(model, model.generate(sources(), cache_implementation="static", **STEPS))


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_explicit_mask_says_what_is_read_not_the_padding_token(tiny_model, use_cache):
    """A hidden token is as if it were not there, and a padding token that is not hidden is read."""
    model, source = tiny_model("bert"), sources(lengths=(7, 7))
    source[:, 2] = PAD
    mask = torch.ones_like(source)
    mask[1, 4] = 0
    out = model.generate(source, attention_mask=mask, use_cache=use_cache, **STEPS)
    reference, logits = Reference(model), torch.stack(out.logits, 1)
    for i, read in enumerate((source[0], torch.cat([source[1, :4], source[1, 5:]]))):
        target = out.sequences[i, 7:].tolist()
        for t in range(NEW):
            expected = reference.next_logits(read.tolist(), target[:t])
            torch.testing.assert_close(logits[i, t], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("segment", ["su", "unilm_v1", "none"])
def test_segment_schemes_hold_in_every_step(tiny_config, segment):
    torch.manual_seed(0)
    model = load_unilm(config=tiny_config("bert"), segment=segment, **IDS).eval()
    if segment == "unilm_v1":  # the new types start as copies of the old
        torch.nn.init.normal_(model.bert.embeddings.token_type_embeddings.weight)
    assert_steps_are_right(model, model.generate(sources(), **STEPS))


@pytest.mark.parametrize(
    ("family", "decoding"), [("bert", "next_token"), ("albert", "next_token"), ("roberta", "mask")]
)
def test_beam_scores_are_the_log_probabilities_of_their_sequences(tiny_model, family, decoding):
    model = tiny_model(family, decoding=decoding)
    options = dict(num_beams=4, num_return_sequences=2, max_new_tokens=NEW, no_repeat_ngram_size=2)
    out = model.generate(sources(), return_dict_in_generate=True, output_scores=True, **options)
    reference = Reference(model)
    for i, (row, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        n = LENGTHS[i // 2]
        total, length = reference.score(sources()[i // 2, :n].tolist(), row[max(LENGTHS) :].tolist())
        assert float(score) == pytest.approx(total / length, abs=1e-5)
    assert torch.equal(model.generate(sources(), use_cache=False, **options), out.sequences)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_mask_decoding_predicts_at_a_mask_behind_the_known_tokens(tiny_model, family):
    model = tiny_model(family, decoding="mask")
    assert_steps_are_right(model, model.generate(sources(), **STEPS))
    assert_steps_are_right(model, model.generate(sources("left"), use_cache=False, **STEPS))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(sources(), do_sample=True, max_new_tokens=NEW, use_cache=use_cache))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_sampling_lookup_and_assistance_give_the_tokens_of_plain_decoding(tiny_model, family):
    model = tiny_model(family)
    drawn = []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        drawn.append(model.generate(sources(), do_sample=True, num_return_sequences=3, max_new_tokens=NEW, **options))
    assert drawn[0].shape[0] == 9 and len(drawn[0].unique(dim=0)) > 3
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    source = sources(lengths=(7,))
    greedy = model.generate(source, max_new_tokens=12, min_new_tokens=12)
    lengths = dict(max_new_tokens=12, min_new_tokens=12)
    assert torch.equal(model.generate(source, prompt_lookup_num_tokens=3, **lengths), greedy)
    other = tiny_model("bert", segment="none")  # guesses wrong, so that the cache is cropped
    assert torch.equal(model.generate(source, assistant_model=other, **lengths), greedy)


def test_what_stock_generate_offers_besides(tiny_model, tiny_config):
    model, source = tiny_model("bert"), sources(lengths=(7,))
    allowed = [6, 7, SEP]
    out = model.generate(sources(), prefix_allowed_tokens_fn=lambda batch, ids: allowed, max_new_tokens=NEW)
    assert set(out[:, max(LENGTHS) :].flatten().tolist()) <= {*allowed, PAD}
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=4)
    assert model.generate(source, generation_config=config).shape == (1, 11)
    assert tiny_model("squeezebert").generate(source, generation_config=config).shape == (1, 11)
    assert config.use_cache is None or config.use_cache is True  # the caller's own is left alone
    assert model.generate(inputs=source, token_type_ids=source, max_length=9, min_length=9).shape == (1, 9)
    full = model.generate(source, min_new_tokens=model.max_length - 7)  # no length: as far as the positions go
    assert full.shape == (1, model.max_length)

    class Tokenizer:
        def decode(self, ids, **options):
            return "".join(f"{i} " for i in torch.as_tensor(ids).tolist())

    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)
    out = model.generate(source, streamer=streamer, max_new_tokens=4, min_new_tokens=4)
    assert "".join(streamer).split() == [str(i) for i in out[0, 7:].tolist()]


@pytest.mark.parametrize(
    ("family", "decoding", "options", "words"),
    [
        ("bert", "next_token", dict(prefill_chunk_size=2), "prefill_chunk_size=2 is not possible: the source must be"),
        ("bert", "next_token", dict(guidance_scale=1.5), "guidance_scale=1.5 is not possible"),
        ("bert", "next_token", dict(max_new_tokens=32), "9 tokens and 32 new ones do not fit the model's 40 positions"),
        ("roberta", "next_token", dict(max_new_tokens=30), "do not fit the model's 38 positions"),
        ("bert", "next_token", dict(max_length=41), "9 tokens and 32 new ones do not fit"),
        ("bert", "next_token", dict(attention_mask=torch.ones(3, 9, 9)), "the mask between tokens is built here"),
        ("bert", "next_token", dict(attention_mask=torch.tensor([[1] * 9, [0] * 9, [1] * 9])), "token of row 1"),
        ("bert", "next_token", dict(cache_implementation="paged"), "causal masks of its own"),
        ("modernbert", "next_token", dict(cache_implementation="offloaded"), "loses keys of 'modernbert'"),
        ("mpnet", "next_token", dict(cache_implementation="static"), "'mpnet' encodes the whole row"),
        ("mpnet", "next_token", dict(prompt_lookup_num_tokens=2), "needs a cache, and 'mpnet'"),
        ("bert", "mask", dict(cache_implementation="static"), "not possible with decoding='mask'"),
        ("bert", "mask", dict(cache_implementation="offloaded_static"), "not possible with decoding='mask'"),
        ("bert", "mask", dict(prompt_lookup_num_tokens=2), "not possible with decoding='mask'"),
    ],
)
def test_what_cannot_be_right_is_refused(tiny_model, family, decoding, options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        tiny_model(family, decoding=decoding).generate(sources(), **options)


def test_other_ways_into_generation_are_refused(tiny_model):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="prefix_length is missing"):
        model.prepare_inputs_for_generation(sources())
    past = model(sources(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values must be empty"):
        model.generate(sources(), past_key_values=past, max_new_tokens=2)
    with pytest.raises(ValueError, match="rows of \\[CLS\\] source"):
        model.generate(max_new_tokens=2)


@pytest.mark.parametrize("family", ["bert", "distilbert", "squeezebert"])
def test_only_the_logits_asked_for_are_computed(tiny_model, family):
    model, ids = tiny_model(family), sources()
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    with torch.no_grad():
        every = model(ids).logits
        chosen = model(ids, logits_to_keep=wanted).logits
        last = model(ids, logits_to_keep=2).logits
    handle.remove()
    torch.testing.assert_close(chosen, every[wanted])
    torch.testing.assert_close(last, every[:, -2:])
    width = seen[0] // ids.numel()
    assert seen == [ids.numel() * width, int(wanted.sum()) * width, 3 * 2 * width]


def test_training_keeps_no_cache_and_takes_no_labels(tiny_model):
    model, ids = tiny_model("bert"), sources()
    assert model(ids).past_key_values is None and tiny_model("albert")(ids).past_key_values is None
    assert tiny_model("albert")(ids, use_cache=True).past_key_values.get_seq_length() == ids.shape[1]
    with pytest.raises(ValueError, match="labels are not taken"):
        model(ids, labels=ids)


def test_copies_and_checkpointing_change_nothing(tiny_config):
    torch.manual_seed(0)
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, ids = load_unilm(config=tiny_config("roberta", **still), **IDS), sources()
    inputs = dict(attention_mask=seq2seq_mask(ids.ne(PAD).long()), logits_to_keep=ids == SEP)
    expected = model(ids, **inputs).logits
    expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.base_model is not model.base_model and twin.max_length == model.max_length
        assert torch.equal(twin(ids, **inputs).logits, expected)
        assert torch.equal(twin.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    older = "gradient_checkpointing_enable"  # its name in transformers 5.20
    getattr(model.train(), "activation_checkpointing_enable", getattr(model, older))()
    model(ids, **inputs).logits.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_weights_of_a_folder_and_their_refusals(tmp_path, tiny_config):
    torch.manual_seed(0)
    stock = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**tiny_config("bert"))).eval()
    stock.save_pretrained(tmp_path / "mlm")
    model = load_unilm(str(tmp_path / "mlm"), vocab_size=VOCABULARY, **IDS).eval()
    ids = sources()
    expected = stock(ids, attention_mask=ids.ne(PAD).long()).logits
    torch.testing.assert_close(model(ids, attention_mask=ids.ne(PAD)).logits, expected)
    defaults = model.generation_config
    assert (defaults.eos_token_id, defaults.pad_token_id, defaults.bos_token_id) == (SEP, PAD, None)
    with pytest.raises(ValueError, match="vocab_size=49 of the tokenizer is more than the model's 48"):
        load_unilm(str(tmp_path / "mlm"), vocab_size=49, **IDS)
    with pytest.raises(ValueError, match="mask_token_id=48 is outside the model's vocabulary of 48"):
        load_unilm(str(tmp_path / "mlm"), **IDS | dict(mask_token_id=48))
    with pytest.raises(FileNotFoundError, match="No model called 'nothing/here'"):
        load_unilm("nothing/here", **IDS)


def test_a_checkpoint_saved_in_half_after_another_task(tmp_path, tiny_config):
    """fp32 again; a total length, a switched-off cache and cross-attention are not taken over, the search is."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config("bert"), is_decoder=True, add_cross_attention=True, use_cache=False)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    GenerationConfig(max_length=5, num_beams=3, use_cache=False, eos_token_id=[6, 7]).save_pretrained(tmp_path)
    model = load_unilm(str(tmp_path), **IDS).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not [name for name, _ in model.named_parameters() if "crossattention" in name]
    fed = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, out: fed.append(tuple(args[0].shape)))
    assert model.generate(sources(lengths=(7,)), min_new_tokens=4).shape[1] >= 11  # not ended at 5 tokens in all
    handle.remove()
    assert fed[:4] == [(1, 7), (3, 1), (3, 1), (3, 1)]  # the source once, then a token a step of three beams


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(model_name_or_path="x"), "not both or none"),
        (dict(config={"hidden_size": 32}), "config has no model_type"),
        (dict(segment="both"), "segment='both' must be one of sep_as_bos"),
        (dict(decoding="fast"), "decoding='fast' must be"),
        (dict(decoding="mask", mask_token_id=None), "mask_token_id must not be None"),
        (
            dict(attn_implementation="flash_attention_2"),
            "'flash_attention_2' cannot take UniLM's mask in 'bert'; use one",
        ),
        (dict(attn_implementation="flex_attention"), "needs a GPU"),
        (dict(pad_token_id=SEP), "pad_token_id and sep_token_id are both 3"),
        (dict(config={"model_type": "bert", "position_embedding_type": "relative_key"}), "not in transformers 5"),
    ],
)
def test_bad_arguments_get_a_sentence(tiny_config, monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        load_unilm(**{"config": tiny_config("bert"), **IDS, **options})
    if options.get("attn_implementation") == "flex_attention":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match="ends the process on CPU"):
            load_unilm(config=tiny_config("bert"), **IDS, **options)(sources())


@pytest.mark.parametrize(("family", "segment"), [("distilbert", "su"), ("tapas", "unilm_v1"), ("gte", "su")])
def test_schemes_need_token_types(tiny_config, family, segment):
    config = tiny_config(family) | ({"type_vocab_size": 1} if family == "gte" else {})
    with pytest.raises(ValueError, match=f"segment='{segment}' needs token types, of which '{family}' has"):
        load_unilm(config=config, segment=segment, **IDS)
    assert load_unilm(config=config, **IDS).settings.segment == ("sep_as_bos" if family == "tapas" else "none")


def test_loading_and_decoding_say_nothing_misleading(tiny_config):
    class Records(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said, handler, logger = [], Records(), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        models = [
            load_unilm(config=tiny_config(family), **IDS) for family in ("bert", "roberta", "modernbert", "albert")
        ]
        for model in models:
            model.generate(sources("right"), max_new_tokens=2)
    finally:
        logger.removeHandler(handler)
    assert said == []


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_half_precision_decodes(tiny_config, kind):
    torch.manual_seed(0)
    model = load_unilm(config=tiny_config("bert"), attn_implementation=kind, **IDS).eval()
    expected = torch.stack(model.generate(sources(), **STEPS).logits[:1])
    half = torch.stack(model.bfloat16().generate(sources(), **STEPS).logits[:1])
    torch.testing.assert_close(half, expected, atol=0.2, rtol=0.05)
