"""Which encoders obey a mask of one's own, and what each of them wants to be told.

Positions, token types, attention implementations and caches are read from the class and the configuration of the
model. Only what cannot be read stands in the tables below.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins.core.modes import evaluating
from lightning_plugins.unilm.masks import segments_from_lengths, seq2seq_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Cache = Literal["own", "attention", "none"]

# Families (model_type) whose outputs depend on what the mask allows, and on nothing else.
FAMILIES = (
    *("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "ernie", "data2vec-text"),
    *("roberta-prelayernorm", "rembert", "roformer", "megatron-bert", "big_bird"),
    *("distilbert", "albert", "nomic_bert", "gte", "eurobert", "modernbert", "esmc"),
    *("mpnet", "squeezebert", "luke", "ibert", "tapas"),
)
_REFUSED = {
    "convbert": "ConvBERT's convolutions read the neighbours of a token whatever the mask",
    "mobilebert": "MobileBERT's embeddings join each token with its neighbours whatever the mask",
    "fnet": "FNet mixes all tokens by a Fourier transform and has no attention to mask",
    "nystromformer": "Nyströmformer's landmarks average over all tokens whatever the mask",
    "longformer": "Longformer's windowed attention takes no mask for each pair of tokens",
    "yoso": "YOSO's hashed attention takes no mask for each pair of tokens",
    "deberta": "DeBERTa takes a mask of padding only",
    "deberta-v2": "DeBERTa-v2 takes a mask of padding only",
}
_BY_PLACE = {"roformer", "mpnet"}  # distances are counted in places of the row, whatever position_ids say
_TYPE_COLUMNS = {"tapas": 7}  # token types of several kinds; the first is the segment
_UNREAD = ("pooler.", "entity_", "w2e_", "e2w_", "e2e_")  # parts of names: what no logit of a word depends on


@dataclass(frozen=True)
class Backbone:
    """What one family wants to be told.

    Attributes:
        model_type: transformers' name of the family.
        stock: its class with a language-modelling head: the CausalLM one, or the MaskedLM one where there is none.
        cache: ``own``, the class keeps keys and values itself; ``attention``, its attention functions can be given a
            cache; ``none``, every decoding step encodes the whole row.
        implementations: values of ``attn_implementation``, the fastest first.
        takes_position_ids: whether ``forward`` has the argument.
        free_positions: whether two tokens may stand at one position, as pseudo copies do; ``False`` where distances
            are counted in places of the row.
        num_token_types: rows of the table of token types, 0 without one.
        type_columns: 0, or into how many kinds of types the segment must be embedded.
        window: distance up to which some layers see, ``None`` without such layers.
    """

    model_type: str
    stock: type
    cache: Cache
    implementations: tuple[str, ...]
    takes_position_ids: bool
    free_positions: bool
    num_token_types: int
    type_columns: int
    window: int | None


def check_family(model_type: str) -> None:
    """Refuse a family by its name.

    Raises:
        ValueError: if it leaks whatever the mask, or is not known to be free of leaks.
    """
    if model_type in _REFUSED:
        raise ValueError(
            f"model_type={model_type!r} cannot be used: {_REFUSED[model_type]}. Choose another, as 'bert'."
        )
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not known to obey a mask; known are {', '.join(FAMILIES)}.")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what transformers would pass over: it keeps any name, and the default is trained.

    Args:
        config: configuration of a network from scratch, with ``model_type``.

    Raises:
        ValueError: an unknown family, or a name that its configuration does not have.
    """
    from difflib import get_close_matches

    from transformers import AutoConfig

    if "model_type" not in config:
        raise ValueError("config has no model_type, the family's name such as 'bert'.")
    check_family(config["model_type"])
    family = AutoConfig.for_model(config["model_type"])
    known = {*family.to_dict(), *vars(family), *family.attribute_map}
    for name in config:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out."
            raise ValueError(f"config: {config['model_type']!r} has no {name!r}; {hint}")


def find_backbone(config: "PreTrainedConfig") -> Backbone:
    """The facts of a configuration's family.

    Raises:
        ValueError: if the family leaks whatever the mask, or is not known to be free of leaks.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    name = config.model_type
    check_family(name)
    if getattr(config, "rotary_value", False):
        raise ValueError(f"rotary_value=True of {name!r} makes its values depend on padding; only False is exact.")
    if "relative_key" in str(kind := getattr(config, "position_embedding_type", None)):
        raise ValueError(
            f"position_embedding_type={kind!r} of {name!r} is not in transformers 5, which would leave out its trained "
            "distances without a word; only 'absolute' is exact."
        )
    has_decoder = type(config) in AutoModelForCausalLM._model_mapping
    stock = (AutoModelForCausalLM if has_decoder else AutoModelForMaskedLM)._model_mapping[type(config)]
    arguments = inspect.signature(stock.forward).parameters
    is_modern = stock._supports_attention_backend
    sizes = getattr(config, "type_vocab_sizes", None) or [getattr(config, "type_vocab_size", 0)]
    return Backbone(
        model_type=name,
        stock=stock,
        cache="own" if has_decoder else "attention" if is_modern else "none",
        implementations=("sdpa", "eager", "flex_attention") if is_modern else ("eager",),
        takes_position_ids="position_ids" in arguments,
        free_positions=name not in _BY_PLACE,
        num_token_types=sizes[0] if "token_type_ids" in arguments else 0,
        type_columns=_TYPE_COLUMNS.get(name, 0),
        window=config.sliding_window if "sliding_attention" in (getattr(config, "layer_types", None) or ()) else None,
    )


def choose_implementation(backbone: Backbone, attn_implementation: str | None) -> str:
    """The attention implementation to load a model with.

    Args:
        backbone: facts of the model's family.
        attn_implementation: the user's choice; the fastest that obeys every mask by default.

    Raises:
        ValueError: if that implementation cannot take the mask, or the machine cannot run it.
    """
    if attn_implementation is None:
        return backbone.implementations[0]
    if attn_implementation not in backbone.implementations:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} cannot take UniLM's mask in {backbone.model_type!r}; "
            f"use one of {', '.join(map(repr, backbone.implementations))}."
        )
    if attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise ValueError("attn_implementation='flex_attention' needs a GPU (on CPU it ends the process); use 'sdpa'.")
    return attn_implementation


def position_table(model: "PreTrainedModel") -> nn.Module | None:
    """The model's table of learned absolute positions, or ``None`` (rotary positions)."""
    named = model.base_model.named_modules()
    return next((m for name, m in named if name.endswith("position_embeddings") and hasattr(m, "weight")), None)


def position_offset(model: "PreTrainedModel") -> int:
    """Row of the table at which positions begin: behind the padding's in RoBERTa and its kin, else 0."""
    padding = getattr(position_table(model), "padding_idx", None)
    return 0 if padding is None else padding + 1


def num_positions(model: "PreTrainedModel") -> int:
    """The most tokens that a sample may have."""
    table = position_table(model)
    if table is None:
        return model.config.max_position_embeddings
    return table.weight.shape[0] - position_offset(model)


def freeze_unread(model: "PreTrainedModel") -> None:
    """Freeze weights that no logit depends on (poolers, LUKE's entities): DDP would wait for their gradients."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in _UNREAD):
            parameter.requires_grad_(False)


@torch.no_grad()
def check_for_leaks(model: "PreTrainedModel") -> None:
    """Run the model on rows that differ in one token, and refuse it if others notice that may not see it.

    Args:
        model: on any device; dropout is switched off for the check. torch's global random state is not touched.

    Raises:
        ValueError: if a token depends on one that its mask hides, or the mask hides what it should show.
    """
    num_source, num_target, V = 5, 4, model.config.vocab_size
    segments = segments_from_lengths([num_source] * 3, [num_target] * 3).to(model.device)
    ids = torch.randint(V, (1, segments.shape[1]), generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    changed = [None, num_source + num_target - 1, num_source - 1]  # nothing, the last target token, the last of source
    for row, place in enumerate(changed):
        if place is not None:
            ids[row, place] = (ids[row, place] + V // 2) % V
    with evaluating(model):
        logits = model(ids.to(model.device), attention_mask=seq2seq_mask(segments)).logits.float()
    effect = (logits[1:] - logits[:1]).abs().amax(-1)  # (2, T)
    hidden, seen = effect[0, :-1].max(), torch.minimum(effect[0, -1], effect[1, :num_source].min())
    name = model.config.model_type
    if not hidden < 0.01 * effect[0, -1]:
        raise ValueError(f"model_type={name!r} leaks: a token changes the outputs of tokens that may not see it.")
    if not seen > 0:
        raise ValueError(f"model_type={name!r} does not read its source in both directions; choose another, or 'bert'.")


def fitting_types(types: Tensor | None, backbone: Backbone) -> Tensor | None:
    """Token types ``(B, T)`` in the form the family takes: ``None``, ``(B, T)``, or ``(B, T, columns)``."""
    if types is None or not backbone.num_token_types:
        return None
    if not backbone.type_columns:
        return types
    return torch.nn.functional.pad(types[..., None], (0, backbone.type_columns - 1))
