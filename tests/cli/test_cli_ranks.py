import subprocess
import sys

import pytest
import torch


@pytest.mark.ddp
def test_each_rank_writes_its_predictions_in_one_folder(project, trained):
    words = f"predict --ckpt_path {trained} --data my_package.ToyData --trainer.accelerator cpu --trainer.devices 2"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run = subprocess.run(
        [*launcher, "-m", "lightning_plugins", *words.split()], cwd=project, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    files = sorted(project.glob("lightning_logs/*/predictions*"))
    assert [file.name for file in files] == ["predictions_rank0.pt", "predictions_rank1.pt"]
    assert len({file.parent for file in files}) == 1
    assert [len(torch.load(file, weights_only=True)["logits"]) for file in files] == [20, 20]
