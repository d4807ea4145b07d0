"""Tiny random models, tokenizer and rows, built in memory: no download, no file, the same values on every run."""

from inspect import signature

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 128
# what a model's forward and its outputs call the cache: transformers 5.24 renamed it
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_llama(dtype: torch.dtype = torch.float32, **config_overrides) -> LlamaForCausalLM:
    """Llama with 2 layers of hidden size 32, 4 query and 2 key heads; the global random state is left alone."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config_overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over ``w0`` .. ``w120`` with pad, bos, eos, unk, three role tokens and a chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = special + [f"w{i}" for i in range(VOCAB_SIZE - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def tiny_dataset(n: int = 16) -> Dataset:
    """``n`` prompt/completion rows; each completion counts on from its prompt, so there is something to learn."""
    rows = [
        {
            "prompt": " ".join(f"w{(i * 7 + k) % 60}" for k in range(3 + i % 4)),
            "completion": " " + " ".join(f"w{60 + (i * 7 + k) % 60}" for k in range(4 + i % 3)),
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)
