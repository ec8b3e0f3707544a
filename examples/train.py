"""Fine-tune from Python, with transformers alone and `ABRTrainer` in the place of `Trainer`.

    python examples/train.py                                                           # the embedded model and text
    python examples/train.py --model HuggingFaceTB/SmolLM2-135M --text notes.jsonl --passes 500 --output runs/notes

notes.jsonl has an object with the key "text" on each line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from abr_trainer import ABRConfig, ABRTrainer, PerplexityCallback
from abr_trainer.data.demo import DEMO_MODEL, demo_texts


def main(argv: Sequence[str] | None = None) -> ABRTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="id on the Hub, or directory")
    parser.add_argument("--text", help="a .jsonl file with a column text; default: the embedded text")
    parser.add_argument("--passes", type=int, default=100, help="the compute budget")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="2e-3 suits the embedded model, 2e-4 others")
    parser.add_argument("--output", default="runs/python", help="directory of the run")
    given = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(given.model)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM"))

    if given.text is None:
        rows = Dataset.from_dict({"text": demo_texts("train")})
    else:
        rows = load_dataset("json", data_files=given.text, split="train").select_columns("text")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")
    halves = rows.train_test_split(test_size=0.05, seed=0)

    trainer = ABRTrainer(
        model=model,
        args=ABRConfig(
            output_dir=given.output,
            skip_outliers="robust",  # skip batches whose loss stands out
            skip_rows="robust",  # and leave single rows out whose loss stands out
            max_passes=given.passes,
            learning_rate=given.learning_rate,
            eval_strategy="epoch",
            eval_on_start=True,
        ),
        train_dataset=halves["train"],
        eval_dataset=halves["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[PerplexityCallback()],  # says at each evaluation how perplexity has moved
    )
    trainer.train()
    trainer.save_model()
    print(trainer.ledger)  # what it cost
    return trainer


if __name__ == "__main__":
    main()
