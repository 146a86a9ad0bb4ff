"""A pretrained encoder, or one from a configuration, as a sequence-to-sequence model."""

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_plugins.core import arguments as must
from lightning_plugins.core.pretrained import pretrained_folder, reason_of
from lightning_plugins.unilm.backbones import (
    Backbone,
    check_family,
    check_for_leaks,
    choose_implementation,
    find_backbone,
    freeze_unread,
)
from lightning_plugins.unilm.cached_attention import cached_name
from lightning_plugins.unilm.forward import Decoding, Settings, unilm_class
from lightning_plugins.unilm.generation_options import refused_generation
from lightning_plugins.unilm.surgery import extend_token_types
from lightning_plugins.unilm.token_types import NUM_V1_TYPES, Segment, fitting_segment

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PLACES = "Give an id of the Hub (its first use needs the network), a folder with a model, or package:NAME/FOLDER."


def load_unilm(
    model_name_or_path: str | None = None,
    config: dict[str, Any] | None = None,
    *,
    pad_token_id: int,
    sep_token_id: int,
    mask_token_id: int | None,
    vocab_size: int | None = None,
    segment: Segment = "sep_as_bos",
    decoding: Decoding = "next_token",
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """A sequence-to-sequence model from a masked language model, checked for leaks.

    Args:
        model_name_or_path: pretrained weights: an id of the Hub, a folder, or ``package:NAME/FOLDER``.
        config: configuration with ``model_type`` of a network with random weights, in place of pretrained ones.
        pad_token_id: the tokenizer's [PAD], which fills rows up.
        sep_token_id: the tokenizer's [SEP], which ends sources, targets and what ``generate()`` writes.
        mask_token_id: the tokenizer's [MASK], or ``None`` if it has none.
        vocab_size: tokens of the tokenizer. A model from ``config`` gets as many rows; weights must have at least as
            many.
        segment: scheme of the token types, see :func:`token_types`. A family with fewer than two types
            takes ``sep_as_bos`` as ``none``; for ``unilm_v1`` the table is extended to six.
        decoding: ``next_token``, or ``mask`` for models trained to fill [MASK]s (UniLM v1 and v2).
        attn_implementation: ``sdpa``, ``eager`` or, on a GPU, ``flex_attention``; by default the fastest that the
            family has.

    Returns:
        A ``PreTrainedModel`` with :class:`UniLMMixin`, in fp32 (torch's default dtype).

    Raises:
        ValueError: an unknown name, a family that leaks, or ids outside the vocabulary.
        FileNotFoundError: nothing readable at ``model_name_or_path``.
    """
    if (model_name_or_path is None) == (config is None):
        raise ValueError("Give either model_name_or_path (weights) or config (random weights), not both or none.")
    must.one_of(Decoding)("decoding", decoding)
    if decoding == "mask" and mask_token_id is None:
        raise ValueError("decoding='mask' appends [MASK] at every step: mask_token_id must not be None.")
    ids = {"pad": pad_token_id, "sep": sep_token_id, "mask": mask_token_id}
    full = _read_config(model_name_or_path, config, ids, vocab_size)
    backbone = find_backbone(full)
    segment = fitting_segment(segment, full.model_type, backbone.num_token_types, not backbone.type_columns)
    _check_ids(full.vocab_size, vocab_size, ids)
    implementation = choose_implementation(backbone, attn_implementation)
    on_cpu = "sdpa" if implementation == "flex_attention" else implementation  # where the leak probe runs
    model = _build(model_name_or_path, full, backbone, on_cpu)
    model.settings = Settings(segment, decoding, pad_token_id, sep_token_id, mask_token_id)
    if segment == "unilm_v1" and backbone.num_token_types < NUM_V1_TYPES:
        extend_token_types(model)
        model.backbone = find_backbone(model.config)
    defaults = model.generation_config
    defaults.eos_token_id, defaults.pad_token_id, defaults.bos_token_id = sep_token_id, pad_token_id, None
    defaults.max_length = defaults.use_cache = None  # a checkpoint's were set for another task, or for its training
    freeze_unread(model)
    check_for_leaks(model)
    if implementation != on_cpu:
        model.set_attn_implementation(_function_name(backbone, implementation))
    return model


def _read_config(
    name: str | None, config: dict[str, Any] | None, ids: dict[str, int | None], vocab_size: int | None
) -> "PreTrainedConfig":
    """The configuration of the weights, or the given one with the tokenizer's ids and size."""
    from transformers import AutoConfig

    if config is None:
        try:
            return AutoConfig.from_pretrained(pretrained_folder(name), trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileNotFoundError(f"No model called {name!r}: {reason_of(error)}. {_PLACES}") from error
    if "model_type" not in config:
        raise ValueError("config has no model_type, the family's name such as 'bert'.")
    check_family(config["model_type"])
    family = AutoConfig.for_model(config["model_type"])
    ids = {"pad": ids["pad"], "sep": ids["sep"], "mask": ids["mask"], "eos": ids["sep"], "bos": None, "cls": None}
    known = {f"{name}_token_id": value for name, value in ids.items()}  # the family's own are of another vocabulary
    given = {name: value for name, value in known.items() if getattr(family, name, None) is not None} | config
    return AutoConfig.for_model(**given | ({} if vocab_size is None else {"vocab_size": vocab_size}))


def _check_ids(size: int, vocab_size: int | None, ids: dict[str, int | None]) -> None:
    if vocab_size is not None and vocab_size > size:
        raise ValueError(
            f"vocab_size={vocab_size} of the tokenizer is more than the model's {size}: another tokenizer?"
        )
    for name, value in ids.items():
        if value is not None and not 0 <= value < size:
            raise ValueError(f"{name}_token_id={value} is outside the model's vocabulary of {size}.")
    if ids["pad"] == ids["sep"]:
        raise ValueError(
            f"pad_token_id and sep_token_id are both {ids['sep']}: the end of a source would count as padding. Give "
            "the tokenizer a padding token of its own."
        )


def _build(name: str | None, config: "PreTrainedConfig", backbone: Backbone, implementation: str) -> "PreTrainedModel":
    """The family's class with our mixin, from weights or from scratch, on the CPU."""
    if backbone.cache == "own":
        config.is_decoder = True  # returns its cache; the mask is always given, so that nothing becomes causal
        config.add_cross_attention = False  # that of an encoder-decoder's half, which nothing here would train
    if config.model_type == "big_bird":
        config.attention_type = "original_full"  # its block-sparse attention takes no mask for each pair
    made, dtype = unilm_class(backbone.stock), torch.get_default_dtype()
    implementation = _function_name(backbone, implementation)
    with torch.device("cpu"):  # the leak probe needs real weights
        if name is None:
            return made._from_config(config, attn_implementation=implementation, dtype=dtype)
        return _pretrained(made, pretrained_folder(name), config, attn_implementation=implementation, dtype=dtype)


def _pretrained(made: type, folder: str, config: "PreTrainedConfig", **options: Any) -> "PreTrainedModel":
    """Load, and tell in one line what transformers tells in twenty: which weights start at random."""
    from transformers.utils import find_adapter_config_file, logging

    if find_adapter_config_file(folder) is not None:  # whose own base model and modules peft would load
        raise ValueError(f"{folder!r} holds adapters beside a model: merge them (peft's merge_and_unload) and save it.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report, which calls an encoder without a head "corrupted"
    options |= {"trust_remote_code": False, "weights_only": True, "output_loading_info": True}
    try:
        options["generation_config"] = refused_generation(folder)
        model, report = made.from_pretrained(folder, config=config, **options)
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        raise FileNotFoundError(f"The model {folder!r} cannot be loaded: {reason_of(error)}. {_PLACES}") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        rank_zero_info(f"{folder} has no weights for {shown}: they start at random and must be trained.")
    return model


def _function_name(backbone: Backbone, implementation: str) -> str:
    return cached_name(implementation) if backbone.cache == "attention" else implementation
