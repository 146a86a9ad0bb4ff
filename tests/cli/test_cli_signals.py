import signal
import subprocess
import sys
import time

import pytest
import torch

SLOW = """
import signal, time
from my_package import ToyData, ToyNet

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored

class Slow(ToyNet):
    def training_step(self, batch, index):
        print("step", self.global_step, flush=True)
        time.sleep(0.05)
        return super().training_step(batch, index)
"""

WORDS = (
    "fit --model slow.Slow --data ToyData --trainer.max_epochs 1000 --trainer.enable_progress_bar false "
    "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.save_last=true --trainer.callbacks.every_n_train_steps=1"
)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_interrupted_run_ends_cleanly_and_says_how_to_go_on(name, status, project):
    (project / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "lightning_plugins", *WORDS.replace("ToyData", "my_package.ToyData").split()]
    with (project / "out.txt").open("w") as out:
        run = subprocess.Popen(command, cwd=project, stdout=out, stderr=subprocess.STDOUT)
        while "step 4" not in (project / "out.txt").read_text() and run.poll() is None:
            time.sleep(0.1)
        run.send_signal(getattr(signal, name))
        try:
            assert run.wait(timeout=600) == status
        finally:
            run.kill()
    text = (project / "out.txt").read_text()
    assert "Traceback" not in text
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert text.endswith(f"Interrupted. Go on with the same command and --ckpt_path {path}\n")
    assert torch.load(project / path, weights_only=True)["global_step"] >= 4
