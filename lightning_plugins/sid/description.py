"""A checkpoint's description of SiD's networks, which may be anyone's: only what is known is built from it."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_plugins.sid.pipeline_folder import is_scheduler
from lightning_plugins.sid.teacher import NETWORKS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_NETWORKS: dict[str, Callable[[Any], bool]] = {
    "fingerprint": lambda value: isinstance(value, str),
    "network": lambda value: value in NETWORKS,
    "config": lambda value: isinstance(value, Mapping),
    "scheduler": lambda value: isinstance(value, Mapping) and is_scheduler(value.get("_class_name")),
    "sample_shape": lambda value: isinstance(value, list | tuple) and [type(size) for size in value] == [int] * 3,
    "num_classes": lambda value: value is None or type(value) is int,
    "in_pixels": lambda value: isinstance(value, bool),
    "takes_text": lambda value: isinstance(value, bool),
}
_PROGRESS: dict[str, Callable[[Any], bool]] = {
    "start_level": lambda value: _is_number(value) and value > 0,
    "images": lambda value: type(value) is int,
    "updates": lambda value: type(value) is int,
    "results": lambda value: isinstance(value, Mapping) and all(map(_is_number, value.values())),
}


def check_description(record: Mapping[str, Any]) -> None:
    """Refuse a description of networks that :attr:`StudentNetworks.description` cannot have written.

    Args:
        record: a checkpoint's own entry of SiD.

    Raises:
        ValueError: which entry is of another form.
    """
    _check(record, _NETWORKS)


def check_progress(record: Mapping[str, Any]) -> None:
    """Refuse a record of how far training was that SiD cannot have written.

    Args:
        record: a checkpoint's own entry of SiD.

    Raises:
        ValueError: which entry is of another form.
    """
    _check(record, _PROGRESS)


def _check(record: Mapping[str, Any], forms: Mapping[str, Callable[[Any], bool]]) -> None:
    for name, is_right in forms.items():
        if not is_right(record.get(name)):
            raise ValueError(f"The checkpoint does not describe SiD: its {name} is {repr(record.get(name))[:60]}.")
