"""Train small UniLM models on one or more processes and save every rank's weights, metrics and texts.

``torchrun --nproc_per_node 2 train_unilm.py FOLDER``; the test also calls ``run`` for one process, in its own. All
processes together see the same batches, however many there are.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_script import end, full, trainer_of
from tiny import BERT

from lightning_plugins import Flooding, GradientPenalty, RandomState, Seq2SeqData, UniLMSeq2Seq
from lightning_plugins.core.distributed import close_process_group_at_exit

GLOBAL_BATCH = 8
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SOURCES = ["one two", "nine eight seven", "five", "ten ten"]


def sgd(parameters):
    """Unlike Adam it does not blow up the rounding of gradients that are nearly zero."""
    return torch.optim.SGD(parameters, lr=0.05)


def sharded(save_distributed_checkpoint=True):
    """FSDP2 over two processes."""
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=save_distributed_checkpoint)


def sharded_one_file():
    """FSDP2 whose checkpoints are gathered."""
    return sharded(save_distributed_checkpoint=False)


# name: arguments of UniLMSeq2Seq, arguments of the Trainer, strategy for two processes
CASES = {
    "ddp": ({"lr": 1e-3, "generation": {"max_new_tokens": 6, "num_beams": 2}}, {"precision": "64-true"}, "ddp"),
    "accumulate": (
        {"objective": "pseudo", "lr": 1e-3, "num_generate": 5},
        {"precision": "64-true", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        "ddp",
    ),
    "flooded": (
        {"optimizer": sgd, "attn_implementation": "eager", "generate_every_n_epochs": 0},
        {"precision": "64-true"},
        "ddp",
    ),
    "sharded": ({"optimizer": sgd}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, sharded),
    "one-file": ({"lr": 1e-3, "generate_every_n_epochs": 0}, {}, sharded_one_file),
}
RESUMED = ("sharded", "one-file")  # once more, from the checkpoint of the second step


class Watch(Callback):
    """Gradient norms before clipping, target tokens of each batch, and whether Flooding ascended."""

    def __init__(self):
        self.norms, self.tokens, self.ascends = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens.append(int((batch["segment_ids"] == 2).sum()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [full(p.grad).flatten() for p in pl_module.parameters()]
        self.norms.append(torch.cat(grads).norm().item())

    def on_train_batch_end(self, trainer, *_):
        self.ascends += [float(value) for name, value in trainer.callback_metrics.items() if name == "flood/active"]


def some_pairs(count=30):
    """Words and the same backwards, 1 to 6 of them."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(count):
        length = int(torch.randint(1, 7, (), generator=generator))
        words = [WORDS[i] for i in torch.randint(10, (length,), generator=generator).tolist()]
        pairs.append([" ".join(words), " ".join(words[::-1])])
    return pairs


def run(name, folder, processes=1, ckpt_path=None):
    """Train, validate and predict one case; write ``rank<r>.pt``."""
    arguments, options, strategy = CASES[name]
    seed_everything(1, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.jsonl"
    sources.write_text("\n".join(json.dumps({"source": source}) for source, _ in some_pairs(9)))
    data = Seq2SeqData(
        pairs=some_pairs(),
        val_size=11,
        predict_file=str(sources),
        vocab_size=60,
        max_source_length=16,
        max_target_length=16,
        batch_size=GLOBAL_BATCH // processes,
        length_grouping=False,
    )
    model = UniLMSeq2Seq(config=BERT, **({"generation": {"max_new_tokens": 6}} | arguments))
    watch = Watch()
    changed = [Flooding(3.9), GradientPenalty(0.01, engine="exact")] if name == "flooded" else []
    trainer = trainer_of(folder, processes, strategy, watch, RandomState(), *changed, save_every=2, **options)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    metrics = dict(trainer.callback_metrics)
    records = [record for batch in trainer.predict(model, data) for record in batch]
    result = {
        "weights": {key: full(value) for key, value in model.named_parameters()},
        "metrics": {key: torch.as_tensor(value) for key, value in metrics.items()},
        "norms": watch.norms,
        "tokens": watch.tokens,
        "ascends": watch.ascends,
        "strategy": type(trainer.strategy).__name__,
        "vocabulary": data.tokenizer.get_vocab(),
        "records": records,
    }
    if name == "sharded":
        result["texts"] = texts(model, [trainer.global_rank] if processes == 2 else [0, 1])
        with torch.no_grad():
            result["logits"] = model(data.dataset("val").__getitems__([[0], [1]]))
        model.export(folder / "export")
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


def texts(model, ranks):
    """Of other sources and lengths for each rank, so that the ranks would stop at different steps."""
    searches = {}, {"num_beams": 3}, {"use_cache": False}
    return [model.generate_text(SOURCES[r:], max_new_tokens=3 + 5 * r, **search) for search in searches for r in ranks]


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for case in CASES:
        run(case, root / case, processes=2)
    for case in RESUMED:
        run(case, root / f"{case}-resumed", processes=2, ckpt_path=root / case / "ckpt" / "step=2.ckpt")
    end()
