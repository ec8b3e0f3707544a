"""Make the tiny pretrained LLaMA that `--dataset_name demo` fine-tunes, from nothing but this repository.

    python benchmarks/build_demo_model.py --output_dir /tmp/demo_model

A byte-level BPE tokenizer is trained on tales and reports alike, the model on tales and a few plain reports: enough to
have met the words, so that fine-tuning on reports of all difficulties is a change of domain, not of language.
Everything is seeded: the same versions on the same number of threads give the same weights, other ones a model of the
same quality. Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from abr_trainer.data.demo import passages

SEED = 0
CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 1,024 tokens: any text can be encoded, broken passages too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=CONTEXT)


def build_model(vocab_size: int) -> LlamaForCausalLM:
    set_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=1500, help="Updates of 32 blocks of 128 tokens.")
    args = parser.parse_args(argv)

    tales = list(passages("tale", 11_000, seed=SEED))
    tokenizer = build_tokenizer(tales[:3000] + list(passages("report", 3000, seed=SEED)))
    texts = tales + list(passages("report", 600, seed=SEED, difficulty=0.2))
    random.Random(SEED).shuffle(texts)
    ids = [token for text in tokenizer(texts)["input_ids"] for token in [*text, tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128).tolist()
    model = build_model(len(tokenizer))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output_dir),
            max_steps=args.max_steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            logging_steps=100,
            save_strategy="no",
            seed=SEED,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
    )
    result = trainer.train()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    return result.metrics


if __name__ == "__main__":
    main()
