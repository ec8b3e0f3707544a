"""Training runs for tests that need processes of their own: `python -m tests.jobs NAME ARGUMENTS`."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.modeling import ModelArguments, load_config, load_model, load_tokenizer
from abr_trainer.schedulers import RobustOutlierSkip, ThresholdScheduler
from tests.conftest import QUIET, VOCABULARY, tiny_llama, token_rows, weights


class KillAfter(TrainerCallback):
    """End the process without a word, as a power cut would, when the batch after `step` begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(output_dir: str, kill_after: str = "0", resume: bool = False) -> ABRTrainer:
    """Fine-tune the demo model with LoRA dropout under a budget: repeats, skips, a checkpoint between two logs."""
    arguments = ModelArguments(lora_r=2)
    torch.manual_seed(0)
    model = load_model(arguments, load_config(arguments), load_tokenizer(arguments))
    rows = token_rows(60, length=24)
    rows[33] = {"input_ids": rows[33]["input_ids"], "labels": torch.full((24,), -100)}
    trainer = ABRTrainer(
        model=model,
        args=ABRConfig(
            output_dir=output_dir,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_passes=150,
            loss_threshold=3.0,
            outlier_sigmas=1.0,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            logging_steps=4,
            save_steps=15,
            eval_strategy="steps",
            eval_steps=10,
            eval_on_start=True,
            **QUIET,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[KillAfter(int(kill_after))] if int(kill_after) else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def poison(module, args, output):
    """Break the forward of any micro-batch that begins with the last token of the vocabulary."""
    return torch.full_like(output, math.nan) if args[0][0, 0] == VOCABULARY - 1 else output


def ranks(output_dir: str, accumulation: str = "1") -> ABRTrainer:
    """Train on 16 micro-batches, one of them broken: on two ranks, or in two micro-batches of one process."""
    rows = token_rows(32)
    for row in rows:
        row["input_ids"][0] = row["input_ids"][0].clamp(max=VOCABULARY - 2)
    rows[10]["input_ids"][0] = VOCABULARY - 1  # row 10 opens micro-batch 5, the second of its pair
    model = tiny_llama()
    model.model.embed_tokens.register_forward_hook(poison)
    trainer = ABRTrainer(
        model=model,
        args=ABRConfig(
            output_dir=output_dir,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=int(accumulation),
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=2,
            save_strategy="no",
            train_sampling_strategy="sequential",
            **QUIET,
        ),
        train_dataset=rows,
        eval_dataset=token_rows(5, seed=3),  # does not divide by two ranks: one row is given out twice
        repeat_scheduler=RobustOutlierSkip(ThresholdScheduler(loss_threshold=1.3, max_repeats=3), sigmas=2.0),
    )
    trainer.train()
    metrics = trainer.evaluate()
    rank = trainer.args.process_index
    torch.save(weights(trainer.model), Path(output_dir, f"weights-{rank}.pt"))
    numbers = {
        "ledger": {key: value for key, value in trainer.ledger.state_dict().items() if key != "seconds"},
        "scheduler": trainer.repeat_scheduler.state_dict(),
        "loss": [logs["loss"] for logs in trainer.state.log_history if "loss" in logs],
        "perplexity": metrics["eval_perplexity"],
        "target_tokens": metrics["eval_target_tokens"],
    }
    Path(output_dir, f"rank-{rank}.json").write_text(json.dumps(numbers))
    return trainer


if __name__ == "__main__":
    {"resumable": resumable, "ranks": ranks}[sys.argv[1]](*sys.argv[2:])
