"""Language models with random weights, as users fine-tune them."""

import torch
from torch.nn import functional as F

from wild.zoo import Networked

VOCABULARY, TOKENS, ROWS = 20, 6, 2
EAGER = {"attn_implementation": "eager"}
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, **EAGER}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
BERT = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, **EAGER}
BERT |= {"num_attention_heads": 2, "max_position_embeddings": 12}


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


class Language(Networked):
    """A network of transformers that computes its own loss from the batch."""

    islands = large = True

    @classmethod
    def batch(cls):
        ids = tokens(ROWS, TOKENS)
        return {"input_ids": ids, "labels": ids.clone()}

    def training_step(self, batch, batch_idx):
        loss = self.net(**batch).loss
        self.log("train/loss", loss)
        return loss


class GPT2(Language, family="language", title="GPT-2"):
    """The embedding is the last layer; dropout in five places."""

    def network(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, **EAGER))


class FusedGPT2(GPT2, family="language", title="GPT-2 with fused attention"):
    """A kernel that has no second derivative."""

    twice = "flash_attention.* has no second derivative"

    def network(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, attn_implementation="sdpa"))


class T5(Language, family="language", title="T5"):
    """ReLU between its layers, relative positions shared by them, encoder and decoder."""

    seen = "kinks"

    def network(self):
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="relu"))


class BertClassifier(Language, family="language", title="BERT classifier"):
    """Rows of several lengths, by a mask."""

    islands = False

    def network(self):
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(BertConfig(**BERT))

    @classmethod
    def batch(cls):
        mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 2]])).long()
        return {"input_ids": tokens(ROWS, TOKENS), "attention_mask": mask, "labels": torch.randint(2, (ROWS,))}


class Roberta(Language, family="language", title="RoBERTa, masked"):
    """Tied weights and a tied bias; loss on the masked positions only."""

    islands = False

    def network(self):
        from transformers import RobertaConfig, RobertaForMaskedLM

        return RobertaForMaskedLM(RobertaConfig(**BERT, pad_token_id=0))

    @classmethod
    def batch(cls):
        ids = tokens(ROWS, TOKENS)
        return {"input_ids": ids, "labels": torch.where(torch.arange(TOKENS) % 2 == 0, ids, -100)}


class Llama(Language, family="language", title="Llama"):
    """Normalises in fp32 whatever the precision; heads share their keys."""

    def network(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**LLAMA))


class LlamaAdapters(Llama, family="language", title="Llama with LoRA"):
    """All is frozen but for low-rank adapters, of which half begin at zero."""

    lr = 1.0

    def network(self):
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        net = get_peft_model(super().network(), adapters)
        return net.to(torch.get_default_dtype())  # peft makes its own in fp32


class CheckpointedAdapters(LlamaAdapters, family="language", title="Llama with LoRA, checkpoints"):
    """Layers computed once more in the backward pass, without reentering autograd."""

    reenters = False

    def network(self):
        net = super().network()
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable({"use_reentrant": self.reenters})
        return net


class ReentrantAdapters(CheckpointedAdapters, family="language", title="Llama with LoRA, reentrant checkpoints"):
    """autograd.grad does not see what a reentrant checkpoint hides, nor says so."""

    twice, reenters = "checkpoint", True


class Mixtral(Language, family="language", title="Mixtral"):
    """Experts that a batch does not choose have no gradient, or one of zeros."""

    seen = "steps"

    def network(self):
        from transformers import MixtralConfig, MixtralForCausalLM

        return MixtralForCausalLM(
            MixtralConfig(
                **LLAMA | {"num_hidden_layers": 1},
                num_local_experts=4,
                num_experts_per_tok=1,
                experts_implementation="eager",
            )
        )


class Mamba(Language, family="language", title="Mamba"):
    """A scan over time in plain torch, with parameters kept in fp32."""

    def network(self):
        from transformers import MambaConfig, MambaForCausalLM

        sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1}
        return MambaForCausalLM(MambaConfig(**sizes, use_cache=False))


class Distilled(Language, family="language", title="distilled GPT-2"):
    """The teacher is no part of the module: it is kept in a list, and has a dropout that must not draw."""

    def network(self):
        student, teacher = GPT2.network(self), GPT2.network(self)
        self.teachers = [teacher.eval().requires_grad_(False)]
        return student

    def training_step(self, batch, batch_idx):
        output = self.net(**batch)
        with torch.no_grad():
            told = self.teachers[0](batch["input_ids"]).logits.softmax(-1)
        return output.loss + F.cross_entropy(output.logits.transpose(1, 2), told.transpose(1, 2))
