"""Changing what a pretrained encoder has room for: fewer word pieces, more positions, more token types.

A fine-tuned generator needs few of a multilingual vocabulary's pieces (Su's ``keep_tokens``), may read more than 512
tokens (s2s-ft's CNN/DailyMail runs) and may want a token type for each kind of mask (UniLM v1 has six). All of it is
done in place, before training, on stock models and on ours; what stays has the bits it had.
"""

import copy
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# UniLM v1: 2 left-to-right, 3 right-to-left and 4 source start as BERT's first segment, 5 target as its second.
_TYPE_STARTS_AS = (0, 1, 0, 0, 0, 1)


def trim_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", keep: Sequence[str]
) -> tuple["PreTrainedTokenizerBase", Tensor]:
    """A tokenizer that knows only some of its tokens.

    A text whose tokens are all kept gives the same tokens as before, for each of the three algorithms. Any other text
    gives smaller pieces or the unknown token. What that takes stays too: special and added tokens; of BPE the alphabet
    and the merges that lead to a kept token; of Unigram the least likely piece, which sets the price of the unknown.

    Args:
        tokenizer: a fast one (WordPiece, BPE or Unigram); left as it is.
        keep: tokens in the spelling of ``tokenizer.tokenize``, in any order.

    Returns:
        The new tokenizer, and ``(V',)`` int64 the old ids of its tokens, ascending: token i was ``kept_ids[i]``.

    Raises:
        ValueError: nothing or unknown tokens to keep, or a tokenizer of another kind.
    """
    vocabulary = tokenizer.get_vocab()
    if isinstance(keep, str) or not keep:
        raise ValueError(f"keep is {keep!r}: give a list of the tokens to keep, as tokenizer.tokenize gives them.")
    unknown = [token for token in dict.fromkeys(keep) if token not in vocabulary]
    if unknown:
        raise ValueError(
            f"keep names {len(unknown)} tokens that the tokenizer does not have, such as {unknown[:3]}: give tokens as "
            "tokenizer.tokenize gives them, not words."
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: its vocabulary cannot be trimmed.")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {*keep, *(token["content"] for token in state["added_tokens"]), *_template_tokens(state["post_processor"])}
    kept |= _needed(state["model"], kept)
    kept_ids = sorted(vocabulary[token] for token in kept)
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    _rewrite(state, kept, new_ids)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    trimmed.init_kwargs.pop("added_tokens_decoder", None)  # by old ids; the backend has its own
    trimmed.init_kwargs.pop("vocab_file", None)  # of the old vocabulary
    if trimmed.get_vocab() != {token: new_ids[vocabulary[token]] for token in kept}:
        raise ValueError(f"{type(tokenizer).__name__} numbers its added tokens in a way that cannot be trimmed.")
    return trimmed, torch.tensor(kept_ids)


def _needed(model: dict[str, Any], kept: set[str]) -> set[str]:
    """What the algorithm needs beside ``kept`` to give those very tokens."""
    unknown = {model["unk_token"]} if model.get("unk_token") is not None else set()
    if model["type"] == "WordPiece":  # the longest match is the same as long as it is kept
        return unknown
    if model["type"] == "BPE":
        prefix = model["continuing_subword_prefix"] or ""
        parts: dict[str, list[str]] = {}
        for left, right in model["merges"]:
            parts.setdefault(left + right.removeprefix(prefix), []).extend((left, right))
        needed, todo = set(), list(kept)
        while todo:
            new = set(parts.get(todo.pop(), ())) - needed
            needed |= new
            todo.extend(new)
        return unknown | needed | (model["vocab"].keys() - parts.keys())
    if model["type"] == "Unigram":
        unknown = set() if model["unk_id"] is None else {model["vocab"][model["unk_id"]][0]}
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if model["byte_fallback"] else set()
        pieces = [piece for piece, _ in model["vocab"]]
        return unknown | bytes_.intersection(pieces) | {min(model["vocab"], key=lambda item: item[1])[0]}
    raise ValueError(f"A {model['type']} tokenizer cannot be trimmed, only WordPiece, BPE and Unigram.")


def _rewrite(state: dict[str, Any], kept: set[str], new_ids: dict[int, int]) -> None:
    """Leave out of a serialised tokenizer what is not kept, and renumber the rest, in place."""
    model = state["model"]
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
        model["vocab"] = [item for item in model["vocab"] if item[0] in kept]
    else:
        model["vocab"] = {token: new_ids[old] for token, old in model["vocab"].items() if token in kept}
    if model["type"] == "BPE":
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [pair for pair in model["merges"] if pair[0] + pair[1].removeprefix(prefix) in kept]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if state["padding"]:
        state["padding"]["pad_id"] = new_ids[state["padding"]["pad_id"]]
    for processor in _processors(state["post_processor"]):
        for name in ("sep", "cls"):
            if name in processor:
                processor[name][1] = new_ids[processor[name][1]]
        for special in processor.get("special_tokens", {}).values():
            special["ids"] = [new_ids[old] for old in special["ids"]]


def _processors(processor: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    """A post-processor, or those in its sequence."""
    if processor is not None:
        yield processor
        for inner in processor.get("processors", ()):
            yield from _processors(inner)


def _template_tokens(processor: dict[str, Any] | None) -> set[str]:
    """The tokens that the post-processor adds."""
    tokens: set[str] = set()
    for part in _processors(processor):
        tokens.update(part[name][0] for name in ("sep", "cls") if name in part)
        tokens.update(token for special in part.get("special_tokens", {}).values() for token in special["tokens"])
    return tokens


def keep_rows(model: "PreTrainedModel", kept_ids: Tensor) -> None:
    """Leave the model only the kept rows of its embeddings and of its head, in place; ties stay tied.

    The ids of special tokens in ``config``, ``generation_config`` and ``settings`` become the new ones (``None`` where
    a config names a token that is not kept): load the model with the ids of the untrimmed tokenizer.

    Args:
        model: any masked or causal language model of the BERT kind.
        kept_ids: ``(V',)`` int64, distinct: the new id i is the old ``kept_ids[i]``.

    Raises:
        ValueError: ids out of range, special tokens not among them, or an embedding or head of a kind of its own.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} keeps its words in {type(embedding).__name__}: cannot be trimmed.")
    kept = kept_ids.tolist()
    rows, pad = embedding.num_embeddings, model.config.pad_token_id
    if not kept or len(set(kept)) < len(kept) or min(kept) < 0 or max(kept) >= rows:
        raise ValueError(f"kept_ids must be distinct ids from 0 to {rows - 1}, got {len(kept)} of another kind.")
    if pad is not None and pad not in kept:
        raise ValueError(f"kept_ids leaves out {pad}, the padding token of the model's config: keep it.")
    settings, ids = getattr(model, "settings", None), {}
    if settings is not None:
        ids = {
            name: old for name, old in dataclasses.asdict(settings).items() if name.endswith("_id") and old is not None
        }
        if missing := {name: old for name, old in ids.items() if old not in kept}:
            raise ValueError(f"kept_ids leaves out {missing} of the model's settings, ids of the untrimmed tokenizer.")
    for old in {id(p): p for p in (embedding.weight, head.weight, head.bias) if p is not None}.values():
        _replace(model, old, old.detach()[kept_ids.to(old.device)])
    embedding.num_embeddings = head.out_features = model.config.vocab_size = len(kept)
    new_ids = {old: new for new, old in enumerate(kept)}
    if embedding.padding_idx is not None:
        embedding.padding_idx = new_ids[embedding.padding_idx]
    for owner_of_ids in (model.config, getattr(model, "generation_config", None)):
        for name, value in owner_of_ids.to_dict().items() if owner_of_ids is not None else ():
            if name.endswith("_token_id") and value is not None:
                setattr(owner_of_ids, name, _renumber(value, new_ids, rows))
    if settings is not None:
        model.settings = dataclasses.replace(settings, **{name: new_ids[old] for name, old in ids.items()})


def _renumber(value: int | list[int], new_ids: dict[int, int], rows: int) -> int | list[int] | None:
    if isinstance(value, list):
        return [new_ids[old] for old in value if old in new_ids] or None
    return new_ids.get(value) if value < rows else value  # some configs' defaults are no tokens of a small model


def extend_positions(model: "PreTrainedModel", max_positions: int) -> None:
    r"""Let rows have up to ``max_positions`` tokens; the learned positions start over, as in s2s-ft.

    .. math:: p_i = p_{i \bmod n} \text{ for } i \ge n

    Rows that RoBERTa's kind keeps for padding are not repeated and not counted. Computed positions (RoFormer) go on;
    rotary ones (ModernBERT) need no table. What the model says about rows of the old lengths does not change by a bit.

    Args:
        model: any of the BERT kind; changed in place.
        max_positions: tokens of the longest row, at least as many as now.

    Raises:
        ValueError: fewer positions than now, or positions of a kind that cannot be extended.
    """
    name, config = type(model).__name__, model.config
    tables = _tables(model, ("position_embeddings", "embed_positions"))
    rotary = getattr(config, "rope_parameters", None)
    if len(tables) > 1 or not (tables or rotary):
        raise ValueError(f"The positions of {name} cannot be extended: they are neither one table nor rotary.")
    offset = tables[0].padding_idx + 1 if tables and tables[0].padding_idx is not None else 0
    old_positions = config.max_position_embeddings - offset
    if max_positions < old_positions:
        raise ValueError(f"max_positions is {max_positions}, fewer than the {old_positions} that {name} has: leave it.")
    if not tables and any(kind != "default" for kind in _rope_types(rotary)):
        raise ValueError(f"The rotary positions of {name} are scaled by their number: they cannot be extended.")
    for table in tables:
        _extend_rows(model, table, _position_rows(table, offset, max_positions))
    for module in model.modules():
        for buffer in ("position_ids", "token_type_ids"):
            old = module._buffers.get(buffer)
            if old is not None and old.shape == (1, config.max_position_embeddings):
                new = torch.arange(max_positions + offset, dtype=old.dtype, device=old.device).expand(1, -1)
                setattr(module, buffer, new if buffer == "position_ids" else torch.zeros_like(new))
    config.max_position_embeddings = max_positions + offset


def _position_rows(table: nn.Embedding, offset: int, max_positions: int) -> Tensor:
    """The rows of the longer table ``(offset + max_positions, D)``."""
    weight = table.weight.detach()
    if hasattr(table, "create_weight"):  # RoFormer's sinusoids
        longer = type(table)(max_positions, table.embedding_dim).create_weight().to(weight)
        return torch.cat([weight, longer[len(weight) :]])
    places = torch.arange(max_positions, device=weight.device) % (len(weight) - offset)
    return torch.cat([weight[:offset], weight[offset:][places]])


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """``rope_type`` of each kind of layer."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {kind.get("rope_type", "default") for kind in nested or [parameters]}


def extend_token_types(model: "PreTrainedModel") -> None:
    """Let tokens have six types; new ones start as UniLM v1 has them: 2, 3, 4 as type 0, 5 as type 1.

    Args:
        model: any of the BERT kind with token types; changed in place. Outputs for the old types do not change.

    Raises:
        ValueError: a model without token types.
    """
    tables = _tables(model, ("token_type_embeddings",))
    if len(tables) != 1:
        raise ValueError(f"{type(model).__name__} has no table of token types that could be extended.")
    old_types = tables[0].num_embeddings
    weight = tables[0].weight.detach()
    starts = [min(start, old_types - 1) for start in _TYPE_STARTS_AS[old_types:]]
    _extend_rows(model, tables[0], torch.cat([weight, weight[starts]]))
    model.config.type_vocab_size = len(_TYPE_STARTS_AS)


def _tables(model: nn.Module, names: tuple[str, ...]) -> list[nn.Embedding]:
    """The embeddings that stand under one of these names."""
    found = [module for path, module in model.named_modules() if path.rpartition(".")[2] in names]
    return [module for module in found if isinstance(module, nn.Embedding)]


def _extend_rows(model: nn.Module, table: nn.Embedding, rows: Tensor) -> None:
    _replace(model, table.weight, rows)
    table.num_embeddings = len(rows)


def _replace(model: nn.Module, old: nn.Parameter, values: Tensor) -> None:
    """Put a new parameter wherever the model holds ``old``, so that what is tied stays tied."""
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
