"""The Trainer with repetition.

How one batch goes through the files:

1. `trainer.py` overrides methods of Trainer. If anything asks for it, its loader lets micro-batches say which rows of
   the training set they hold (`identity.py`). Trainer's loop calls `get_batch_samples`, which starts a new batch, and
   then `training_step` for each micro-batch, which hands it to that batch.
2. `batch.py` holds the whole life of the batch, from its first pass to its outcome. Each micro-batch goes through one
   pass (`passes.py`), which calls Trainer's own `training_step`.
3. If there is a rule for rows, `dropping.py` asks it about each row of the micro-batch, between logits and loss:
   `row_seams.py` has the ways in, `row_losses.py` the loss of each row, and `rows.py` which rows all passes keep.
4. Between forward and backward of the last micro-batch, `consensus.py` averages the loss over micro-batches and ranks.
   `loss_scale.py` knows what the losses of this model mean, `targets.py` which labels count, and `signals.py` what
   else a rule may want to know.
5. `deciding.py` asks the rule, and cuts the answer to what is left of the budget (`budget.py`). `batch.py` repeats the
   batch and replays earlier ones (`held.py`), with an update and one more pass each time, or it skips the batch. Each
   pass is charged to the ledger (`ledger.py`), by what a forward costs (`forward_cost.py`).
6. Trainer makes the last update, unless the batch is skipped, and calls `_maybe_log_save_evaluate`. That finishes the
   batch: `run.py` counts it, the rules observe the outcome, `notices.py` says what was left out, and `callbacks.py`
   writes the trace and the dropped rows (`dropped_rows.py`).
7. Trainer logs, evaluates and saves. `run.py` adds to the log, `evaluation.py` adds the perplexity, `resume.py` writes
   into the checkpoint what a resumed run needs, and `saving.py` its checksums. If SIGTERM has arrived, `preemption.py`
   has the run saved and ended.

Before the first batch, `config.py` has the arguments and `plan.py` checks them. `support.py` refuses what cannot work,
`readiness.py` checks model and disk, `empty_rows.py` looks for rows without targets, without tokens or there twice,
`checkpoints.py` checks the checkpoint to resume from, and `primer.py` has the batches that come first. Beside the
batches, `ranking.py` keeps the last loss of every row, `tracking.py` follows the perplexity, `memory.py` measures
memory, and `engines.py` has what DeepSpeed and DDP need. If one rank fails, `failing.py` ends all of them.

What people see: `screen.py` shows a run of the commands, in the lines of `log_table.py`, and `summary.py` its end.
`notebook.py` has the table of a notebook. `samples.py` shows what the model writes, which `generation.py` makes it do,
and `text_scores.py` measures BLEU and ROUGE of it.
"""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "ABRCallback": "callbacks",
    "ABRConfig": "config",
    "ABRMixin": "trainer",
    "ABRTrainer": "trainer",
    "ComputeLedger": "ledger",
    "PerplexityCallback": "tracking",
    "SampleCallback": "samples",
    "TooManySkips": "trainer",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
