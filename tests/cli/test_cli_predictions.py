"""What ``predict`` leaves: a table for people, the tensors beside it, one file each, in the order of the input."""

import csv
import json

import numpy as np
import pytest
import torch
from disks import little_room
from PIL import Image

from lightning_plugins.cli.predictions import Batch, _merged, join_batches, write_predictions

TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]
DATA = "--data=my_package.ToyData"
RECORDS = [
    [{"source": "猫 “\u2028”\n", "prediction": "a", "score": 0.5}, {"source": "", "prediction": None, "ids": [1, [2]]}],
    [{"source": "b", "kept": True, "more": {"x": 1}}],
]


def of(*outputs):
    """Batches whose places nobody knows."""
    return {0: [Batch([], output, None) for output in outputs]}


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_join_batches():
    joined = join_batches(
        [{"a": torch.ones(2, 3), "n": torch.tensor(1)}, {"a": torch.zeros(1, 3), "n": torch.tensor(2)}]
    )
    assert joined["a"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3]
    assert joined["n"].tolist() == [1, 2]
    ragged = [torch.ones(1, 3), torch.ones(1, 4)]
    assert join_batches(ragged) == ragged
    assert join_batches(["a", "b"]) == ["a", "b"]
    assert join_batches([torch.ones(1), None]) == [torch.ones(1), None]
    assert join_batches([]) == []


def test_records_are_a_line_each(tmp_path):
    (path,) = write_predictions(tmp_path / "run", of(*RECORDS), several=False)
    assert path == tmp_path / "run/predictions.jsonl"
    lines = path.read_bytes().decode().split("\n")
    records = [json.loads(line) for line in lines[:-1]]
    assert [record.pop("row") for record in records] == [0, 1, 2]
    assert records == [*RECORDS[0], *RECORDS[1]]
    assert lines[0].startswith('{"row": 0, "source": "猫 “') and lines[-1] == ""

    (path,) = write_predictions(tmp_path, {**of(*RECORDS), 1: of(RECORDS[1])[0]}, several=True)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["dataloader"] for line in lines[:-1]] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "predictions",
    [
        [[{"source": "a", "logits": torch.ones(2)}]],
        [[{"source": "a"}], ["b"]],
        [{"source": ["a", "b"]}],
        [[{1: "a"}]],
    ],
)
def test_anything_else_is_kept_as_it_is(tmp_path, predictions):
    (path,) = write_predictions(tmp_path, of(*predictions), several=False)
    assert path.name == "predictions.pt"
    found, expected = torch.load(path, weights_only=True), join_batches(predictions)
    assert str(found) == str(expected)


@pytest.mark.parametrize("kind", ["records", "tensors"])
def test_a_full_disk_leaves_the_predictions_before(tmp_path, kind):
    """A file that has half of the new ones would look like all of them."""
    one, many = (of([{"source": "a"}]), of([{"source": "a" * 100}] * 1000))
    if kind == "tensors":
        one, many = (of(torch.ones(2)), of(torch.ones(50_000)))
    (path,) = write_predictions(tmp_path / "run", one, several=False)
    before = path.read_bytes()
    with little_room(), pytest.raises(OSError, match="File too large"):
        write_predictions(tmp_path / "run", many, several=False)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_table_has_what_fits_into_a_cell(tmp_path):
    output = {
        "prediction": torch.tensor([[0, 2], [1, 0]]),
        "score": torch.tensor([[0.123456789, 1.0], [0.5, 0.25]]),
        "error": torch.tensor([1e-9, 2.0]),
        "picture": torch.zeros(2, 1, 3, 3),
        "lengths": torch.zeros(2, 10),
        "batch": torch.tensor(0),
    }
    files = write_predictions(tmp_path, {0: [Batch([4, 7], output, torch.tensor([1, 0]))]}, several=False)
    assert [file.name for file in files] == ["predictions.csv", "predictions.pt"]
    assert files[0].read_bytes().decode() == (
        "row,label,prediction,score,error\r\n4,1,0 2,0.123457 1.0,1e-09\r\n7,0,1 0,0.5 0.25,2.0\r\n"
    )


def test_samples_of_several_processes_come_in_the_order_of_the_input():
    """As three processes give them, whose shares differ; what is of a batch stays of a batch."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        count = int(torch.randint(1, 20, (), generator=draw))
        rows = torch.randperm(count, generator=draw).tolist()
        ranks = [[], [], []]
        while rows:
            size = int(torch.randint(1, 4, (), generator=draw))
            taken, rows = rows[:size], rows[size:]
            values = torch.tensor(taken)
            output = {"x": values[:, None].float(), "mean": values.float().mean()}
            ranks[int(torch.randint(3, (), generator=draw))].append(Batch(taken, output, values % 2))
        merged = _merged(ranks)
        joined = join_batches([batch.output for batch in merged])
        assert [row for batch in merged for row in batch.rows] == list(range(count))
        assert joined["x"][:, 0].tolist() == list(range(count))
        assert join_batches([batch.labels for batch in merged]).tolist() == [n % 2 for n in range(count)]
        assert joined["mean"].numel() == sum(map(len, ranks))
    records = [[Batch([1], [{"p": "b"}], None)], [Batch([2, 0], [{"p": "c"}, {"p": "a"}], None)]]
    assert [batch.output for batch in _merged(records)] == [[{"p": "a"}, {"p": "b"}, {"p": "c"}]]


def test_an_order_that_is_not_known_is_said():
    ranks = [[Batch([], torch.ones(1), None)], [Batch([], torch.zeros(2), None)]]
    with pytest.warns(UserWarning, match="The order of the input is not known"):
        merged = _merged(ranks)
    assert [batch.rows for batch in merged] == [[], []]
    ragged = [[Batch([1], torch.ones(1, 2), None)], [Batch([0], torch.ones(1, 3), None)]]
    with pytest.warns(UserWarning, match="The order of the input is not known"):
        assert [batch.rows for batch in _merged(ragged)] == [[], []]


# Runs of the command line


def test_own_logits_are_a_prediction_and_its_score(cli, trained, project, capsys):
    cli("predict", "--ckpt_path=last", DATA)
    folder = "lightning_logs/version_1"
    assert f"Predictions: {folder}/predictions.csv, {folder}/predictions.pt\n" in capsys.readouterr().out
    logits = torch.load(f"{folder}/predictions.pt", weights_only=True)["logits"]
    rows = read_csv(f"{folder}/predictions.csv")
    assert [int(row["row"]) for row in rows] == list(range(40))
    assert [int(row["prediction"]) for row in rows] == logits.argmax(1).tolist()
    scores = torch.tensor([float(row["score"]) for row in rows])
    torch.testing.assert_close(scores, logits.softmax(1).amax(1), rtol=1e-5, atol=0)
    generator = torch.Generator().manual_seed(0)
    torch.rand(40, 1, 8, 8, generator=generator)
    assert [int(row["label"]) for row in rows] == torch.randint(5, (40,), generator=generator).tolist()


def test_none_on_request(cli, trained, project):
    cli("predict", "--ckpt_path=last", DATA, "--return_predictions=false")
    assert not list(project.rglob("predictions*"))


@pytest.fixture
def pictures(project, monkeypatch, tmp_path_factory):
    """Bright cats and dark dogs, learnt in an instant."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    draw = np.random.default_rng(0)
    for n in range(40):
        path = project / "pics" / ("cat", "dog")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = (150, 0)[n % 2]
        Image.fromarray(draw.integers(low, low + 100, (12, 12), dtype=np.uint8)).save(path)
    return project / "pics"


CAPSNET = ["--model=CapsNet", "--model.channels=4", "--model.kernel_size=3", "--model.num_types=1"]
CAPSNET += ["--model.decoder_hidden=[4]", "--model.pictures_every_n_epochs=0"]


def test_own_pictures_are_called_by_their_files_and_classes(cli, pictures, project):
    own = ["--data=HFImages", "--data.path=pics", "--data.batch_size=4"]
    cli("fit", *CAPSNET, *own, "--model.lr=0.01", "--trainer.max_epochs=8")
    cli("predict", *own, "--ckpt_path=last")
    rows = read_csv("lightning_logs/version_1/predictions.csv")
    assert [*rows[0]] == ["file", "label", "prediction", "score"]
    assert len(rows) == 40 and sorted(row["file"] for row in rows) == [row["file"] for row in rows]
    assert all(row["file"].startswith(f"{row['label']}/") for row in rows)
    assert sum(row["prediction"] == row["label"] for row in rows) >= 38
    assert torch.load("lightning_logs/version_1/predictions.pt", weights_only=True)["poses"].shape[0] == 40

    new = project / "new"
    new.mkdir()
    for name in ("=1+1.png", "b.png"):
        Image.open(pictures / "dog" / "1.png").save(new / name)
    cli("predict", "--data=HFImages", "--data.path=new", "--data.label_column=none", "--ckpt_path=last")
    rows = read_csv("lightning_logs/version_2/predictions.csv")
    assert [(row["file"], row["prediction"]) for row in rows] == [("./=1+1.png", "dog"), ("b.png", "dog")]
    assert "label" not in rows[0]


def test_other_classes_of_the_same_number_are_refused(cli, pictures, project, mistake):
    cli("fit", *CAPSNET, "--data=HFImages", "--data.path=pics", "--data.batch_size=4")
    (pictures / "dog").rename(pictures / "ant")
    told = mistake("test", "--data=HFImages", "--data.path=pics", "--ckpt_path=last").splitlines()
    assert told == [
        "error: The classes of 'pics' are ant, cat, but the model was trained on cat, dog: give folders of these "
        "names, or label_column='none'."
    ]
    cli("predict", "--data=HFImages", "--data.path=pics", "--ckpt_path=last")
    rows = read_csv("lightning_logs/version_2/predictions.csv")
    assert {row["label"] for row in rows} == {"ant", "cat"} and {row["prediction"] for row in rows} <= {"cat", "dog"}


TEXTS = ["--model=UniLMSeq2Seq", "--model.generation.max_new_tokens=3", "--model.generate_every_n_epochs=0"]
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 16, "max_position_embeddings": 32}


def test_texts_with_and_without_targets(cli, project):
    (project / "pairs.tsv").write_text("source\ttarget\n" + "one two\ttwo one\n" * 40)
    (project / "ask.jsonl").write_text('{"source": "two"}\n{"source": "one", "target": "one"}\n')
    limits = ["--data.max_source_length=12", "--data.max_target_length=8", "--data.batch_size=4"]
    data = ["--data=Seq2SeqData", "--data.train_file=pairs.tsv", "--data.vocab_size=40", *limits]
    cli("fit", *TEXTS, f"--model.config={json.dumps(BERT)}", *data)
    cli("predict", "--data=Seq2SeqData", "--data.predict_file=ask.jsonl", *limits, "--ckpt_path=last")
    lines = (project / "lightning_logs/version_1/predictions.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["row"], first["place"], first["source"]) == (0, "ask.jsonl, line 1", "two")
    assert first["score"] < 0 and isinstance(first["prediction"], str)
    assert "reference" not in first and second["reference"] == "one"
