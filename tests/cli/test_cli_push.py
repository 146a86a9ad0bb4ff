"""``export --push_to_hub``, to a stand-in for the Hub on this machine; nothing else is asked."""

import os
import subprocess
import sys

import pytest
from hub import Hub, stand_in

KEEPER = '''
from lightning.pytorch import LightningModule
import torch


class Keeper(LightningModule):
    """Exports its only weight and a card."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def export(self, folder):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("# Kept")
        (folder / "inner").mkdir()
        (folder / "inner" / "weight.txt").write_text(str(self.weight.item()))
'''


@pytest.fixture
def export(own_module, write_checkpoint, project):
    """Run the command in a process of its own, where the Hub's address is read when it starts."""
    write_checkpoint(own_module("keeper", KEEPER).Keeper(), "checkpoints/last.ckpt")

    def run(*words, endpoint="http://127.0.0.1:9", token="hf_secret", offline="0"):
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(project)}
        hub |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        command = [sys.executable, "-m", "lightning_plugins", "export", "--ckpt_path=last", "--model=keeper.Keeper"]
        return subprocess.run(
            [*command, *words], env=kept | hub, cwd=project, capture_output=True, text=True, timeout=120
        )

    return run


def test_the_folder_is_pushed_with_the_users_token(export, project):
    hub = Hub()
    with stand_in(hub) as endpoint:
        run = export("--push_to_hub=me/kept", "--output=kept", "--private=true", endpoint=endpoint)
        assert run.returncode == 0, run.stderr
        again = export("--push_to_hub=me/kept", endpoint=endpoint)
    assert run.stdout == f"Exported: kept (its README.md shows how to run it)\nPushed: {hub.address}/me/kept\n"
    assert [bool(private) for private in hub.repositories["me/kept"]] == [True, False]
    assert hub.files == {"README.md": b"# Kept", "inner/weight.txt": b"0.5"}
    assert hub.tokens == {"Bearer hf_secret"}
    assert (again.returncode, again.stdout) == (0, f"Pushed: {hub.address}/me/kept\n")
    assert "hf_secret" not in run.stdout + run.stderr
    assert sorted(path.name for path in project.glob("kept*")) == ["kept"]


def test_what_cannot_be_pushed_is_said_before_a_model_is_loaded(export, project):
    for words, options, told in (
        (["--push_to_hub=me/kept"], {"token": None}, [
            "error: --push_to_hub 'me/kept': nobody is logged in to the Hub.",
            "Run `hf auth login`, or set HF_TOKEN to a token.",
        ]),
        (["--push_to_hub=me/kept"], {"offline": "1"}, [
            "error: --push_to_hub 'me/kept': the Hub is switched off by HF_HUB_OFFLINE. Unset it, or leave the option "
            "out.",
        ]),
        (["--push_to_hub=kept"], {}, [
            "error: --push_to_hub 'kept': an id is the owner and a name, such as me/my-digits.",
        ]),
        ([], {}, ["error: export needs a place: --output FOLDER, or --push_to_hub OWNER/NAME."]),
    ):  # fmt: skip
        run = export(*words, **options)
        assert (run.returncode, run.stderr.splitlines()) == (2, told)


def test_a_hub_that_refuses_or_does_not_answer(export, project):
    with stand_in(Hub(refuse=(403, {"error": "You have no rights here."}))) as endpoint:
        run = export("--push_to_hub=me/kept", "--output=kept", endpoint=endpoint)
    lines = run.stderr.splitlines()[1:]  # the first tells which checkpoint is taken
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert lines[0].startswith("error: --push_to_hub 'me/kept': ") and "403" in lines[0]
    assert lines[1] == "The folder is whole; to push it: hf upload me/kept kept"
    assert (project / "kept/inner/weight.txt").is_file()
    run = export("--push_to_hub=me/kept")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[1].startswith("error: --push_to_hub 'me/kept': ")
