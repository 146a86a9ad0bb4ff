"""What equal steps on real text give: UniLM and BERT2BERT from one encoder, and UniLM from nothing.

    python benchmarks/unilm_quality.py --task fairytaleqa --model unilm --steps 1600 --data PATH [--folder PATH]
    python benchmarks/unilm_quality.py --table RESULT.json ...

Models: ``unilm`` and ``bert2bert`` (HF ``EncoderDecoderModel``, the same checkpoint on both sides) start from MiniLM,
``*_random`` from random weights of the same config. MiniLM reads no Chinese: ``csl`` is for the random ones alone.
Everything else is one and the same: tokens, batches, AdamW with warm-up and linear decay, label smoothing, precision,
decoding. Validation loss is the cross-entropy per target token, the final [SEP] included, without smoothing; scores
compare each prediction with the one reference of its pair (the questions of a sentence are not grouped), both in the
tokenizer's case and spaces. In brackets stands the same figure beside texts of another pair, half the list away: the
loss of targets after a source that is not theirs, ROUGE-L of predictions with a reference that is not theirs.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from unilm_tasks import MINILM, Task, load_task, training_batches, validation_batches

from lightning_plugins.core.pretrained import pretrained_folder
from lightning_plugins.metrics.generation_scores import GenerationScores
from lightning_plugins.unilm.module import UniLMSeq2Seq

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOOTHING = 0.1
MAX_NEW_TOKENS = 40
Batch = dict[str, Tensor]
T = TypeVar("T")


class UniLM(UniLMSeq2Seq):
    """One stack under the sequence-to-sequence mask, trained by the module's own defaults but for the rate."""

    def __init__(self, config: dict[str, Any] | None, task: Task, lr: float) -> None:
        super().__init__(None if config else MINILM, config, label_smoothing=SMOOTHING, lr=lr)
        self.task = task

    def build_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The task's."""
        return self.task.tokenizer

    def target_logits(self, batch: Batch) -> Tensor:
        """The token before each target token predicts it."""
        return self(batch)


class Bert2Bert(LightningModule):
    """Two stacks joined by cross-attention, the decoder started with [CLS] and ended by [SEP]; trained as UniLM is."""

    def __init__(self, config: dict[str, Any] | None, task: Task, lr: float) -> None:
        super().__init__()
        from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

        if config is None:
            folder = pretrained_folder(MINILM)
            self.network = EncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder)
        else:
            both = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**config), BertConfig(**config))
            self.network = EncoderDecoderModel(both)
        self.lr, self.tokenizer = lr, task.tokenizer
        for settings in (self.network.config, self.network.generation_config):
            settings.decoder_start_token_id = self.tokenizer.cls_token_id
            settings.eos_token_id, settings.pad_token_id = self.tokenizer.sep_token_id, self.tokenizer.pad_token_id

    def target_logits(self, batch: Batch) -> Tensor:
        """The decoder reads ``[CLS] y_1 ... y_n`` and predicts ``y_1 ... y_n [SEP]``."""
        source = batch["segment_ids"] == 1
        width, height = int(source.sum(1).max()), len(source)
        real = batch["segment_ids"] == 2
        lengths = real.sum(1)
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        decoder = torch.full(inside.shape, self.tokenizer.pad_token_id)
        decoder[inside] = batch["input_ids"][real]
        decoder = torch.cat([torch.full((height, 1), self.tokenizer.cls_token_id), decoder[:, :-1]], 1)
        output = self.network(
            input_ids=batch["input_ids"][:, :width].masked_fill(~source[:, :width], self.tokenizer.pad_token_id),
            attention_mask=source[:, :width].long(),
            decoder_input_ids=decoder,
            decoder_attention_mask=inside.long(),
            use_cache=False,
        )
        return output.logits[inside]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the target tokens with label smoothing."""
        loss = F.cross_entropy(self.target_logits(batch).float(), targets(batch), label_smoothing=SMOOTHING)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, no decay of biases and norms; the rate rises over the warm-up and falls to zero at the last step."""
        from transformers import get_linear_schedule_with_warmup

        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        scheduler = get_linear_schedule_with_warmup(optimizer, self.trainer.max_steps // 10, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: float, **_: Any) -> None:
        """By hand: the trainer clips no fused optimiser."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


Model = UniLM | Bert2Bert


def targets(batch: Batch) -> Tensor:
    """``(N,)``: the target tokens, row by row."""
    return batch["input_ids"][batch["segment_ids"] == 2]


@torch.inference_mode()
def validation_loss(model: Model, batches: list[Batch]) -> float:
    """Cross-entropy per target token."""
    model.eval()
    total = sum(F.cross_entropy(model.target_logits(b).float(), targets(b), reduction="sum").item() for b in batches)
    return total / sum(len(targets(b)) for b in batches)


@torch.inference_mode()
def predictions(model: Model, task: Task, batches: list[Batch], beams: int) -> list[str]:
    """One text for each source."""
    model.eval()
    texts = []
    for batch in batches:
        source = batch["segment_ids"] == 1
        width = int(source.sum(1).max())
        ids = batch["input_ids"].masked_fill(~source, task.tokenizer.pad_token_id)[:, :width]
        kept = source[:, :width].long()
        rows = model.network.generate(
            input_ids=ids, attention_mask=kept, num_beams=beams, do_sample=False, max_new_tokens=MAX_NEW_TOKENS
        )
        rows = rows if isinstance(model, Bert2Bert) else rows[:, width:]
        texts += task.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def shifted(items: list[T]) -> list[T]:
    """The list turned by half its length: beside it, each item meets one of another text."""
    return items[len(items) // 2 :] + items[: len(items) // 2]


def scored(texts: list[str], references: list[str]) -> dict[str, float]:
    """All scores of predictions."""
    scores = GenerationScores()
    scores.update(texts, references)
    return {key: float(value) for key, value in scores.compute().items()}


def evaluate(model: Model, task: Task, num_generate: int | None = None) -> dict[str, Any]:
    """Losses on all validation pairs, and scores with every text on the first ``num_generate``, or all."""
    rows = [task.ids(pair) for pair in task.val]
    pad = task.tokenizer.pad_token_id
    batches = validation_batches(rows, 32, pad)
    strangers = [(source, target) for (source, _), (_, target) in zip(shifted(rows), rows, strict=True)]
    result: dict[str, Any] = {
        "val_loss": validation_loss(model, batches),
        "val_loss_unrelated": validation_loss(model, validation_batches(strangers, 32, pad)),
        "references": task.as_decoded([target for _, target in task.val[:num_generate]]),
    }
    batches = validation_batches(rows[:num_generate], 32, pad)
    for name, beams in (("greedy", 1), ("beam4", 4)):
        start = time.process_time()
        texts = predictions(model, task, batches, beams)
        seconds = time.process_time() - start
        far = shifted(result["references"])
        result[name] = scored(texts, result["references"]) | {
            "rougeL_unrelated": scored(texts, far)["rougeL"],
            "cpu_seconds": seconds,
            "texts": texts,
        }
    return result


def build(name: str, task: Task, lr: float) -> Model:
    """The network called ``name``."""
    random = name.endswith("_random")
    if task.name == "csl" and not random:
        sys.exit(f"--model {name}: MiniLM reads no Chinese, so --task csl takes unilm_random or bert2bert_random.")
    config = None
    if random:
        config = json.loads((Path(pretrained_folder(MINILM)) / "config.json").read_text())
        config |= {"vocab_size": len(task.tokenizer), "pad_token_id": task.tokenizer.pad_token_id}
    return {"unilm": UniLM, "bert2bert": Bert2Bert}[name.removesuffix("_random")](config, task, lr)


def train(args: argparse.Namespace, model: Model, task: Task) -> float:
    """Fit and keep the weights, or take those that an earlier call kept; return the CPU seconds of the steps."""
    kept = args.folder / "weights.pt"
    if not kept.exists():
        rows = [task.ids(pair) for pair in task.train]
        batches = training_batches(rows, args.batch_size, args.steps, args.seed, task.tokenizer.pad_token_id)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=args.steps,
            precision=args.precision,
            gradient_clip_val=1.0,
            logger=CSVLogger(args.folder, name="", version=""),
            log_every_n_steps=20,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.process_time()
        trainer.fit(model, DataLoader(batches, batch_size=None))
        torch.save({"weights": model.state_dict(), "cpu_seconds": time.process_time() - start}, kept)
    content = torch.load(kept, weights_only=True)
    model.load_state_dict(content["weights"])
    return content["cpu_seconds"]


def print_table(results: list[dict[str, Any]]) -> None:
    """One row for each result; scores in percent."""
    print("| task | model | parameters | lr | steps | CPU s | val loss (unrelated) ", end="")
    print("| greedy: ROUGE-L (unrelated) | BLEU | beam 4: ROUGE-L (unrelated) | BLEU |\n" + "|---" * 11 + "|")
    for r in results:
        losses = f"{r['val_loss']:.3f} ({r['val_loss_unrelated']:.3f})"
        scores = " | ".join(
            f"{100 * r[how]['rougeL']:.1f} ({100 * r[how]['rougeL_unrelated']:.1f}) | {100 * r[how]['bleu']:.1f}"
            for how in ("greedy", "beam4")
        )
        print(
            f"| {r['task']} | {r['model']} | {r['parameters']:,} | {r['lr']:g} | {r['steps']:,} "
            f"| {r['cpu_seconds']:.0f} | {losses} | {scores} |"
        )


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate one model, or print the table of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["fairytaleqa", "squad", "csl"], default="fairytaleqa")
    parser.add_argument("--model", choices=["unilm", "bert2bert", "unilm_random", "bert2bert_random"], default="unilm")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--precision", default="bf16-mixed", help="of training; evaluation is in float32")
    parser.add_argument("--num_generate", type=int, help="validation pairs to generate for; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="the folder that holds fairytaleqa/, squad/, csl/ and vocab/")
    parser.add_argument("--folder", type=Path, default=Path("unilm_quality"), help="weights, log and result.json")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these result.json and stop")
    args = parser.parse_args(argv)
    if args.table:
        return print_table([json.loads(path.read_text()) for path in args.table])
    if args.data is None or not args.data.is_dir():
        sys.exit(f"--data {args.data}: give the folder that holds fairytaleqa/, squad/, csl/ and vocab/.")
    args.folder = args.folder / f"{args.task}-{args.model}-{args.steps}-{args.lr:g}"
    args.folder.mkdir(parents=True, exist_ok=True)
    task = load_task(args.task, args.data)
    seed_everything(args.seed)
    model = build(args.model, task, args.lr)
    result = {key: getattr(args, key) for key in ("task", "model", "steps", "batch_size", "lr", "precision", "seed")}
    result["parameters"] = sum(p.numel() for p in model.network.parameters())
    result["cpu_seconds"] = train(args, model, task)
    result |= evaluate(model, task, args.num_generate)
    (args.folder / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    print_table([result])


if __name__ == "__main__":
    main()
