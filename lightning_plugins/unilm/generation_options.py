"""The options of generate() that a user may give, and those that would mislead."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

_FILE = "generation_config.json"
_REFUSAL = "none in plain transformers: load this folder with lightning_plugins, as its README.md shows"


def check_generation(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of ``generate()`` as a dict.

    Raises:
        ValueError: an option that transformers does not know, or that would not do here what it says.
    """
    from difflib import get_close_matches

    from transformers import GenerationConfig

    known = vars(GenerationConfig())
    for name in options or {}:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise ValueError(
                f"generation has no option {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + " The options are those of transformers.GenerationConfig."
            )
    options = dict(options or {})
    refuse_misleading(options)
    if (options.get("num_return_sequences") or 1) > 1:
        raise ValueError(
            f"generation: num_return_sequences={options['num_return_sequences']} gives several texts for a source, but "
            "one is scored or written: give it to generate_text() instead."
        )
    try:
        GenerationConfig(**options).validate(strict=True)
    except ValueError as error:  # transformers would only refuse to write it, at the export after the training
        reasons = " ".join(line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- "))
        raise ValueError(f"generation={options} is contradictory: {reasons or error}") from error
    return options


def refuse_misleading(options: Mapping[str, Any]) -> None:
    """Refuse options of ``generate()`` that would be passed over here, or change what it returns.

    Raises:
        ValueError: ``max_length``, ``return_dict_in_generate``, or ``max_new_tokens`` without a number.
    """
    if options.get("max_length") is not None:
        raise ValueError(
            f"max_length={options['max_length']} counts the source, too, and yields to max_new_tokens: give "
            "max_new_tokens, the most tokens of a text."
        )
    if options.get("return_dict_in_generate"):
        raise ValueError("return_dict_in_generate is for network.generate(), not where texts are wanted: leave it out.")
    if not isinstance(new := options.get("max_new_tokens", 1), int) or new < 1:
        raise ValueError(f"max_new_tokens={new!r} must be a whole number of 1 or more: the most tokens of a text.")


def refuse_plain_generation(folder: Path) -> None:
    """Make stock classes that generate refuse a folder's model when they load it, in a sentence that says what to do.

    They would load its weights and write other texts; a kind of cache that does not exist stops each of them, and no
    class that does not generate.
    """
    path = folder / _FILE
    options = {**json.loads(path.read_text(encoding="utf-8")), "cache_implementation": _REFUSAL}
    path.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refused_generation(folder: str) -> "GenerationConfig | None":
    """The options of a folder that stock classes refuse; ``None`` where they do not."""
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    path = cached_file(folder, _FILE, _raise_exceptions_for_missing_entries=False)
    text = "" if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
    if _REFUSAL not in text:
        return None
    options = json.loads(text)
    del options["cache_implementation"]
    return GenerationConfig(**options)
