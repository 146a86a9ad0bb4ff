"""Two processes train the UniLM model that one process trains on the joined batches: weights, scores, texts, files."""

from types import SimpleNamespace

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("train_unilm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all cases: run by one process, this one, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("unilm")
    one, two = folder / "one", folder / "two"
    with torchrun("train_unilm", two, cwd=folder) as log:
        for name in script.CASES:
            script.run(name, one / name)
    return SimpleNamespace(one=one, two=two, log=log.read_text())


def load(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def both(folder):
    return load(folder), load(folder, rank=1)


@pytest.mark.parametrize("name", script.CASES)
def test_two_processes_equal_one(runs, name):
    """Every target token weighs the same, though the ranks' batches hold unlike numbers of them."""
    one, two = load(runs.one / name), both(runs.two / name)
    whole, *parts = (result["tokens"] for result in (one, *two))
    assert whole == [sum(counts) for counts in zip(*parts, strict=True)]
    assert max(abs(first - second) for first, second in zip(*parts, strict=True)) >= 4
    sharded = name in ("sharded", "one-file")
    assert two[0]["strategy"] == ("ModelParallelStrategy" if sharded else "DDPStrategy")
    assert len(one["norms"]) == len(two[0]["norms"]) == (4 if name in ("accumulate", "sharded") else 6)
    assert two[0]["norms"] == pytest.approx(one["norms"], rel=1e-4)
    for key, value in one["weights"].items():
        assert torch.equal(two[0]["weights"][key], two[1]["weights"][key]), f"the ranks differ in {key}"
        if not key.endswith("key.bias"):  # the loss does not depend on it, and AdamW blows up the rounding
            torch.testing.assert_close(two[0]["weights"][key], value, rtol=0, atol=1e-5 if sharded else 1e-12)


def test_the_flood_level_is_that_of_all_tokens(runs):
    one, *two = load(runs.one / "flooded"), *both(runs.two / "flooded")
    assert {0.0, 1.0} == set(one["ascends"])
    assert one["ascends"] == two[0]["ascends"] == two[1]["ascends"]


@pytest.mark.parametrize("name", script.CASES)
def test_evaluation_is_of_all_samples(runs, name):
    """Loss, perplexity and scores of 11 samples, and predictions of 9, which two processes cannot share equally."""
    one, two = load(runs.one / name), both(runs.two / name)
    names = {key for key in one["metrics"] if key.startswith("val/")}
    scores = set() if name in ("flooded", "one-file") else {"val/rougeL", "val/chrf", "val/bleu", "val/exact_match"}
    assert {"val/loss", "val/perplexity"} | scores <= names
    for key in names:
        for result in two:
            assert result["metrics"][key].item() == pytest.approx(one["metrics"][key].item(), rel=1e-5), key
    assert not scores or one["metrics"]["val/chrf"] > 0
    records = sorted((record for result in two for record in result["records"]), key=by_source)
    assert len(records) == len(one["records"]) == 9
    for record, expected in zip(records, sorted(one["records"], key=by_source), strict=True):
        assert record == expected | {"score": pytest.approx(expected["score"], rel=1e-5)}
    assert [record["source"] for record in one["records"]] == [source for source, _ in script.some_pairs(9)]


def by_source(record):
    return record["source"], record["prediction"]


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_tables_are_written_once(runs, name):
    def tables(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("tables/**/*.md")}

    assert tables(runs.two / name) == tables(runs.one / name)
    assert len(tables(runs.one / name)) == 2


def test_all_processes_learn_the_same_tokens(runs):
    vocabularies = [result["vocabulary"] for result in (load(runs.one / "ddp"), *both(runs.two / "ddp"))]
    assert len(vocabularies[0]) > 30
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_sharded_processes_decode_unlike_sources(runs):
    """Each waits for the one that writes longest: greedy, with beams, and without a cache."""
    one, (first, second) = load(runs.one / "sharded"), both(runs.two / "sharded")
    assert one["texts"] == [text for pair in zip(first["texts"], second["texts"], strict=True) for text in pair]
    assert len(set(map(tuple, one["texts"]))) > 3
    for result in (first, second):
        torch.testing.assert_close(result["logits"], one["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", script.RESUMED)
def test_sharded_checkpoints_resume_exactly(runs, name):
    """From the second step to the end of the uninterrupted run."""
    path = runs.two / name / "ckpt" / "step=2.ckpt"
    assert (path / "meta.pt").is_file() if name == "sharded" else path.is_file()
    whole, resumed = load(runs.two / name), load(runs.two / f"{name}-resumed")
    assert 0 < len(resumed["norms"]) == len(whole["norms"]) - 2
    for key, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][key], value), key


def test_one_process_loads_what_two_have_gathered(runs):
    (path,) = (runs.two / "one-file" / "ckpt").glob("step=6.ckpt")
    module = script.UniLMSeq2Seq.load_from_checkpoint(path, weights_only=True)
    assert module.tokenizer.get_vocab() == load(runs.two / "one-file")["vocabulary"]
    for key, value in load(runs.two / "one-file")["weights"].items():
        assert torch.equal(module.get_parameter(key), value), key


def test_sharded_processes_export_for_plain_transformers(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [path / "sharded" / "export" for path in (runs.one, runs.two)]
    one, two = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value, rtol=0, atol=1e-5)
    assert two.get_output_embeddings().weight is two.get_input_embeddings().weight
    trained = load(runs.two / "sharded")
    for key, value in trained["weights"].items():
        assert torch.equal(two.get_parameter(key.removeprefix("net.")), value), key
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    inputs = tokenizer(script.SOURCES, padding=True, return_tensors="pt")
    output = two.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    assert texts == trained["texts"][0]


def test_no_warning_asks_for_a_repair(runs):
    for text in ("sync_dist", "find_unused", "view tensor", "was called before"):
        assert text not in runs.log
