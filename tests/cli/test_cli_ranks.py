"""Commands on two processes."""

import csv
import json
import subprocess
import sys

import pytest
import torch

TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]


def torchrun(project, *words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run = subprocess.run(
        [*launcher, "-m", "lightning_plugins", *words, *TWO], cwd=project, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.ddp
def test_predictions_of_all_ranks_are_one_file_in_the_order_of_the_input(project, trained, cli):
    """Of a plain DataLoader, which Lightning cuts into shares, and 40 rows in batches of 16."""
    cli("predict", f"--ckpt_path={trained}", "--data=my_package.ToyData")
    run = torchrun(project, "predict", "--ckpt_path", str(trained), "--data", "my_package.ToyData")
    one, two = (project / f"lightning_logs/version_{number}" for number in (1, 2))
    assert run.stdout.count("Predictions: ") == 1
    assert sorted(path.name for path in two.glob("predictions*")) == ["predictions.csv", "predictions.pt"]
    first, second = (torch.load(folder / "predictions.pt", weights_only=True) for folder in (one, two))
    torch.testing.assert_close(second["logits"], first["logits"])
    rows = [list(csv.DictReader((folder / "predictions.csv").read_text().splitlines())) for folder in (one, two)]
    assert [row["row"] for row in rows[1]] == [str(n) for n in range(40)]
    for name in ("label", "prediction"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]


@pytest.mark.ddp
def test_of_this_packages_data(project, cli):
    """Images and texts, whose loaders cut by themselves."""
    small = ["--model.channels=4", "--model.kernel_size=3", "--model.num_types=1", "--model.decoder_hidden=[4]"]
    digits = ["--data=Digits", "--data.image_size=8", "--data.batch_size=50"]
    cli(
        "fit",
        "--model=CapsNet",
        *small,
        "--model.pictures_every_n_epochs=0",
        *digits,
        "--trainer.limit_train_batches=2",
    )
    cli("predict", *digits, "--ckpt_path=last")
    torchrun(project, "predict", *digits, "--ckpt_path=last")
    one, two = (project / f"lightning_logs/version_{number}/predictions.csv" for number in (1, 2))
    rows = [list(csv.DictReader(path.read_text().splitlines())) for path in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 359
    assert [(row["row"], row["label"], row["prediction"]) for row in rows[0]] == [
        (row["row"], row["label"], row["prediction"]) for row in rows[1]
    ]

    bert = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 16, "max_position_embeddings": 32}
    (project / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"{n} one\t{n}\n" for n in range(29)))
    words = ["--data=Seq2SeqData", "--data.train_file=pairs.tsv", "--data.vocab_size=40", "--data.batch_size=4"]
    words += ["--data.max_source_length=12", "--data.max_target_length=8", "--data.predict_file=pairs.tsv"]
    model = ["--model=UniLMSeq2Seq", f"--model.config={json.dumps(bert)}", "--model.generate_every_n_epochs=0"]
    cli("fit", *model, "--model.generation.max_new_tokens=3", *words)
    torchrun(project, "predict", *words, "--ckpt_path=last")
    (path,) = project.glob("lightning_logs/*/predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(29))
    assert [line["source"] for line in lines] == [f"{n} one" for n in range(29)]
    assert [line["reference"] for line in lines] == [str(n) for n in range(29)]
