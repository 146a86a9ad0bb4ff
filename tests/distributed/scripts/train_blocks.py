"""Train networks sharded block by block on one or more processes and save every rank's weights and what was sharded.

``torchrun --nproc_per_node 2 train_blocks.py FOLDER TEACHER``; the test also calls ``run`` for one process, in its own.
All processes together see the same batches and draw the same random numbers, however many there are.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from rank_script import end, full, sharded, trainer_of
from tiny import BERT
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from train_sid import RANKS, ROWS
from train_sid import sgd as two_sgd
from train_unilm import some_pairs

from lightning_plugins import DiffusionTeacher, Seq2SeqData, SiD, UniLMSeq2Seq
from lightning_plugins.core.distributed import close_process_group_at_exit

SGD = partial(torch.optim.SGD, lr=0.05)
RECOMPUTED = {"activation_checkpointing": True}
BF16 = {"precision": "bf16-mixed"}


class WideUniLM(UniLMSeq2Seq):
    """In float64, for which ModelParallelStrategy has no precision."""

    def build_network(self, *arguments):
        return super().build_network(*arguments).double()


class WideSiD(SiD):
    """In float64."""

    def configure_model(self):
        if not self.networks.is_built:
            self.networks.build(self.build_network)
            self.double()
        super().configure_model()


class Teacher(DiffusionTeacher):
    """In float64; each process takes every second row, and one process takes both halves."""

    def build_network(self):
        return super().build_network().double()

    def loss(self, batch, generator):
        ranks = [self.global_rank] if self.trainer.world_size == RANKS else range(RANKS)
        terms = [super(Teacher, self).loss(self._rows(batch, rank), self._noise(rank))["denoising"] for rank in ranks]
        return {"denoising": torch.stack(terms).mean()}

    def _rows(self, batch, rank):
        return {name: value[rank::RANKS] for name, value in batch.items()}

    def _noise(self, rank):
        return torch.Generator().manual_seed(10 * self.global_step + rank)


LORA = {"lora_rank": 2, "gradient_clip": 1.0, **two_sgd(1e-2, 1e-2)}
PLAIN = {"accumulate": 2, "gradient_clip": 1.0, **two_sgd(1e-2, 1e-2)}
TEACHER = {"block_out_channels": (8, 16), "pictures_every_n_epochs": 0, "optimizer": SGD}
# name: class, arguments, arguments of the Trainer
CASES = {
    "unilm": (WideUniLM, {"optimizer": SGD}, {"accumulate_grad_batches": 2}),
    "unilm-recomputed": (WideUniLM, {"optimizer": SGD, **RECOMPUTED}, {"accumulate_grad_batches": 2}),
    "unilm-single": (UniLMSeq2Seq, {"optimizer": SGD, **RECOMPUTED}, {}),
    "unilm-bf16": (UniLMSeq2Seq, {"optimizer": SGD}, BF16),
    "unilm-bf16-true": (UniLMSeq2Seq, {"optimizer": SGD}, {"precision": "bf16-true"}),
    "sid": (WideSiD, PLAIN, {}),
    "sid-recomputed": (WideSiD, {**PLAIN, **RECOMPUTED}, {}),
    "sid-lora": (WideSiD, LORA, {}),
    "sid-lora-recomputed": (WideSiD, {**LORA, **RECOMPUTED}, {}),
    "sid-lora-single": (SiD, {**LORA, **two_sgd(2e-3, 2e-3)}, {}),
    "sid-bf16": (SiD, PLAIN, BF16),
    "teacher": (Teacher, TEACHER, {}),
    "teacher-recomputed": (Teacher, {**TEACHER, **RECOMPUTED}, {}),
}


def kind_of(name):
    """``unilm``, ``sid`` or ``teacher``."""
    return name.split("-")[0]


def build(name, teacher, processes):
    """The module of a case, and its data."""
    kind, arguments, _ = CASES[name]
    if kind_of(name) == "unilm":
        sizes = {"vocab_size": 60, "max_source_length": 16, "max_target_length": 16, "batch_size": 8 // processes}
        data = Seq2SeqData(pairs=some_pairs(), val_size=6, length_grouping=False, **sizes)
        return kind(config=BERT, generation={"max_new_tokens": 4}, **arguments), data
    if kind_of(name) == "sid":
        few = {"num_pictures": 0, "updates_per_epoch": 2, "batch_size": RANKS * ROWS // processes}
        return kind(teacher=str(teacher), **few, **arguments), None
    generator = torch.Generator().manual_seed(0)
    batches = [{"image": torch.rand(8, 1, 8, 8, generator=generator)} for _ in range(2)]
    return kind(**arguments), DataLoader(batches, batch_size=None)


def networks_of(module):
    """By name; the frozen teacher is in no ``named_modules`` of SiD."""
    if hasattr(module, "networks"):
        return {"": module, "teacher": module.teacher.denoiser}
    return {"": module}


def units_of(module):
    """Names of the parts whose weights are gathered together."""
    return sorted(
        f"{prefix}:{name}"
        for prefix, network in networks_of(module).items()
        for name, part in network.named_modules()
        if isinstance(part, FSDPModule)
    )


def frozen_bytes(module):
    """Bytes of this process's shards of what is not trained, each storage once."""
    places = {}
    for network in networks_of(module).values():
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad and "lora_" not in name:
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                places[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(places.values())


def run(name, folder, teacher, processes=1, ckpt_path=None):
    """Train one case; write ``rank<r>.pt``."""
    seed_everything(1, verbose=False)
    model, data = build(name, teacher, processes)
    options = {"use_distributed_sampler": kind_of(name) == "unilm", "num_sanity_val_steps": 0}
    options |= {} if kind_of(name) == "unilm" else {"limit_val_batches": 0}
    unused = data if kind_of(name) == "teacher" else None  # Lightning misses validation data
    trainer = trainer_of(folder, processes, sharded, save_every=2, **(options | CASES[name][2]))
    trainer.fit(model, data, unused, ckpt_path=ckpt_path)
    result = {
        "weights": {key: full(value) for key, value in model.named_parameters()},
        "teacher": {key: full(value) for key, value in networks_of(model).get("teacher", model).named_parameters()},
        "units": units_of(model),
        "frozen_bytes": frozen_bytes(model),
        "strategy": type(trainer.strategy).__name__,
        "dtypes": sorted({str(value.dtype) for value in model.parameters()}),
    }
    if hasattr(model, "networks"):
        result["sample"] = model.sample(3, generator=torch.Generator().manual_seed(0))
    elif hasattr(model, "generate_text"):
        result["texts"] = model.generate_text(["one two", "nine eight seven"], num_beams=2)
    result["whole"] = [key for key, value in model.named_parameters() if not hasattr(value, "placements")]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root, teacher = map(Path, sys.argv[1:])
    for case in CASES:
        run(case, root / case, teacher, processes=RANKS)
    run("sid-lora", root / "resumed", teacher, RANKS, root / "sid-lora" / "ckpt" / "step=2.ckpt")
    end()
