"""An encoder's class under a mask of one's own. Shapes: B rows, Q tokens fed now, K keys, V words, N chosen places."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins.unilm.backbones import Backbone, find_backbone, fitting_types, num_positions, position_offset
from lightning_plugins.unilm.cached_attention import LayerByCall, plain_name
from lightning_plugins.unilm.generation import PrefixGeneration
from lightning_plugins.unilm.masks import attention_mask
from lightning_plugins.unilm.token_types import Segment, token_types

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
    """What ``load_unilm`` adds to a family's class; ``self`` is a ``PreTrainedModel``."""

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
        num_copies: int = 1,
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
            num_copies: how many rows cache and logits have for each row given.
            **kwargs: passed on.

        Returns:
            transformers' output object; ``logits`` is ``(B, Q, V)``, or ``(N, V)`` for N places chosen.

        Raises:
            ValueError: if ``labels`` are given, or flex attention meets a CPU.
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
        elif self.backbone.cache == "attention":
            inputs["use_cache"] = False  # the class's own switch
            if use_cache and past_key_values is None:
                from transformers import DynamicCache

                past_key_values = DynamicCache()
            if past_key_values is not None:
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
        if num_copies > 1:
            past_key_values.batch_repeat_interleave(num_copies)
            output.logits = output.logits.repeat_interleave(num_copies, 0)
        return output if self.backbone.cache == "own" else _with_cache(output, past_key_values)

    def _mask(self, given: "Tensor | dict[str, Tensor] | None", position_ids: Tensor, past: int) -> Any:
        """The mask in the form that the family and its attention implementation take."""
        B, Q = position_ids.shape
        if self.attn_implementation == "flex_attention" and position_ids.device.type == "cpu":
            raise ValueError("attn_implementation='flex_attention' ends the process on CPU: use 'sdpa', or a GPU.")
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
        """A mask for each kind of layer where some see a window only; keys behind the given positions are hidden."""
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
