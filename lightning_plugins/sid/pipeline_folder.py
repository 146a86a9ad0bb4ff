"""Folders of diffusers pipelines, which may be anyone's: of parts of diffusers and transformers, or refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lightning_plugins.core.pretrained import nobody_is_asked, reason_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_INDEX = "model_index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a pipeline's ``model_index.json``.

    Raises:
        ValueError: it is no such index.
        OSError: it cannot be read.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ValueError(f"its {_INDEX} is no JSON.") from error
    if not isinstance(index, dict):
        raise ValueError(f"its {_INDEX} holds no parts by name.")
    return index


def load_pipeline(source: str) -> "DiffusionPipeline":
    """A pipeline of which nothing runs but diffusers and transformers: no code of its own, no pickles.

    Args:
        source: a folder, or an id of the Hub.

    Raises:
        ValueError: it needs other code, or cannot be loaded.
        OSError: it cannot be read.
    """
    from diffusers import DiffusionPipeline

    try:
        local = Path(source).is_dir()
        folder = Path(source if local else DiffusionPipeline.download(source, trust_remote_code=False))
        check_parts(folder)
        with nobody_is_asked():
            return DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (AttributeError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{reason_of(error)}.") from error
    except (OSError, ValueError) as error:
        raise type(error)(f"{reason_of(error)}.") from error


def check_parts(folder: Path) -> None:
    """Refuse a pipeline's folder in which diffusers would look for code, in any of its versions.

    Raises:
        ValueError: which part, and why.
    """
    import diffusers

    index = read_index(folder)
    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ValueError(f"its _class_name {name!r} is no pipeline of diffusers.")
    if (folder / "None.py").exists():  # some versions take it for the code of a pipeline without any
        raise ValueError("it has a file None.py, which is code.")
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or not any(isinstance(name, str) for name in value):
            continue  # a plain setting, or a part that is left out
        if not part.isidentifier() or len(value) != 2 or not _is_known(*value):
            raise ValueError(f"its part {part!r} is of {value!r}, which is no part of diffusers or transformers.")
        check_files(folder, part, value[0])


def check_files(folder: Path, part: str, library: str = "diffusers") -> None:
    """Refuse a part's folder that would load more than its own weights.

    Raises:
        ValueError: it holds code under its library's name, adapters, or the name of a kernel to be downloaded.
    """
    for file, what in ((f"{library}.py", "code"), ("adapter_config.json", "adapters, which name a model of their own")):
        if (folder / part / file).exists():
            raise ValueError(f"its part {part!r} has a file {file}: {what}.")
    config = read_config(folder / part / "config.json")
    for path in sorted((folder / part).rglob("*.json")):  # tokenizers and processors have several
        found = (value for key, value in _settings([_json(path)]) if key == "auto_map")
        if any(not isinstance(value, int) for value in found):  # in a vocabulary it has a number
            raise ValueError(f"its part {part!r} names code of its own (auto_map in {path.name}).")
    kernel = next((v for k, v in _settings(config) if k.endswith("attn_implementation") and "/" in str(v)), None)
    if kernel is not None:
        raise ValueError(f"its part {part!r} names the kernel {kernel!r}, which is code of the Hub.")


def _json(path: Path) -> Any:
    """The content of a part's file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {path.parent.name}/{path.name} is no JSON.") from error


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """A configuration's settings, those of configurations within it included."""
    for key, value in config.items() if isinstance(config, dict) else [("", item) for item in config]:
        yield key, value
        if isinstance(value, dict | list):
            yield from _settings(value)


def read_config(path: Path) -> dict[str, Any]:
    """A part's configuration; empty if it has none.

    Raises:
        ValueError: the file holds none.
    """
    if not path.is_file():
        return {}
    config = _json(path)
    if not isinstance(config, dict):
        raise ValueError(f"its {path.parent.name}/{path.name} holds no settings by name.")
    return config


def is_scheduler(name: Any) -> bool:
    """Whether diffusers has a scheduler of this name, which a file says."""
    import diffusers

    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    return isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)


def _is_known(library: Any, name: Any) -> bool:
    """Whether it is a class of weights, words or noise levels; not ``Auto...``, which takes code from a folder."""
    import diffusers
    import transformers
    from diffusers import pipelines

    if not isinstance(library, str) or not isinstance(name, str):
        return False
    places = {"diffusers": diffusers, "transformers": transformers}
    cls = getattr(places.get(library) or getattr(pipelines, library, None), name, None)
    kinds = (
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.FeatureExtractionMixin,
        transformers.image_processing_utils.ImageProcessingMixin,
        transformers.ProcessorMixin,
    )
    return isinstance(cls, type) and issubclass(cls, kinds)
