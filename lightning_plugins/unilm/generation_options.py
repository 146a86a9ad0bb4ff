"""The options of generate() that a user may give, and those that would mislead."""

from collections.abc import Mapping
from typing import Any


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
