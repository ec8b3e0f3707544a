"""What TensorBoard gets of a run: curves as charts, and the totals at its end as a table."""

from __future__ import annotations

from typing import Any

from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

TOTALS = "totals"


class RunTensorBoardCallback(TensorBoardCallback):
    """That of transformers, without a chart of one point for each total.

    Trainer logs the totals of a run as `train_loss`, `train_passes`, ..., which would become `train/train_loss` beside
    `train/loss`. Here they are a table among the texts.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "train_runtime" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[no-untyped-call]
        elif state.is_world_process_zero:
            if self.tb_writer is None:
                self._init_summary_writer(args)  # type: ignore[no-untyped-call]
            if self.tb_writer is not None:
                rows = (f"| {name.removeprefix('train_')} | {value} |" for name, value in logs.items())
                table = "\n".join(("| what | total |", "| --- | ---: |", *rows))
                self.tb_writer.add_text(TOTALS, table, state.global_step)
                self.tb_writer.flush()


def replace_tensorboard(handler: CallbackHandler) -> None:
    """Make ours of that of transformers, unless it was given a writer of its own.

    It stays the same object: a program that has passed it can find it, and remove it.
    """
    for callback in handler.callbacks:
        if type(callback) is TensorBoardCallback and callback.tb_writer is None:
            callback.__class__ = RunTensorBoardCallback
