"""``generate()`` under the sequence-to-sequence mask: the source is encoded once, then one token a step.

transformers' ``generate()`` asks ``prepare_inputs_for_generation`` for the arguments of every forward call. Here it
returns the mask, positions and token types of exactly the tokens it feeds, for any cache and search, so that each
logit equals that of encoding the whole row anew. Shapes: B rows, T tokens so far, Q fed now, K keys.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_plugins.unilm.cached_attention import roomy_cache
from lightning_plugins.unilm.masks import SOURCE, TARGET

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.cache_utils import Cache

_WRONG = {  # options of generate() that cannot be right, and why
    "prefill_chunk_size": "the source must be encoded in one piece, as its tokens see each other in both directions",
    "guidance_scale": "guidance without a source would run the network on rows it was never trained on",
}
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class _Options:
    """Options of one call of ``generate()``, wherever they are set: the call, its configuration, the model's."""

    def __init__(self, kwargs: dict[str, Any], given: "GenerationConfig | None", defaults: "GenerationConfig"):
        self.kwargs, self.given, self.defaults = kwargs, copy.deepcopy(given), defaults

    def __getitem__(self, name: str) -> Any:
        value = self.kwargs.get(name)
        for config in (self.given, self.defaults):
            value = getattr(config, name, None) if value is None else value
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self.kwargs.pop(name, None)
        if self.given is None:
            self.kwargs[name] = value
        else:  # transformers wants options in one place
            setattr(self.given, name, value)


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
        kwargs = {name: value for name, value in kwargs.items() if name not in ("token_type_ids", "position_ids")}
        options = _Options(kwargs, generation_config, self.generation_config)
        self._check_options(options)
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError("generate() needs input_ids (B, T), rows of [CLS] source [SEP].")
        if attention_mask is None:
            attention_mask = input_ids.ne(self.settings.pad_token_id)
        if attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(attention_mask.shape)}; it must be input_ids' {tuple(input_ids.shape)}"
            raise ValueError(f"attention_mask has shape {shapes}: the mask between tokens is built here.")
        if prefix_length is None:
            if self._length(kwargs.get("past_key_values")):
                raise ValueError("past_key_values must be empty: generate() starts from the source.")
            input_ids, attention_mask = self._pad_left(input_ids, attention_mask.bool())
            self._set_length(options, attention_mask)
        self._set_cache(options, input_ids.shape[1])
        return super().generate(
            input_ids,
            attention_mask=attention_mask.long(),
            generation_config=options.given,
            prefix_length=input_ids.shape[1] if prefix_length is None else prefix_length,
            **options.kwargs,
        )

    def _check_options(self, options: _Options) -> None:
        for name, why in _WRONG.items():
            if options[name] is not None:
                raise ValueError(f"{name}={options[name]!r} is not possible: {why}.")
        if (kind := options["cache_implementation"]) == "paged":
            raise ValueError("cache_implementation='paged' decodes under causal masks of its own; leave it out.")
        given = [name for name in _ASSISTED if options[name] is not None]
        given += ["cache_implementation"] if kind not in (None, "dynamic") else []
        if given and self.backbone.cache == "none":
            family = self.backbone.model_type
            raise ValueError(f"{given[0]} needs a cache, and {family!r} encodes the whole row at every step.")
        if given and self.settings.decoding == "mask" and (given[0] in _ASSISTED or kind != "offloaded"):
            raise ValueError(
                f"{given[0]} is not possible with decoding='mask', whose [MASK] leaves the cache after every step."
            )

    def _pad_left(self, input_ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The same rows with all padding on the left, so that every target starts in the same column."""
        if not bool(real.any(1).all()):
            raise ValueError(f"attention_mask hides every token of row {int(real.any(1).int().argmin())}.")
        order = real.int().argsort(dim=1, stable=True)
        real = real.gather(1, order)
        return input_ids.gather(1, order).masked_fill(~real, self.settings.pad_token_id), real

    def _set_length(self, options: _Options, real: Tensor) -> None:
        """Give ``max_new_tokens`` a value if no length is set, and check that the rows stay within ``max_length``."""
        longest = int(real.sum(1).max()) if self.backbone.takes_position_ids else real.shape[1]
        room = self.max_length - longest
        new = options["max_new_tokens"]
        if new is None:
            new = max(room, 1) if options["max_length"] is None else options["max_length"] - real.shape[1]
            if options["max_length"] is None:
                options["max_new_tokens"] = new
        if new > room:
            raise ValueError(
                f"A source of {longest} tokens and {new} new ones do not fit the model's {self.max_length} positions: "
                "shorten the source, lower max_new_tokens, or extend the positions."
            )

    def _set_cache(self, options: _Options, width: int) -> None:
        """Give the family the cache it needs: none, or one that keeps all keys of layers with a window too."""
        if self.backbone.cache == "none":
            options["use_cache"] = False
        if options["use_cache"] is False or options.kwargs.get("past_key_values") is not None:
            return
        kind = options["cache_implementation"]
        if kind in (None, "dynamic"):
            options.kwargs["past_key_values"] = roomy_cache()
            options.kwargs["num_copies"] = self._num_copies(options)
        elif self.backbone.window is None:
            return  # transformers makes it
        elif kind == "static":
            options.kwargs["past_key_values"] = self._static_cache(options, width)
        else:
            family = self.backbone.model_type
            raise ValueError(f"cache_implementation={kind!r} loses keys of {family!r}; use 'dynamic' or 'static'.")
        options["cache_implementation"] = None

    def _num_copies(self, options: _Options) -> int:
        """How many rows each source becomes (beams, samples): it is encoded once for all of them."""
        if options["output_hidden_states"] or options["output_attentions"]:  # of each copy
            return 1
        return max(options["num_beams"] or 1, options["num_return_sequences"] or 1)

    def _static_cache(self, options: _Options, width: int) -> "Cache":
        from transformers import PreTrainedConfig, StaticCache

        new = options["max_new_tokens"]
        total = options["max_length"] if new is None else width + new
        layers = PreTrainedConfig(num_hidden_layers=self.config.num_hidden_layers)  # says nothing of a window
        return StaticCache(config=layers, max_cache_len=total)

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
        num_copies: int = 1,
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
            num_copies: rows in succession that have the same source.
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
        # synced_gpus: a rank that is done goes on for the others, with a mask that grows beside ids that do not
        input_ids = pad(input_ids, (0, real.shape[1] - input_ids.shape[1]), value=self.settings.pad_token_id)
        if past:
            num_copies = 1  # they differ by now
        input_ids, real = input_ids[::num_copies], real[::num_copies]
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
            "num_copies": num_copies,
        }

    def _rows_of_mask(self, segments: Tensor, past: int, cache: "Cache | None") -> Tensor:
        """Rows ``past`` and below of the seq2seq mask, as wide as the cache: ``(B, Q, K)`` bool."""
        place = torch.arange(segments.shape[1], device=segments.device)
        earlier = place <= place[past:, None]
        allow = (segments == SOURCE)[:, None, :] | ((segments == TARGET)[:, None, :] & earlier)
        allow = (allow & (segments[:, past:, None] > 0)) | (place == place[past:, None])
        capacity = getattr(cache.layers[0], "max_cache_len", None) if cache is not None and cache.layers else None
        return allow if capacity is None else pad(allow, (0, capacity - allow.shape[-1]))
