"""Train UniLMs from random weights on tasks with known answers, and hand one on to plain transformers.

A BERT of 75,000 parameters learns to copy, reverse and sort six digits in some 20 CPU seconds each, because it may look
at the whole source and at what it has written so far, and at nothing else. Its tokenizer is learnt from the pairs.

    lightning-plugins copy unilm_from_scratch . && python unilm_from_scratch.py

The last row is the control. A mask that lets a token see itself learns the first three tasks perfectly, too; but where
the targets are digits that have nothing to do with the source, no honest model gets below their entropy, 6/7 ln 10 =
1.974 nats per token (six digits and a certain [SEP]), and a leak falls to 0.
"""

import argparse
import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_plugins import Seq2SeqData, UniLMSeq2Seq

DIGITS = 6
CHANCE = DIGITS / (DIGITS + 1) * math.log(10)
TASKS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": list,
    "reverse": lambda digits: digits[::-1],
    "sort": sorted,
    "unrelated": lambda digits: random.choices(range(10), k=DIGITS),
}
CONFIG = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make_pairs(task: str, count: int, seed: int) -> list[list[str]]:
    """``[["5 3 2 9 1 0", "0 1 2 3 5 9"], ...]``; put your own texts here, or a file into ``Seq2SeqData``."""
    random.seed(seed)
    sources = [random.choices(range(10), k=DIGITS) for _ in range(count)]
    return [[" ".join(map(str, source)), " ".join(map(str, TASKS[task](source)))] for source in sources]


def train(task: str, pairs: int, epochs: int) -> tuple[UniLMSeq2Seq, dict[str, float]]:
    """Train on a task; returns the model and its scores on 256 pairs that it has not seen."""
    seed_everything(0, verbose=False)
    data = Seq2SeqData(
        pairs=make_pairs(task, pairs + 256, seed=1),
        val_size=256,
        vocab_size=40,
        max_source_length=DIGITS + 2,
        max_target_length=DIGITS + 1,
        batch_size=64,
    )
    model = UniLMSeq2Seq(
        config=CONFIG,
        lr=3e-3,
        label_smoothing=0.0,
        generation={"max_new_tokens": DIGITS + 1},
        generate_every_n_epochs=epochs,
        num_generate=256,
    )
    trainer = Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    return model.eval(), {name: value.item() for name, value in trainer.callback_metrics.items()}


def run_in_plain_transformers(folder: Path, sources: list[str]) -> list[str]:
    """What a colleague without this package does with the exported folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    rows = tokenizer(sources, padding=True, return_tensors="pt")
    tokens = model.generate(**rows)[:, rows["input_ids"].shape[1] :]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the tasks and print the table; returns ``{task: scores}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--pairs", type=int, default=8000, help="training pairs")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--export", type=Path, help="folder for the first task's model, which must not exist")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the network is too small to share
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(f"| task | loss (no better than chance: {CHANCE:.3f}) | all digits right | an answer |\n|---|---|---|---|")
    table, sources = {}, ["9 3 5 0 3 1"]
    for task in args.tasks:
        model, scores = train(task, args.pairs, args.epochs)
        (answer,) = model.generate_text(sources)
        print(f"| {task} | {scores['val/loss']:.3f} | {scores['val/exact_match']:.1%} | {sources[0]} -> {answer} |")
        table[task] = scores
        if args.export and task == args.tasks[0]:
            model.export(args.export)
    if args.export:
        (answer,) = run_in_plain_transformers(args.export, sources)
        print(f"{args.export} in plain transformers: {sources[0]} -> {answer}")
    return table


if __name__ == "__main__":
    main()
