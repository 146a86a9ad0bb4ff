"""An exported folder on the Hugging Face Hub. Imports nothing heavy before it is wanted."""

import re
from pathlib import Path

from lightning_plugins.cli.messages import RunStoppedError, UsageError

_NETWORK = re.compile(r"huggingface_hub|httpx|httpcore|requests")  # libraries whose errors tell of it
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def check_push(repo_id: str) -> None:
    """Refuse what cannot be pushed, before a model is loaded.

    Raises:
        UsageError: the id is none, the Hub is switched off, or nobody is logged in.
    """
    import huggingface_hub
    from huggingface_hub import constants

    told = f"--push_to_hub {repo_id!r}"
    if not _ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise UsageError(f"{told}: an id is the owner and a name, such as me/my-digits.")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{told}: the Hub is switched off by HF_HUB_OFFLINE. Unset it, or leave the option out.")
    if not huggingface_hub.get_token():
        raise UsageError(f"{told}: nobody is logged in to the Hub.", "Run `hf auth login`, or set HF_TOKEN to a token.")


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder as a model, with the token that huggingface_hub knows.

    Args:
        folder: as it was exported. Files of these names that the repository has are replaced; its history keeps them.
        repo_id: owner and name; made if there is none.
        private: whether a repository that is made is private.

    Returns:
        Its address.

    Raises:
        RunStoppedError: the Hub does not answer, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="lightning_plugins")
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Exported by lightning-plugins")
    except Exception as error:
        if not _NETWORK.match(type(error).__module__) and not isinstance(error, OSError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise RunStoppedError(f"--push_to_hub {repo_id!r}: {reason}.") from error
    return str(address)
