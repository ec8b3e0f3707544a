"""A checkpoint when a machine is taken away: after SIGTERM, a run is saved at the end of the batch under way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback


class Preemption(JITCheckpointCallback):
    """Whether SIGTERM has arrived, on any rank.

    The callback of transformers saves as soon as it sees the signal: before the update of a batch or between its
    repeats, each rank on its own. This one only receives the signal. Each rank tells the others at each pass, so that
    all ranks save after the same batch.

    Args:
        manager: Receives the signal.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        manager.trainer = None  # else a reference cycle would keep the model in memory
        manager.kill_wait = 0  # seconds before it believes the signal; a checkpoint that is cut short does no harm
        self.jit_manager: CheckpointManager = manager
        self._is_registered = True
        self._is_agreed = False

    # ---- The ranks ----

    def measured(self) -> tuple[float, ...]:
        """Return what this rank tells the others at a pass: 1 if it has received the signal."""
        return (float(self.jit_manager.is_checkpoint_requested),)

    def agree(self, greatest: float) -> None:
        """Take the greatest of what `measured` returned on all ranks."""
        self._is_agreed = self._is_agreed or greatest > 0

    def is_due(self, trainer: Any, has_waited: bool) -> bool:
        """Tell at the end of a batch whether the run must be saved and ended; the same on all ranks.

        Args:
            has_waited: The batch has been evaluated or saved since its last pass, which may have taken long.
        """
        if trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps:
            return False
        (received,) = self.measured()
        if trainer.args.world_size == 1:
            self.agree(received)
        elif has_waited and not self._is_agreed:
            self.agree(*trainer._run.consensus.begin_sum(received)())
        return self._is_agreed

    # ---- The processes of this rank ----

    def spare_workers(self, loader: Any) -> Any:
        """Let the workers of a loader survive a SIGTERM to all processes of a job, and return the loader."""
        base = getattr(loader, "base_dataloader", loader)
        if getattr(base, "num_workers", 0):
            base.worker_init_fn = _Surviving(base.worker_init_fn)
        return loader

    # ---- Events ----

    def listen(self) -> None:
        """Receive the signal, as since the trainer was built, unless an earlier call of `train` has ended that."""
        if not self._is_registered:
            self.jit_manager.setup_signal_handler()  # type: ignore[no-untyped-call]
            self._is_registered = True

    def stop_listening(self) -> None:
        """Leave the signal to whoever had it before."""
        super().on_train_end(None, None, None)  # type: ignore[no-untyped-call]
        self._is_registered = self._is_agreed = self.jit_manager.is_checkpoint_requested = False

    def _leave_it_to_the_trainer(self, *args: Any, **kwargs: Any) -> None:
        """Do not save in the middle of a batch."""

    on_pre_optimizer_step = on_step_begin = on_step_end = on_epoch_end = on_train_end = _leave_it_to_the_trainer


@contextlib.contextmanager
def listening(preemption: Preemption | None) -> Iterator[None]:
    """Receive the signal in one call of `train`, however that ends."""
    if preemption is None:
        yield
        return
    preemption.listen()
    try:
        yield
    finally:
        preemption.stop_listening()


def replace_jit_checkpoint(handler: Any) -> Preemption | None:
    """Replace the callback that `--enable_jit_checkpoint` has added, and return the one that takes its place."""
    for index, callback in enumerate(handler.callbacks):
        if type(callback) is JITCheckpointCallback and callback.jit_manager is not None:
            handler.callbacks[index] = preemption = Preemption(callback.jit_manager)
            return preemption
    return None


class _Surviving:
    """Begin a worker of a loader as it would begin, except that its first SIGTERM does nothing."""

    def __init__(self, begin: Callable[[int], None] | None) -> None:
        self._begin = begin

    def __call__(self, worker: int) -> None:
        if self._begin is not None:
            self._begin(worker)
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
