"""``generate()`` under the sequence-to-sequence mask: the source is encoded once, then one token a step.

transformers' ``generate()`` asks ``prepare_inputs_for_generation`` for the arguments of every forward call. Here it
returns the mask, positions and token types of exactly the tokens it feeds, for any cache and search, so that each
logit equals that of encoding the whole row anew. Shapes: B rows, T tokens so far, Q fed now, K keys.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_plugins.unilm.masks import SOURCE, TARGET

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.cache_utils import Cache

_WRONG = {  # options of generate() that cannot be right, and why
    "prefill_chunk_size": "the source must be encoded in one piece, as its tokens see each other in both directions",
    "guidance_scale": "guidance without a source would run the network on rows it was never trained on",
}
_NEEDS_CACHE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "cache_implementation")


class PrefixGeneration:
    """Mixin that makes stock ``generate()`` exact for a source that is read in both directions."""

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: "GenerationConfig | None" = None,
        prefix_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stock ``generate()``: greedy, beams, sampling, constraints, streaming, assisted decoding.

        Args:
            input_ids: ``(B, T)`` rows ``[CLS] source [SEP]``, padded on either side.
            attention_mask: ``(B, T)``, 0 at padding; by default wherever the padding token stands.
            generation_config: options; those of the model where it sets none. Without a length the target may fill
                what the source leaves of ``max_length``.
            prefix_length: how many of the T columns are source: all of them, but in the calls of assisted decoding.
            **kwargs: options of ``GenerationConfig`` and arguments of ``generate()``. ``token_type_ids`` and
                ``position_ids`` are not read: they follow from the model's segment scheme and the padding.

        Returns:
            ``(B, T + new)`` ids (or transformers' output object): the sources, padded on the left, and the new tokens.

        Raises:
            ValueError: an option that cannot be right, or a source that leaves no room.
        """
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        for name in ("token_type_ids", "position_ids"):
            kwargs.pop(name, None)
        self._check_options(generation_config, kwargs)
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError("generate() needs input_ids (B, T), rows of [CLS] source [SEP].")
        if attention_mask is None:
            attention_mask = input_ids.ne(self.settings.pad_token_id)
        if attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(attention_mask.shape)}; it must be input_ids' {tuple(input_ids.shape)}"
            raise ValueError(f"attention_mask has shape {shapes}: the mask between tokens is built here.")
        if prefix_length is None:
            if kwargs.get("past_key_values") is not None and self._length(kwargs["past_key_values"]):
                raise ValueError("past_key_values must be empty: generate() starts from the source.")
            input_ids, attention_mask = self._pad_left(input_ids, attention_mask.bool())
            self._set_length(attention_mask, generation_config, kwargs)
        return super().generate(
            input_ids,
            attention_mask=attention_mask.long(),
            generation_config=generation_config,
            prefix_length=input_ids.shape[1] if prefix_length is None else prefix_length,
            **self._with_cache(generation_config, kwargs),
        )

    def _option(self, name: str, generation_config: "GenerationConfig | None", kwargs: dict[str, Any]) -> Any:
        """An option of ``generate()`` from where it is set: the call, its configuration, the model's."""
        given = kwargs.get(name)
        for config in (generation_config, self.generation_config):
            given = getattr(config, name, None) if given is None else given
        return given

    def _check_options(self, generation_config: "GenerationConfig | None", kwargs: dict[str, Any]) -> None:
        given = {name: self._option(name, generation_config, kwargs) for name in (*_WRONG, *_NEEDS_CACHE)}
        for name, why in _WRONG.items():
            if given[name] is not None:
                raise ValueError(f"{name}={given[name]!r} is not possible: {why}.")
        if given["cache_implementation"] == "paged":
            raise ValueError("cache_implementation='paged' decodes under causal masks of its own; leave it out.")
        for name in _NEEDS_CACHE:
            if given[name] is None or (name == "cache_implementation" and given[name] == "dynamic"):
                continue
            if self.backbone.cache == "none":
                family = self.backbone.model_type
                raise ValueError(f"{name} needs a cache, and {family!r} encodes the whole row at every step.")
            if self.settings.decoding == "mask" and (name != "cache_implementation" or given[name] == "static"):
                shown = repr(given[name]) if isinstance(given[name], str | int) else "..."
                raise ValueError(
                    f"{name}={shown} is not possible with decoding='mask', whose [MASK] leaves the cache again after "
                    "every step; leave it out."
                )

    def _pad_left(self, input_ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The same rows with all padding on the left, so that every target starts in the same column."""
        if not bool(real.any(1).all()):
            raise ValueError(f"attention_mask hides every token of row {int(real.any(1).int().argmin())}.")
        order = real.int().argsort(dim=1, stable=True)
        real = real.gather(1, order)
        return input_ids.gather(1, order).masked_fill(~real, self.settings.pad_token_id), real

    def _set_length(self, real: Tensor, generation_config: "GenerationConfig | None", kwargs: dict[str, Any]) -> None:
        """Give ``max_new_tokens`` a value if it has none, and check that the rows stay within ``max_length``."""
        width = real.shape[1]
        longest = int(real.sum(1).max()) if self.backbone.takes_position_ids else width
        room = self.max_length - longest
        new = self._option("max_new_tokens", generation_config, kwargs)
        if new is None:
            total = self._option("max_length", generation_config, kwargs)
            new = room if total is None else total - width
            if total is None:
                kwargs["max_new_tokens"] = room
        if new > room or room < 1:
            raise ValueError(
                f"A source of {longest} tokens and max_new_tokens={max(new, 1)} do not fit the model's "
                f"{self.max_length} positions: shorten the source, lower max_new_tokens, or extend the positions."
            )

    def _with_cache(self, generation_config: "GenerationConfig | None", kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with the cache the family needs: none, or one that keeps all keys of a window's layers too."""
        if self.backbone.cache == "none":
            return {**kwargs, "use_cache": False}
        uses_cache = self._option("use_cache", generation_config, kwargs) is not False
        if self.backbone.window is None or not uses_cache or kwargs.get("past_key_values") is not None:
            return kwargs
        from transformers import DynamicCache, PreTrainedConfig, StaticCache

        kind = self._option("cache_implementation", generation_config, kwargs)
        if kind not in (None, "dynamic", "static"):
            family = self.backbone.model_type
            raise ValueError(f"cache_implementation={kind!r} loses keys of {family!r}; use 'dynamic' or 'static'.")
        if kind != "static":
            return {**kwargs, "past_key_values": DynamicCache(), "cache_implementation": None}
        layers = PreTrainedConfig(num_hidden_layers=self.config.num_hidden_layers)  # says nothing of a window
        return {
            **kwargs,
            "past_key_values": StaticCache(config=layers, max_cache_len=self.max_length),
            "cache_implementation": None,
        }

    @staticmethod
    def _length(cache: "Cache | None") -> int:
        return 0 if cache is None else int(cache.get_seq_length())

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: "Cache | None" = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_length: int | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of one forward call: the tokens the cache does not hold yet, and what they may see.

        Args:
            input_ids: ``(B, T)`` all tokens so far.
            past_key_values: the cache, or ``None`` without one: the whole row is encoded anew then.
            attention_mask: ``(B, T)``, 0 at padding; ``None`` without padding.
            position_ids: not read; positions follow from the padding.
            token_type_ids: not read; types follow from the segment scheme.
            prefix_length: how many columns are source.
            next_sequence_length: not read; the cache says how many tokens it holds.
            is_first_iteration: not read.
            **kwargs: passed on.

        Raises:
            ValueError: if it was not :meth:`generate` that called.
        """
        if prefix_length is None:
            raise ValueError("prefix_length is missing: call generate() of the model itself.")
        past = self._length(past_key_values)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        num_mask_tokens = int(self.settings.decoding == "mask")
        if num_mask_tokens:
            input_ids, real = pad(input_ids, (0, 1), value=self.settings.mask_token_id), pad(real, (0, 1), value=1)
        segments = torch.cat([real[:, :prefix_length] * SOURCE, real[:, prefix_length:] * TARGET], dim=1)
        places = (real.cumsum(1) - 1).clamp(min=0)
        allow = self._rows_of_mask(segments, past, past_key_values)
        types = self.token_types(segments)
        return {
            **kwargs,
            "input_ids": input_ids[:, past:].contiguous(),
            "attention_mask": self._with_window(allow, places[:, past:], places),
            "position_ids": places[:, past:],
            "token_type_ids": None if types is None else types[:, past:],
            "past_key_values": past_key_values,
            "num_mask_tokens": num_mask_tokens,
        }

    def _rows_of_mask(self, segments: Tensor, past: int, cache: "Cache | None") -> Tensor:
        """Rows ``past`` and below of the seq2seq mask, as wide as the cache: ``(B, Q, K)`` bool."""
        place = torch.arange(segments.shape[1], device=segments.device)
        earlier = place <= place[past:, None]
        allow = (segments == SOURCE)[:, None, :] | ((segments == TARGET)[:, None, :] & earlier)
        allow = (allow & (segments[:, past:, None] > 0)) | (place == place[past:, None])
        capacity = getattr(cache.layers[0], "max_cache_len", None) if cache is not None and cache.layers else None
        return allow if capacity is None else pad(allow, (0, capacity - allow.shape[-1]))
