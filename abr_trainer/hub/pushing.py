"""Push to the Hub during training, in the background and only from the main process. Errors do not end the run."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..models.unwrapping import without_adapter
from ..records.errors import one_line
from ..records.files import HISTORY_NAME, SUMMARY_NAME, read_json, step_of, write_whole
from ..records.provenance import versions_of_packages
from .card import names_given_to
from .local_names import remember_local_names
from .repository import (
    CARD,
    LAST_CHECKPOINT,
    STAGE_PREFIX,
    PushError,
    Target,
    base_on_the_hub,
    holds_model,
    open_repository,
    push,
    stage,
    warn_of_local_base,
    write_local_card,
)

logger = logging.get_logger(__name__)

PATIENCE = 20.0
"""Seconds between messages to ranks that wait for a push, so that they do not run into the group's timeout."""

SUMMARISED = (
    *("learning_rate", "lr_scheduler_type", "optim", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("world_size", "num_train_epochs", "max_steps", "max_passes", "max_seconds", "seed"),
)
"""Arguments to copy into the summary of a run."""


class Pushes:
    """Pushes in the background, one after the other. A push that has not begun is replaced by the next."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._last: tuple[Future[CommitInfo], Path] | None = None

    def begin(self, folder: Path, call: Callable[[], CommitInfo], makes_way: bool = True) -> Future[CommitInfo]:
        """Push a staged folder after the active push.

        Args:
            makes_way: Cancel a push that is still waiting.
        """
        if makes_way and self._last is not None and self._last[0].cancel():
            shutil.rmtree(self._last[1], ignore_errors=True)
        self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="push")
        future = self._worker.submit(self._push, call)
        self._last = (future, folder)
        return future

    def _push(self, call: Callable[[], CommitInfo]) -> CommitInfo:
        try:
            return call()
        except Exception as error:
            logger.warning(f"Not pushed: {one_line(error)}")
            raise

    def are_done(self, seconds: float) -> bool:
        """Wait for the last push, at most this many seconds, and tell whether it has ended."""
        if self._last is not None:
            wait_for([self._last[0]], seconds)
        return self._last is None or self._last[0].done()


_AnyTrainer: Any = object  # for type checkers: the mixin calls methods of the Trainer that it is combined with


class HubMixin(_AnyTrainer):
    """Push the model of a Trainer with repetition: `push_to_hub`, and every `hub_strategy`."""

    hub_model_id: Any
    _pushes: Pushes
    _told: Mapping[str, Any] = {}
    """What `push_to_hub` or `create_model_card` was told for the card."""

    @property
    def _pushes_itself(self) -> bool:
        """Whether our code pushes. Trainer creates the repository in its constructor, when `_is_active` is not set."""
        return bool(getattr(self, "_is_active", hasattr(self.args, "repeat_scheduler")))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, on the main process. If the Hub cannot be reached, only warn.

        Raises:
            ValueError: The Hub refuses, as it would after training.
        """
        if not self._pushes_itself:
            super().init_hf_repo(token, private)
            return
        if not self.is_world_process_zero():
            return
        run = Path(self.args.output_dir)
        for left in run.glob(f"{STAGE_PREFIX}*"):  # left by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        target = self._target(None, private, None)
        if target.base is None:
            warn_of_local_base(self._name_of_base())
        try:
            self.hub_model_id = open_repository(target, token or self.args.hub_token)
        except PushError as error:
            if not error.may_pass:
                raise ValueError(f"--push_to_hub to {target.repository}: {error}") from error
            logger.warning(f"The Hub cannot be reached. The first push will try again: {error}")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save the model, and push it with its card and the records of the run. The other ranks wait.

        Args:
            commit_message, blocking, token, revision, private: As in `Trainer.push_to_hub`.
            card: `language`, `license`, `tags`, `dataset_tags` and `finetuned_from` go into the card. Other arguments
                for `Trainer`'s card are ignored.

        Returns:
            The commit, or a future of it if not `blocking`; None on other ranks.

        Raises:
            PushError: The push failed. The model is saved, and `abr push` can push it later.
        """
        if not self._pushes_itself:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **card)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self._finish_current_push()
        begun: Future[CommitInfo] | None = None
        failed: PushError | None = None
        if self.is_world_process_zero():
            try:
                target = self._target(revision, private, card.get("finetuned_from"))
                self.write_summary(**card)
                begun = self._begin(target, commit_message or "End of training", token=token)
            except Exception as error:
                failed = PushError(one_line(error), may_pass=False)
        if blocking:
            self._finish_current_push()
        if failed is not None:
            raise failed
        return begun.result() if begun is not None and blocking else begun

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._pushes_itself:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        kept_as = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(strategy)
        try:
            self.write_summary()
            message = f"Training in progress, step {step_of(checkpoint)}"
            makes_way = strategy != HubStrategy.ALL_CHECKPOINTS
            self._begin(self._target(None, None, None), message, checkpoint, kept_as, makes_way)
        except Exception as error:  # a push must never end a run
            logger.warning(f"Not pushed: {one_line(error)}")

    def _begin(
        self,
        target: Target,
        message: str,
        checkpoint: Path | None = None,
        kept_as: str | None = None,
        makes_way: bool = True,
        token: str | None = None,
    ) -> Future[CommitInfo]:
        run = Path(self.args.output_dir)
        folder = stage(run, target, checkpoint, kept_as)
        used = token or self.args.hub_token
        return self._pushes.begin(folder, lambda: push(folder, run, target, message, kept_as, used), makes_way)

    def _finish_current_push(self) -> None:
        """Wait on all ranks for the pushes of the main process, which signals regularly that it is running."""
        if not self._pushes_itself:
            super()._finish_current_push()
            return
        done = [False]
        while not done[0]:
            if self.args.world_size == 1 or self.is_world_process_zero():
                done = [self._pushes.are_done(PATIENCE)]
            if self.args.world_size > 1:
                broadcast_object_list(done)

    def _target(self, revision: str | None, private: bool | None, finetuned_from: str | None) -> Target:
        """Return where to push, and store it for a later push."""
        args, run = self.args, Path(self.args.output_dir)
        target = Target(
            self.hub_model_id or args.hub_model_id or run.absolute().name,
            revision or args.hub_revision,
            args.hub_private_repo if private is None else private,
            base_on_the_hub(finetuned_from or self._name_of_base(), self._hub_base_model),
        )
        run.mkdir(parents=True, exist_ok=True)
        target.remember(run)
        return target

    @property
    def _hub_base_model(self) -> str | None:
        return getattr(self.args, "hub_base_model", None)

    def _name_of_base(self) -> str | None:
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        return getattr(config, "_name_or_path", None) or None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        run = Path(self.args.output_dir)
        is_of_run = output_dir is None or Path(output_dir).absolute() == run.absolute()
        if not (is_of_run and self._pushes_itself):
            super()._save(output_dir, state_dict)
            return
        before = (run / CARD).read_bytes() if (run / CARD).is_file() else None
        super()._save(output_dir, state_dict)
        self.write_card(before)

    def create_model_card(self, *args: Any, **card: Any) -> None:
        """Write our card, which says what the run has spent, where Trainer, or TRL at each checkpoint, writes its own.

        Args:
            args: As those of the trainer that is mixed in, in its order.
            card: As for `push_to_hub`.
        """
        if not self._pushes_itself:
            super().create_model_card(*args, **card)
            return
        self._told = {**self._told, **self._arguments_of_card(args), **card}
        if not self.is_in_train:  # TRL asks for a card with each checkpoint, beside which there is no model yet
            self.write_card()

    def _arguments_of_card(self, given: Sequence[Any]) -> dict[str, Any]:
        """Return positional arguments of `create_model_card` by the names that the trainer gives them."""
        if not given:
            return {}
        bound = inspect.signature(super().create_model_card).bind_partial(*given)
        return dict(bound.arguments)

    def write_card(self, before: bytes | None = None) -> None:
        """Write `README.md` of the output directory, if a model that this trainer has trained is there.

        Args:
            before: What stood there before the model was saved. Default: what stands there now.
        """
        run = Path(self.args.output_dir)
        if not (self.is_world_process_zero() and holds_model(run) and self.ledger.batches):
            return
        if before is None and (run / CARD).is_file():
            before = (run / CARD).read_bytes()
        try:
            self.write_summary()
            base = base_on_the_hub(self._told.get("finetuned_from") or self._name_of_base(), self._hub_base_model)
            name = self.hub_model_id if self.args.push_to_hub else None
            target = Target(name or run.as_posix(), base=base)
            write_local_card(run, target, None if before is None else before.decode())
        except Exception as error:  # the model is saved: a card must never end a run
            logger.warning(f"{run / CARD} is left as it was: {one_line(error)}")
            if before is not None:
                with contextlib.suppress(OSError):  # a full disk, of which the warning tells
                    write_whole(run / CARD, before)

    def write_summary(self, **card: Any) -> None:
        """Write `abr_summary.json`: the rule, its cost, its results, and entries for the card of a later push.

        Args:
            card: As in `push_to_hub`.
        """
        if not self.is_world_process_zero():
            return
        self._told = card = {**self._told, **card}
        run = Path(self.args.output_dir)
        remember_local_names(run, [self._name_of_base(), *names_given_to(run)])
        summary = {
            "repeat_scheduler": self._scheduler_description,
            "ledger": self.ledger.summary(),
            "perplexity": self._perplexities((read_json(run / HISTORY_NAME) or {}).get("metric", "eval_perplexity")),
            "arguments": {name: plain(self._given(name)) for name in SUMMARISED},
            "model": type(without_adapter(self.accelerator.unwrap_model(self.model))).__name__,
            "versions": dict(versions_of_packages()),
            "card": {
                "language": card.get("language"),
                "license": card.get("license"),
                "tags": as_list(card.get("tags")),
                "datasets": as_list(card.get("dataset_tags")),
            },
        }
        write_whole(run / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")

    def _given(self, name: str) -> Any:
        """Return an argument; of `max_steps` the value that was given, and not what follows from a budget."""
        value = getattr(self.args, name, None)
        return getattr(self.args, "most_batches", value) if name == "max_steps" else value

    def _perplexities(self, metric: str) -> dict[str, Any]:
        """Return the perplexity before training, the best, and that of the current weights; None if not measured."""
        measured = [
            (logs["step"], logs[metric], logs.get("eval_target_tokens"))
            for logs in self.state.log_history
            if isinstance(logs.get(metric), float) and math.isfinite(logs[metric])
        ]
        is_best_loaded = self.args.load_best_model_at_end and not self.is_in_train and self.state.best_global_step
        now = self.state.best_global_step if is_best_loaded else self.state.global_step
        return {
            "metric": metric,
            "before": next((value for step, value, _ in measured if step == 0), None),
            "best": min((value for _, value, _ in measured), default=None),
            "final": next((value for step, value, _ in measured[::-1] if step == now), None),
            "target_tokens": measured[-1][2] if measured else None,
        }


def plain(value: Any) -> Any:
    """Return the value of an enumeration member; any other value unchanged."""
    return getattr(value, "value", value)


def as_list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
