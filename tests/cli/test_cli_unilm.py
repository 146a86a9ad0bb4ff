"""From a file of pairs to texts in the terminal, by the command line alone."""

import json
import random
import threading
from pathlib import Path

import pytest
import yaml
from spoken import errors

from lightning_plugins import UniLMSeq2Seq
from lightning_plugins.cli import main

SMALL = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


def write_pairs(path, count, seed):
    """Three words, and the same in capitals: a vocabulary of twelve words."""
    draw = random.Random(seed)
    rows = [" ".join(draw.choices(["eins", "zwei", "drei", "vier", "猫", "犬"], k=3)) for _ in range(count)]
    path.write_text("source\ttarget\n" + "".join(f"{row}\t{row.upper()}\n" for row in rows), encoding="utf-8")
    return rows


def test_fit_generate_predict(project, capsys):
    write_pairs(project / "train.tsv", 1000, seed=0)
    rows = write_pairs(project / "test.tsv", 10, seed=1)
    data = ["--data=Seq2SeqData", "--data.max_source_length=12", "--data.max_target_length=8"]
    fit = [
        *("fit", *QUIET, *data, "--data.train_file=train.tsv", "--data.vocab_size=60", "--data.batch_size=16"),
        *("--model=UniLMSeq2Seq", f"--model.config={json.dumps(SMALL)}", "--model.lr=5e-3"),
        *(
            "--model.generation={max_new_tokens: 6}",
            "--model.generate_every_n_epochs=3",
            "--trainer.max_epochs=3",
            "--trainer.log_every_n_steps=9",
        ),
        *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"),
    ]
    main(fit)
    capsys.readouterr()

    generate = ["generate", "--ckpt_path=last"]
    for words in ([], ["--num_beams=2", "--batch_size=2"]):
        main([*generate, *words, "--text=drei eins 猫", "--text=zwei 犬 zwei"])
        assert [line.strip() for line in capsys.readouterr().out.splitlines()] == ["DREI EINS 猫", "ZWEI 犬 ZWEI"]
    main([*generate, "--max_new_tokens=1", "--text=vier vier vier"])
    assert capsys.readouterr().out.split() == ["VIER"]

    with pytest.raises(SystemExit):
        main([*generate, "--max_new_tokens=40", "--text=vier"])
    assert errors(capsys).startswith("error: max_new_tokens=40 leaves no room for a source")

    last = project / "lightning_logs/version_0/checkpoints/last.ckpt"
    pieces = UniLMSeq2Seq.load_from_checkpoint(last, weights_only=True).stream_text(
        "vier", min_new_tokens=20, max_new_tokens=20
    )
    before = threading.active_count()
    next(pieces)
    pieces.close()  # as `generate` does when its reader leaves
    assert threading.active_count() == before, "a thread that outlives Python's end aborts the process"

    main(["predict", "--ckpt_path=last", *QUIET, *data, "--data.test_file=test.tsv"])
    assert "predictions.jsonl" in capsys.readouterr().out
    lines = (project / "lightning_logs/version_1/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record.pop("score") < 0 for record in records)  # a mean of log-probabilities
    assert records == [
        {"row": i, "place": f"test.tsv, line {i + 2}", "source": row}
        | {"prediction": row.upper(), "reference": row.upper()}
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", ["cnn_dailymail", "csl_titles", "question_generation"])
def test_configs_leave_room_and_do_not_stop_at_a_long_target(name):
    file = Path(__file__).parents[2] / "configs/unilm" / f"{name}.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    model, data = content["model"]["init_args"], content["data"]["init_args"]
    positions = model.get("max_positions", 512)
    assert data["max_source_length"] + data["max_target_length"] <= positions
    assert data["max_source_length"] + model["generation"]["max_new_tokens"] <= positions
    assert model["generation"]["max_new_tokens"] >= data["max_target_length"]
    assert data["long_targets"] == "drop"  # the longest title of csl/dev.tsv has 46 tokens, summaries have hundreds
