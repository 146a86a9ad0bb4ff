"""Keys and values of earlier steps: where they are kept, also for families whose classes keep none.

===========================================================  ======================  ============================
families                                                     a decoding step reads   their export runs in
===========================================================  ======================  ============================
bert, roberta, xlm-roberta, xlm-roberta-xl, camembert,       one token, and the      plain transformers
electra, ernie, data2vec-text, roberta-prelayernorm,         class's own cache       (AutoModelForCausalLM)
rembert, roformer, megatron-bert, big_bird
distilbert, albert, nomic_bert, gte, eurobert, modernbert,   one token, and the      this package
esmc                                                         cache of this file
mpnet, squeezebert, luke, ibert, tapas                       the whole row           this package
===========================================================  ======================  ============================

All three decode the same tokens. The families of the middle row call an attention function by name; the functions
registered here add the keys and values of earlier steps before they call the one of that name. The cache is one of
transformers' own, so that its beam search, cropping and static caches work on it.

Shapes: B rows, H heads, T tokens so far, Q new ones, D numbers of a head.
"""

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_PREFIX = "unilm_"


class RoomyLayer:
    """One layer of a cache that has room for tokens to come and copies nothing that stays as it is.

    transformers' ``DynamicLayer``, behind which it stands as a mixin, copies all keys and values at every step to add
    one token, and again to reorder beams; that costs as much as the network does. Here a token is written into its
    place, and beams, which share their source, exchange their targets alone.
    """

    keys: Tensor  # (B, H, T, D), as are values: the front of the room, once there is one
    values: Tensor
    room: tuple[Tensor, Tensor] | None = None
    num_shared = 0  # leading tokens that are the same in all copies of a row

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add ``(B, H, Q, D)`` keys and values; returns those of all steps."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not start:
            return super().update(key_states, value_states, *args, **kwargs)
        if self.room is None or end > self.room[0].shape[-2]:
            self._make_room(end + max(end // 4, 32))
        self.room[0][..., start:end, :], self.room[1][..., start:end, :] = key_states, value_states
        self.keys, self.values = (states[..., :end, :] for states in self.room)
        return self.keys, self.values

    def _make_room(self, size: int) -> None:
        room = []
        for states in (self.keys, self.values):
            wider = states.new_empty((*states.shape[:-2], size, states.shape[-1]))
            wider[..., : states.shape[-2], :] = states
            room.append(wider)
        self.room = tuple(room)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was, a copy of the same row as b."""
        for states in (self.keys, self.values):
            own = states[..., self.num_shared :, :]
            own.copy_(own.index_select(0, beam_idx.to(own.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy each row, when it holds nothing but what its copies will share."""
        super().batch_repeat_interleave(repeats)
        self.room, self.num_shared = None, self.get_seq_length()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        super().batch_select_indices(indices)
        self.room = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.room, self.num_shared = None, 0


def roomy_cache() -> "Cache":
    """An empty cache of :class:`RoomyLayer`; not for training, as it writes in place."""
    from transformers.cache_utils import Cache

    return Cache(layer_class_to_replicate=_roomy_class())


@cache
def _roomy_class() -> type:
    from transformers.cache_utils import DynamicLayer

    return type("RoomyDynamicLayer", (RoomyLayer, DynamicLayer), {"__module__": __name__})


class LayerByCall:
    """A cache for one forward pass, whose n-th attention call is its n-th layer (ALBERT runs one layer many times)."""

    def __init__(self, cache: "Cache"):
        self.cache = cache
        self.num_calls = 0

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``(B, heads, Q, D)`` keys and values of this call's layer; returns those of all steps."""
        layer = self.num_calls
        self.num_calls += 1
        return self.cache.update(key, value, layer)


def cached_name(implementation: str) -> str:
    """Name of the attention function that runs ``implementation`` on a ``LayerByCall`` too; registered if need be."""
    from transformers import AttentionInterface

    name = _PREFIX + implementation
    AttentionInterface.register(name, _FUNCTIONS[implementation])
    return name


def plain_name(implementation: str) -> str:
    """``implementation`` without what :func:`cached_name` put before it."""
    return implementation.removeprefix(_PREFIX)


def _run(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers = kwargs.pop("layers_by_call", None)
    if layers is not None:
        key, value = layers.update(key, value)
    if implementation == "eager":  # written beside each family's own layers
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
    return attend(module, query, key, value, *args, **kwargs)


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _run("sdpa", module, query, key, value, *args, **kwargs)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _run("eager", module, query, key, value, *args, **kwargs)


def _flex(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _run("flex_attention", module, query, key, value, *args, **kwargs)


_FUNCTIONS = {"sdpa": _sdpa, "eager": _eager, "flex_attention": _flex}
