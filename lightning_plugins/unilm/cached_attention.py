"""Keys and values of earlier steps for families whose classes keep none.

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
"""

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_PREFIX = "unilm_"


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
