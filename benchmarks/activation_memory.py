"""What activation checkpointing keeps between forward and backward pass, and what a step then costs.

    python benchmarks/activation_memory.py [--part unilm sid teacher] [--tokens 512] [--rows 4] [--size 32]
        [--channels 64 128 128] [--batch 16] [--rounds 0] [--json PATH]

UniLMSeq2Seq of BERT-base's shape; a DiffusionTeacher's U-Net, and SiD of that teacher. Kept bytes are those of the
tensors that autograd saves, each storage once and parameters left out, of the largest backward pass of a step; they
depend on shapes alone. With ``--rounds`` steps of both variants take turns in one process, and the ratio of their CPU
time is told; on a GPU, where the most memory that was allocated is told too, of their wall time.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_plugins import DiffusionTeacher, SiD, UniLMSeq2Seq

PARTS = ("unilm", "sid", "teacher")
BERT_BASE = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BERT_BASE |= {"intermediate_size": 3072, "max_position_embeddings": 512}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
Step = Callable[[], None]


class Kept:
    """Bytes that autograd keeps: most that lived at a time, parameters left out."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.theirs = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.users: dict[int, int] = {}
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "_Held":
        """Count a storage when it is first kept."""
        return _Held(self, tensor)

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class _Held:
    """A saved tensor; its storage counts as long as any holder of it lives."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor, self.place = kept, tensor, tensor.untyped_storage().data_ptr()
        self.size = 0 if self.place in kept.theirs else tensor.untyped_storage().nbytes()
        users = kept.users.get(self.place, 0)
        kept.users[self.place] = users + 1
        if not users:
            kept.now += self.size
            kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.users[self.place] -= 1
        if not self.kept.users[self.place]:
            self.kept.now -= self.size


def tokenizer_folder(folder: Path) -> str:
    """A vocabulary of BERT's size."""
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30517))]
    BertTokenizer(vocab={name: i for i, name in enumerate(names)}).save_pretrained(folder)
    return str(folder)


def unilm(args: argparse.Namespace, folder: Path, on: bool) -> tuple[LightningModule, Any]:
    """The module, and the batch that it trains on again and again."""
    tokenizer = tokenizer_folder(folder / "tokenizer")
    module = UniLMSeq2Seq(config=BERT_BASE, tokenizer=tokenizer, activation_checkpointing=on)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30522, (args.rows, args.tokens), generator=generator)
    segments = torch.ones_like(ids)
    segments[:, 3 * args.tokens // 4 :] = 2
    return module, {"input_ids": ids, "segment_ids": segments}


def teacher(args: argparse.Namespace, folder: Path, on: bool) -> tuple[LightningModule, Any]:
    """As above."""
    torch.manual_seed(0)
    module = DiffusionTeacher(
        (3, args.size, args.size),
        block_out_channels=args.channels,
        layers_per_block=2,
        pictures_every_n_epochs=0,
        activation_checkpointing=on,
    )
    return module, {"image": torch.rand(args.batch, 3, args.size, args.size)}


def sid(args: argparse.Namespace, folder: Path, on: bool) -> tuple[LightningModule, Any]:
    """As above; the batch says how many images to make."""
    if not (folder / "teacher").exists():
        teacher(args, folder, False)[0].export(folder / "teacher")
    module = SiD(teacher=str(folder / "teacher"), num_pictures=0, batch_size=args.batch, activation_checkpointing=on)
    return module, None


def network_of(module: LightningModule) -> nn.Module:
    """Whose parameters are told."""
    if isinstance(module, SiD):
        return module.networks.generator
    return module.denoiser if isinstance(module, DiffusionTeacher) else module


def measure(args: argparse.Namespace, part: str, on: bool, folder: Path, steps: int, count: bool) -> dict[str, float]:
    """Some steps: kept bytes of the last, or the seconds of one."""
    module, batch = {"unilm": unilm, "sid": sid, "teacher": teacher}[part](args, folder, on)
    figures: dict[str, float] = {}
    original, marks = module.training_step, []
    cuda = torch.cuda.is_available()

    def step(*arguments: Any) -> Any:
        marks.append(time.perf_counter() if cuda else time.process_time())
        if not count:
            return original(*arguments)
        teachers = module.teacher.denoiser.parameters() if part == "sid" else ()
        with Kept([*module.parameters(), *teachers]) as kept:
            output = original(*arguments)
        figures["kept_bytes"] = kept.most
        return output

    module.training_step = step
    loader = None if batch is None else torch.utils.data.DataLoader([batch] * steps, batch_size=None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    Trainer(max_steps=steps, limit_val_batches=0, **QUIET).fit(module, loader)
    if cuda:
        figures["allocated_bytes"] = torch.cuda.max_memory_allocated()
    if len(marks) > 2:
        figures["seconds"] = statistics.median(b - a for a, b in itertools.pairwise(marks[1:]))
    figures["parameters"] = sum(parameter.numel() for parameter in network_of(module).parameters())
    return figures


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--rows", type=int, default=4, help="of a batch of texts")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 128])
    parser.add_argument("--batch", type=int, default=16, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=0, help="turns of six steps that are timed; 0 for none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows: dict[str, dict[str, Any]] = {}
    print(
        f"torch {torch.__version__}, float32; {args.rows} rows of {args.tokens} tokens, {args.batch} images of ", end=""
    )
    print(f"{args.size} x {args.size} px\n\n| part | parameters | kept MB | with checkpointing | share | time |")
    print("|---|---|---|---|---|---|")
    for part in args.part:
        with tempfile.TemporaryDirectory() as folder:
            plain, again = (measure(args, part, on, Path(folder), 1, True) for on in (False, True))
            ratios = []
            for _ in range(args.rounds):
                first, second = (measure(args, part, on, Path(folder), 6, False)["seconds"] for on in (False, True))
                ratios.append(second / first)
        rows[part] = {"plain": plain, "checkpointed": again, "ratios": ratios}
        key = "allocated_bytes" if torch.cuda.is_available() else "kept_bytes"
        told = f"{statistics.median(ratios):.2f}" if ratios else "not measured"
        cells = f"{plain['parameters'] / 1e6:.1f} M | {plain[key] / 1e6:.1f} | {again[key] / 1e6:.1f}"
        print(f"| {part} | {cells} | {again[key] / plain[key]:.2f} | {told} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
