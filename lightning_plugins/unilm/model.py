"""A pretrained encoder, or one from a configuration, as a sequence-to-sequence model."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plugins.core.pretrained import pretrained_folder
from lightning_plugins.unilm.backbones import (
    Backbone,
    check_family,
    check_for_leaks,
    choose_implementation,
    find_backbone,
    fitting_types,
    num_positions,
    position_offset,
)
from lightning_plugins.unilm.cached_attention import LayerByCall, cached_name, plain_name
from lightning_plugins.unilm.generation import PrefixGeneration
from lightning_plugins.unilm.masks import attention_mask
from lightning_plugins.unilm.surgery import extend_token_types
from lightning_plugins.unilm.token_types import NUM_V1_TYPES, Segment, fitting_segment, token_types

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache

Decoding = Literal["next_token", "mask"]


@dataclass(frozen=True)
class Settings:
    """How a model marks source and target, and decodes.

    Attributes:
        segment: scheme of the token types, see :func:`token_types`.
        decoding: ``next_token``, or ``mask`` for models trained to fill a [MASK] behind the tokens known so far.
        pad_token_id: fills rows up.
        sep_token_id: ends sources and targets.
        mask_token_id: needed by ``mask`` decoding.
    """

    segment: Segment
    decoding: Decoding
    pad_token_id: int
    sep_token_id: int
    mask_token_id: int | None


class UniLMMixin(PrefixGeneration):
    """What :func:`load_unilm` adds to a family's class; ``self`` is a ``PreTrainedModel``."""

    backbone: Backbone
    settings: Settings

    def __init__(self, config: "PreTrainedConfig", *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.backbone = find_backbone(config)
        self._offset = position_offset(self)
        self._places: int | Tensor = 0  # whose logits the running forward call computes
        self.base_model.register_forward_hook(self._select_places)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _blank, (self.backbone.stock,), self.__dict__

    @property
    def max_length(self) -> int:
        """The most tokens that a sample, source and target, may have."""
        return num_positions(self)

    @property
    def attn_implementation(self) -> str:
        """``sdpa``, ``eager`` or ``flex_attention``."""
        return plain_name(self.config._attn_implementation)

    @property
    def exportable(self) -> bool:
        """Whether plain ``AutoModelForCausalLM`` decodes as this model does."""
        plain = self.settings.segment in ("sep_as_bos", "none") and self.settings.decoding == "next_token"
        return plain and self.backbone.cache == "own"

    def token_types(
        self, segment_ids: Tensor, kind: str = "seq2seq", sample_ids: Tensor | None = None
    ) -> Tensor | None:
        """Token types ``(B, T)`` by the model's scheme, ``None`` if the family has none; see :func:`token_types`."""
        if not self.backbone.num_token_types:
            return None
        return token_types(segment_ids, self.settings.segment, kind, sample_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: "Tensor | dict[str, Tensor] | None" = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: "Cache | None" = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_mask_tokens: int = 0,
        **kwargs: Any,
    ) -> Any:
        """The family's forward pass under a mask of one's own.

        Args:
            input_ids: ``(B, Q)``.
            attention_mask: ``(B, Q, K)`` bool, True = may attend; or ``(B, K)``, 0 at padding; ``None``: all see all.
            position_ids: ``(B, Q)`` from 0 in every family; by default counted on from the cache's length.
            token_type_ids: ``(B, Q)``; ignored by families without types.
            past_key_values: a cache of transformers, with the keys of ``K - Q`` earlier tokens.
            use_cache: whether to return a cache; by default if one is given.
            logits_to_keep: the last so many places, 0 for all; or ``(B, Q)`` bool, the places whose logits are
                computed. The head never sees the others.
            num_mask_tokens: how many of the last tokens the cache forgets again after the call.
            **kwargs: passed on.

        Returns:
            transformers' output object; ``logits`` is ``(B, Q, V)``, or ``(N, V)`` for N places chosen.

        Raises:
            ValueError: if ``labels`` are given.
        """
        if kwargs.pop("labels", None) is not None:
            raise ValueError("labels are not taken: some families shift them by one and some do not; compute the loss.")
        shape = (input_ids if input_ids is not None else kwargs["inputs_embeds"]).shape[:2]
        past = self._length(past_key_values)
        if position_ids is None:
            position_ids = torch.arange(past, past + shape[1], device=self.device).expand(shape)
        inputs = {"input_ids": input_ids, "attention_mask": self._mask(attention_mask, position_ids, past), **kwargs}
        if self.backbone.takes_position_ids:
            inputs["position_ids"] = position_ids + self._offset
        if (types := fitting_types(token_type_ids, self.backbone)) is not None:
            inputs["token_type_ids"] = types
        use_cache = past_key_values is not None if use_cache is None else use_cache
        if self.backbone.cache == "own":
            inputs |= {"past_key_values": past_key_values, "use_cache": use_cache}
        elif use_cache and self.backbone.cache == "attention":
            from transformers import DynamicCache

            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            inputs["layers_by_call"] = LayerByCall(past_key_values)
        self._places = logits_to_keep
        try:
            output = super().forward(**inputs)
        finally:
            self._places = 0
        if isinstance(logits_to_keep, Tensor):
            output.logits = output.logits[0]
        if num_mask_tokens and past_key_values is not None:
            past_key_values.crop(-num_mask_tokens)
        return output if self.backbone.cache == "own" else _with_cache(output, past_key_values)

    def _mask(self, given: "Tensor | dict[str, Tensor] | None", position_ids: Tensor, past: int) -> Any:
        """The mask in the form that the family and its attention implementation take."""
        B, Q = position_ids.shape
        if given is None:
            given = torch.ones(B, Q, past + Q, dtype=torch.bool, device=position_ids.device)
        elif not isinstance(given, dict) and given.dim() == 2:
            given = given.bool()[:, None, :].expand(B, Q, -1)
        if not isinstance(given, dict):
            given = self._with_window(given, position_ids, position_ids)
        if isinstance(given, dict):
            return {name: attention_mask(mask, self.attn_implementation, self.dtype) for name, mask in given.items()}
        return attention_mask(given, self.attn_implementation, self.dtype)

    def _with_window(self, allow: Tensor, queries: Tensor, keys: Tensor) -> "Tensor | dict[str, Tensor]":
        """A mask for each kind of layer where some see a window only.

        Args:
            allow: ``(B, Q, K)`` bool.
            queries: ``(B, Q)`` positions.
            keys: ``(B, K)`` positions, or fewer: what lies behind them is hidden anyway.
        """
        if self.backbone.window is None:
            return allow
        if keys.shape[1] > allow.shape[2] or (keys is queries and keys.shape[1] < allow.shape[2]):
            raise ValueError(
                f"attention_mask is {tuple(allow.shape)} for {keys.shape[1]} tokens: with a cache give it to a family "
                "with windows as {'full_attention': (B, Q, K), 'sliding_attention': (B, Q, K)}."
            )
        near = (queries[:, :, None] - keys[:, None, :]).abs() <= self.backbone.window
        near = nn.functional.pad(near, (0, allow.shape[2] - near.shape[2]))
        return {"full_attention": allow, "sliding_attention": allow & near}

    def _select_places(self, base: nn.Module, args: Any, output: Any) -> Any:
        """Hook behind the base model: leave the head only the places whose logits are asked for."""
        places = self._places
        if isinstance(places, int) and places == 0:
            return output
        hidden = output[0]
        hidden = hidden[:, -places:] if isinstance(places, int) else hidden[places][None]  # heads take three dimensions
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output


def _with_cache(output: Any, past_key_values: "Cache | None") -> Any:
    """A MaskedLM class's output with the cache it knows nothing of."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if isinstance(output, tuple):
        return output
    return CausalLMOutputWithPast(
        logits=output.logits,
        past_key_values=past_key_values,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


@cache
def unilm_class(stock: type) -> type:
    """The family's class with :class:`UniLMMixin` before it, and ``GenerationMixin`` behind it where it has none."""
    from transformers import GenerationMixin

    bases = (UniLMMixin, stock) if issubclass(stock, GenerationMixin) else (UniLMMixin, stock, GenerationMixin)
    # transformers reads the source of a class's module to see how its attention is chosen
    return type(f"UniLM{stock.__name__}", bases, {"__module__": stock.__module__, "__doc__": UniLMMixin.__doc__})


def _blank(stock: type) -> "PreTrainedModel":
    """What pickle and deepcopy fill."""
    made = unilm_class(stock)
    return made.__new__(made)


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
        model_name_or_path: weights: an id of the Hub, a folder, or ``package:NAME/FOLDER``.
        config: in its place a configuration with ``model_type``, for random weights.
        pad_token_id: the tokenizer's, as are the next two.
        sep_token_id: ends sources and targets; the end of what ``generate()`` writes.
        mask_token_id: ``None`` if there is none.
        vocab_size: the tokenizer's. A model from ``config`` gets as many rows; weights must have at least as many.
        segment: scheme of the token types, see :func:`token_types`. A family with fewer than two types
            takes ``sep_as_bos`` as ``none``; for ``unilm_v1`` the table is extended to six.
        decoding: ``next_token``; ``mask`` for models trained to fill [MASK]s (UniLM v1 and v2).
        attn_implementation: ``sdpa`` where the family has it, else ``eager``; ``flex_attention`` on a GPU.

    Returns:
        A ``PreTrainedModel`` with :class:`UniLMMixin`, in fp32 (torch's default dtype).

    Raises:
        ValueError: an unknown name, a family that leaks, or ids outside the vocabulary.
        FileNotFoundError: nothing readable at ``model_name_or_path``.
    """
    if (model_name_or_path is None) == (config is None):
        raise ValueError("Give either model_name_or_path (weights) or config (random weights), not both or none.")
    if decoding not in get_args(Decoding):
        raise ValueError(f"decoding={decoding!r} must be 'next_token' or 'mask'.")
    if decoding == "mask" and mask_token_id is None:
        raise ValueError("decoding='mask' appends [MASK] at every step: mask_token_id must not be None.")
    ids = {"pad": pad_token_id, "sep": sep_token_id, "mask": mask_token_id}
    full = _read_config(model_name_or_path, config, ids, vocab_size)
    backbone = find_backbone(full)
    segment = fitting_segment(segment, full.model_type, backbone.num_token_types, not backbone.type_columns)
    _check_ids(full.vocab_size, vocab_size, ids)
    model = _build(model_name_or_path, full, backbone, choose_implementation(backbone, attn_implementation))
    model.settings = Settings(segment, decoding, pad_token_id, sep_token_id, mask_token_id)
    if segment == "unilm_v1" and backbone.num_token_types < NUM_V1_TYPES:
        extend_token_types(model, NUM_V1_TYPES)
        model.backbone = find_backbone(model.config)
    defaults = model.generation_config
    defaults.eos_token_id, defaults.pad_token_id, defaults.bos_token_id = sep_token_id, pad_token_id, None
    check_for_leaks(model)
    return model


def _read_config(
    name: str | None, config: dict[str, Any] | None, ids: dict[str, int | None], vocab_size: int | None
) -> "PreTrainedConfig":
    from transformers import AutoConfig

    if config is None:
        try:
            return AutoConfig.from_pretrained(pretrained_folder(name))
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise FileNotFoundError(
                f"No model called {name!r}: {reason}. Give an id of the Hub (its first use needs the network), a "
                "folder with a model, or package:NAME/FOLDER."
            ) from error
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


def _build(name: str | None, config: "PreTrainedConfig", backbone: Backbone, implementation: str) -> "PreTrainedModel":
    if backbone.cache == "own":
        config.is_decoder = True  # returns its cache; the mask is always given, so that nothing becomes causal
    if backbone.cache == "attention":
        implementation = cached_name(implementation)
    if config.model_type == "big_bird":
        config.attention_type = "original_full"  # its block-sparse attention takes no mask for each pair
    made, dtype = unilm_class(backbone.stock), torch.get_default_dtype()
    with torch.device("cpu"):  # the leak probe needs real weights
        if name is None:
            return made._from_config(config, attn_implementation=implementation, dtype=dtype)
        folder = pretrained_folder(name)
        return made.from_pretrained(folder, config=config, attn_implementation=implementation, dtype=dtype)
