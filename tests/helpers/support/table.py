"""Write ``docs/support.md`` from what the cells found: ``python -m support.table RESULTS`` (``make test-support``)."""

import importlib.metadata
import json
import math
import re
import sys
import time
from pathlib import Path

from support.cells import MODES, PARTS, STEPS

PAGE = Path(__file__).parents[3] / "docs/support.md"
TEXT = """# Models in the modes of several processes

Each model is trained for {steps} steps in each mode, and once by one process with the same precision and samples in a
step. A cell is the largest distance between the two runs' weights, over all processes, in units of the farthest
that training moved a weight, rounded up to a power of ten; `=` is equal bit for bit; `no` and a number is a refusal
before the first step, whose sentence stands below; an empty cell is a mode that the model does not have.

`EAE` looks for nearest neighbours, which rounding swaps: double precision shows that the sums are the same.

Made by `make test-support` on {date}, two to four processes on a CPU, with
{versions}.
Not tried: CUDA, FSDP1 and DeepSpeed. [docs/several_gpus.md](several_gpus.md) has the command lines.

{heads}
|{rule}
"""
MEANINGS = {
    "DDP": '`strategy="ddp"`; for SiD `ddp_find_unused_parameters_true`, as it asks',
    "DDP of four": "the same with four processes",
    "accumulation, clipping": "DDP, `accumulate_grad_batches=2`, `gradient_clip_val=0.1`; SiD's own arguments for both",
    "64-true": "DDP in double precision",
    "bf16-mixed": "DDP; sums in another order round differently, by 2^-8",
    "bf16-true": "DDP with weights in half precision",
    "activation checkpointing": "DDP, `activation_checkpointing=True`, against one process without",
    "FSDP2": "`ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)`",
    "FSDP2, accumulation, clipping": "as above",
    "FSDP2, bf16-mixed": "autocast over float32 shards",
    "FSDP2, bf16-true": "gradients are averaged in float32",
    "tensor parallelism": "`ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)`",
    "2 to 1": "two processes stop in the middle, one goes on, with `RandomState`",
    "1 to 2": "one process stops in the middle, two go on",
    "FSDP2 to 1": "two processes stop in the middle and leave a sharded checkpoint, one goes on",
    "ddp_spawn": "processes that the Trainer starts; the weights are those that come back",
    "ddp_fork": "the same",
    "ddp_notebook": "the same",
}


def heads():
    """The first line of the table."""
    return f"| | {' | '.join(PARTS)} |"


def page(rows):
    """The whole page."""
    found = {(row["mode"], row["part"]): row["found"] for row in rows}
    names = ("lightning", "torch", "transformers", "diffusers")
    text = TEXT.format(
        steps=STEPS,
        date=time.strftime("%Y-%m-%d"),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        heads=heads(),
        rule="---|" * (1 + len(PARTS)),
    )
    sentences: list[str] = []
    for mode in MODES:
        text += f"| {mode} | {' | '.join(cell(found.get((mode, part)), sentences) for part in PARTS)} |\n"
    text += "\n## The modes\n\n" + "".join(f"- **{mode}**: {MEANINGS[mode]}.\n" for mode in MODES)
    return text + "\n## What is refused\n\n" + "".join(f"{n}. {told}\n" for n, told in enumerate(sentences, 1))


def cell(found, sentences):
    """A number, a refusal's number, or nothing."""
    if found is None:
        return ""
    if not isinstance(found, str):
        return f"1e{math.ceil(math.log10(found))}" if found else "="
    told = re.sub(r"^\w+ ", "The model ", found) if found.startswith(tuple(PARTS)) else found
    if told not in sentences:
        sentences.append(told)
    return f"no {sentences.index(told) + 1}"


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    PAGE.write_text(page([json.loads(line) for line in lines]), encoding="utf-8")
