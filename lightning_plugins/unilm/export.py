"""A folder that plain transformers loads and runs: weights, tokenizer, generation settings and a model card."""

import copy
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins.core.markdown import markdown_table, markdown_text
from lightning_plugins.core.new_folder import new_folder
from lightning_plugins.unilm.backbones import position_offset
from lightning_plugins.unilm.generation_options import refuse_plain_generation

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TESTED = ("4.57.6", "5.2.0", "5.23.0")
"""Versions of transformers, oldest and newest among them, in which ``make test-clients`` runs the folders."""

_GENERATE = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
{positions}
texts = ["a first source", "another source, which is longer than the first"]
inputs = tokenizer(texts, padding=True, truncation=True, max_length={longest}, return_tensors="pt")
with torch.no_grad():
    output = model.generate(**inputs)
print(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_POSITIONS = """places = model.base_model.embeddings.position_embeddings  # of a family that counts from {first}, not 0
places.register_forward_pre_hook(lambda _, ids: (ids[0] + {first},))
"""
_LOAD = """from transformers import AutoTokenizer
from lightning_plugins.unilm.loading import load_unilm

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = load_unilm(
    folder,
    pad_token_id=tokenizer.pad_token_id,
    sep_token_id=tokenizer.sep_token_id,
    mask_token_id=tokenizer.mask_token_id,
    segment="{segment}",
    decoding="{decoding}",
).eval()

texts = ["a first source", "another source, which is longer than the first"]
inputs = tokenizer(texts, padding=True, truncation=True, max_length={longest}, return_tensors="pt")
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"])
print(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_CAUTIONS = """transformers is all it needs: tested with {versions}; 5.0 and 5.1 are no good. It stays exact with greedy
search, beams, sampling, streaming and constraints, as long as these stay as they are:

- `is_decoder=False`: the advice to set `is_decoder=True`, which loading prints, would hide the source's later words
  from its earlier ones.
- padding on the left (the tokenizer's setting), and the token types that the tokenizer gives.
- the default cache: no `use_cache=False`, static cache, prompt lookup or chunked prefill.
{positions}
`pipeline("text-generation")` writes other texts without a word: it leaves out token types and positions, and older
versions of it sample and pass over the length that this folder sets."""
_FOR_GENERATE = """\
- the line about positions, which is for `generate()`: any other call without `position_ids` would count twice.
"""
_ONLY_HERE = {"use_cache", "cache_implementation", "cache_config", "prompt_lookup_num_tokens"}  # the same tokens anyway


def export_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    generation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    name: str = "a masked language model",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model of :func:`load_unilm` for plain transformers.

    ``AutoModelForCausalLM.from_pretrained(folder).generate(**inputs)`` then gives the tokens that the model gives here,
    where the scheme ``sep_as_bos`` (or ``none``) makes that possible and the family has a CausalLM class; families that
    count positions from the padding's on need a line that their model card has. Otherwise ``AutoModelForCausalLM``
    refuses the folder, and the model card says how to load it with this package. ``AutoModelForMaskedLM`` loads every
    folder.

    The files are written to a folder beside it, called ``<folder>.partial-...``, which becomes ``folder`` when it is
    complete: an interrupted export leaves no half of a model under the name.

    Args:
        model: the trained model, which is not changed.
        tokenizer: its fast tokenizer, which is not changed; the folder's pads on the left and gives the scheme's
            token types.
        folder: path of a new or empty folder.
        metrics: results for the model card, by name (``val/rougeL``).
        generation: default options of ``generate()``, such as ``max_new_tokens`` (64 by default) and ``num_beams``;
            where it names none, those of ``model.generation_config``. Options of the cache are left out: they change no
            token here, but those of plain ``generate()``.
        training: data and hyperparameters for the model card, by name.
        name: what the training started from, for the model card.
        state_dict: full weights, gathered, where the model's own are sharded (FSDP2).

    Returns:
        The folder.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
        OSError: the system could not write it.
        ValueError: ``state_dict`` is not the model's or is missing though the model is sharded; the tokenizer is not
            the model's, or not fast; ``max_new_tokens`` leaves no room for a source.
    """
    folder = Path(folder).resolve()
    options = {**_options_set(model.generation_config), **(generation or {})}
    options = {name: value for name, value in options.items() if name not in _ONLY_HERE}
    options = {"max_new_tokens": min(64, model.max_length // 2), **options}
    if options["max_new_tokens"] >= model.max_length:
        raise ValueError(
            f"generation has max_new_tokens={options['max_new_tokens']}, which leaves no room for a source in the "
            f"model's {model.max_length} positions."
        )
    plain = _plain_tokenizer(tokenizer, model)
    card = _card(model, metrics or {}, options["max_new_tokens"], training or {}, name)
    if not model.exportable and model.backbone.cache == "own":
        warnings.warn(
            f"Exported with segment={model.settings.segment!r} and decoding={model.settings.decoding!r}, the model "
            "cannot be exact in plain generate(), and AutoModelForCausalLM refuses the folder: its model card shows "
            "how to load it with load_unilm.",
            stacklevel=2,
        )
    with new_folder(folder) as partial:
        _write_weights(model, state_dict, partial)
        _generation_config(model, options).save_pretrained(partial)
        if not model.exportable:
            refuse_plain_generation(partial)
        _write_tokenizer(plain, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def _write_weights(model: "PreTrainedModel", state_dict: Mapping[str, Tensor] | None, folder: Path) -> None:
    """``config.json`` and ``model.safetensors`` of the family's own class."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        stock = model.backbone.stock._from_config(config, dtype=model.dtype, attn_implementation="eager")
    if hasattr(config, "is_decoder"):  # set late, as building the class without it gives wrong advice
        stock.config.is_decoder = False  # so plain transformers reads the source in both directions
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    if wrong := sorted(stock.state_dict().keys() ^ weights.keys()):
        raise ValueError(f"state_dict is not this model's: {len(wrong)} names differ, such as {wrong[0]!r}.")
    if state_dict is None and any(hasattr(weight, "full_tensor") for weight in weights.values()):
        raise ValueError("The model's weights are sharded over processes: give state_dict, gathered on all of them.")
    for tied, source in stock.all_tied_weights_keys.items():
        if torch.equal(weights[tied], weights[source]):
            del weights[tied]  # loading ties them again; gathered weights hold them twice
    stock.save_pretrained(folder, state_dict=weights)


def _options_set(config: "GenerationConfig") -> dict[str, Any]:
    """The options that ``generate()`` would follow; a total length gives way to new tokens."""
    left_out = ("transformers_version", "max_length")
    every = config.to_diff_dict().items()
    return {k: v for k, v in every if v is not None and v is not False and k not in left_out and k[0] != "_"}


def _generation_config(model: "PreTrainedModel", generation: Mapping[str, Any]) -> Any:
    from transformers import GenerationConfig

    settings = model.settings
    ids = {"eos_token_id": settings.sep_token_id, "pad_token_id": settings.pad_token_id}
    return GenerationConfig(**{**ids, "do_sample": False, **generation})  # a pipeline samples where nothing is said


def _plain_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> "PreTrainedTokenizerBase":
    """The tokenizer with left padding whose token types are the scheme's, as a class that keeps them when loaded.

    Those of the families (``BertTokenizer``) put their own post-processor back.
    """
    from transformers import PreTrainedTokenizerFast

    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: export needs one that it can set up.")
    if (highest := max(tokenizer.get_vocab().values())) >= model.config.vocab_size:
        size = model.config.vocab_size
        raise ValueError(f"The tokenizer knows token {highest}, the model only {size} tokens: not its tokenizer.")
    backend: Any = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    inputs = ["input_ids", "attention_mask"]
    row = tokenizer("a")
    if row["input_ids"][-1] != model.settings.sep_token_id:
        raise ValueError(f"{type(tokenizer).__name__} does not end a text with the model's [SEP]: not its tokenizer.")
    if model.settings.segment == "sep_as_bos":
        from tokenizers.processors import TemplateProcessing

        single, pair = _template(tokenizer, row), _template(tokenizer, tokenizer("a", "a"))
        tokens = {piece.rpartition(":")[0] for piece in (*single, *pair) if not piece.startswith("$")}
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in sorted(tokens)]
        backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)
        inputs.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model.max_length,
        padding_side="left",
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_input_names=inputs,
        extra_special_tokens=tokenizer.extra_special_tokens,
        **tokenizer.special_tokens_map,
    )


def _write_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """The tokenizer's files, with the names that transformers 4 and 5 both read."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if extra := settings.pop("extra_special_tokens", None):
        settings["additional_special_tokens"] = extra
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _template(tokenizer: "PreTrainedTokenizerBase", row: Any) -> list[str]:
    """How the tokenizer frames texts, read off a row: ``[CLS]:0 $A:0 [SEP]:1``, type 1 for the last token alone."""
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    pieces: list[str] = []
    for token, sequence in zip(tokens, row.sequence_ids(), strict=True):
        piece = f"{token}:0" if sequence is None else f"${'AB'[sequence]}:0"
        if sequence is None or piece not in pieces:
            pieces.append(piece)
    return [*pieces[:-1], f"{pieces[-1].removesuffix(':0')}:1"]


# The model card.


def _card(
    model: "PreTrainedModel",
    metrics: Mapping[str, float],
    max_new_tokens: int,
    training: Mapping[str, Any],
    name: str,
) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    local = Path(name).expanduser().exists()  # of whose path the card tells only the last part
    hub_id = not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    parts = [
        _front_matter(metrics, name if hub_id else None),
        "# A sequence-to-sequence model by its attention mask (UniLM)",
        f"A `{model.backbone.model_type}` encoder of {millions:.1f} million parameters that writes text: it reads the "
        "source in both\ndirections and the target from left to right, in one network (Dong et al. 2019, "
        f"arXiv 1905.03197).\nThe training started from {markdown_text(Path(name).name if local else name)}.",
        _usage(model, max_new_tokens),
    ]
    if metrics:
        rows = [(key, f"{value:.4g}") for key, value in metrics.items()]
        parts.append("## Results\n\n" + markdown_table(("metric", "value"), rows))
    if training:
        parts.append("## Training\n\n" + markdown_table(("setting", "value"), [*training.items()]))
    return "\n\n".join(parts) + "\n"


def _front_matter(metrics: Mapping[str, float], base_model: str | None) -> str:
    """The Hub's YAML header; JSON strings are YAML strings."""
    names = dict.fromkeys(re.sub(r"^rouge.*", "rouge", key.rpartition("/")[2]) for key in metrics)
    lists = {"tags": ["unilm", "seq2seq"], "metrics": names}
    lines = ["library_name: transformers", "pipeline_tag: other"]  # no pipeline decodes as the card does
    if base_model:
        lines.append(f"base_model: {json.dumps(base_model)}")
    for key, values in lists.items():
        if values:
            lines += [f"{key}:", *(f"- {json.dumps(value, ensure_ascii=False)}" for value in values)]
    return "\n".join(["---", *lines, "---"])


def _usage(model: "PreTrainedModel", max_new_tokens: int) -> str:
    settings, offset = model.settings, position_offset(model)
    longest = model.max_length - max_new_tokens
    if model.exportable:
        positions = _POSITIONS.format(first=offset) if offset else ""
        versions = f"{', '.join(TESTED[:-1])} and {TESTED[-1]}"
        cautions = _CAUTIONS.format(versions=versions, positions=_FOR_GENERATE if offset else "")
        return f"## Use\n\n```python\n{_GENERATE.format(longest=longest, positions=positions)}```\n\n{cautions}"
    if model.backbone.cache != "own":
        why = f"transformers has no class that generates with `{model.backbone.model_type}`"
    elif settings.decoding == "mask":
        why = "it writes by filling a [MASK] at every step, which plain `generate()` does not append"
    else:
        why = f"its token types (`{settings.segment}`) are not those that plain `generate()` gives to new tokens"
    snippet = _LOAD.format(longest=longest, segment=settings.segment, decoding=settings.decoding)
    return (
        f"## Use\n\nGeneration needs the package `lightning_plugins`: {why}.\n`AutoModelForMaskedLM` loads the weights."
        f"\n\n```python\n{snippet}```"
    )
