"""To the Hub and back: what of a run goes up, in one commit, tried again where that may help, never at its expense."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .config import ABRConfig
from .errors import one_line
from .model_card import MARKER, with_what_was_written, write_card
from .provenance import versions_and_machine
from .records import (
    CHECKPOINT_PREFIX,
    HISTORY_NAME,
    RESULTS,
    SUMMARY_NAME,
    TRACE_NAME,
    is_complete,
    read_json,
    step_of,
    write_whole,
)

logger = logging.get_logger(__name__)

Result = TypeVar("Result")

ADAPTER, ADAPTER_CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
LAST_CHECKPOINT = "last-checkpoint"

WEIGHTS = (
    *(ADAPTER, ADAPTER_CONFIG),
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
)
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*", "processor_config.json", "preprocessor_config.json"),
)
NOT_IN_A_CHECKPOINT = ("training_args.bin", CARD)
"""What stays here of a checkpoint: nothing needs the pickled arguments, and the card is another one."""


ATTEMPTS, FIRST_WAIT = 5, 1.0
"""How often a call is made, and seconds until the second; each wait is twice the one before."""

MAY_PASS = (408, 409, 412, 425, 429)
"""Refusals that the same call may not meet again; 412: somebody else has just made a commit."""

READABLE = (".json", ".jsonl", ".md", ".txt", ".jinja")

TROUBLE: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, RuntimeError, ValueError)
"""What a call to the Hub may raise: errors of its HTTP client, OSError, and those of what it checks itself."""


class PushError(RuntimeError):
    """What was to go to the Hub did not; it is all still here.

    Attributes:
        may_pass: Whether it may work later: the Hub, or the network, is to blame.
    """

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Target:
    """Where to push, and what the base model is called there.

    Attributes:
        repository: `name` or `namespace/name`.
        revision: A branch, which is made if there is none; None is main.
        private: Of a repository that has to be made; None is the default of the account.
        base: None if the base model is not on the Hub.
    """

    repository: str
    revision: str | None = None
    private: bool | None = None
    base: str | None = None


def base_on_the_hub(name: str | None, given: str | None) -> str | None:
    """Return the id of a base model on the Hub, or None, with a warning, for what only this machine has.

    Args:
        name: As the run was given it.
        given: `--hub_base_model`.
    """
    if given is not None:
        return given
    if name and not Path(name).exists() and _is_id(name):
        return name
    logger.warning(
        f"The base model {name} is not on the Hub, so nobody else can load the adapter on it by its name. "
        "--hub_base_model says what it is called there."
    )
    return None


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---- What goes up ----


def stage(run: Path, target: Target, checkpoint: Path | None = None, kept_as: str | None = None) -> Path:
    """Lay out what is to be pushed, in a new folder of the run, which no later save touches.

    Args:
        checkpoint: Whose weights to push. Default: those of the run itself.
        kept_as: Push the checkpoint as well, to be resumed from, under this name.

    Raises:
        ValueError: There is no model.
    """
    source = checkpoint or run
    if not any((source / name).exists() for name in (ADAPTER, "model.safetensors", "model.safetensors.index.json")):
        raise ValueError(f"{source} holds no trained model: no {ADAPTER}, no model.safetensors.")
    folder = Path(tempfile.mkdtemp(prefix="_push-", dir=run))
    try:
        keep = _link if checkpoint is not None else shutil.copy2  # a checkpoint is deleted, but never written again
        for path in _matching(source, (*WEIGHTS, *TOKENIZER)):
            (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            keep(path, folder / path.relative_to(source))
        for name in (RESULTS, SUMMARY_NAME, HISTORY_NAME):
            if (run / name).exists():
                shutil.copy2(run / name, folder / name)
        if (folder / ADAPTER_CONFIG).exists():
            _name_the_base(folder / ADAPTER_CONFIG, target.base)
            _leave_out_what_was_not_trained(folder)
        draw_run(run, folder / "plots")
        if checkpoint is not None and kept_as is not None:
            (folder / kept_as).mkdir()
            for path in (path for path in checkpoint.rglob("*") if path.is_file()):
                if path.name not in NOT_IN_A_CHECKPOINT:
                    (folder / kept_as / path.relative_to(checkpoint)).parent.mkdir(parents=True, exist_ok=True)
                    _link(path, folder / kept_as / path.relative_to(checkpoint))
            for name in (TRACE_NAME, HISTORY_NAME):
                if (run / name).exists():
                    shutil.copy2(run / name, folder / kept_as / name)
        _refuse_secrets(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def _matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, copy)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file anew: one that is linked must not be written into."""
    new = path.with_name(f"{path.name}.new")
    write(new)
    new.replace(path)


def _name_the_base(config: Path, base: str | None) -> None:
    content = {**json.loads(config.read_text(encoding="utf-8")), "base_model_name_or_path": base}
    _replace(config, lambda new: new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def _leave_out_what_was_not_trained(folder: Path) -> None:
    """Drop embedding tables that PEFT has saved with the adapter, unless they were trained; those, say how large."""
    config = read_json(folder / ADAPTER_CONFIG)
    trained = set(config.get("modules_to_save") or ())
    with safe_open(folder / ADAPTER, "pt") as file:
        tables = [
            name
            for name in file.keys()  # noqa: SIM118
            if re.search(
                r"\b(embed_tokens|lm_head|wte|embed_in|embed_out)(\.base_layer|\.original_module)?\.weight$", name
            )
        ]
        idle = {name for name in tables if not any(f".{module}." in f".{name}" for module in trained)}
        for name in set(tables) - idle:
            size = file.get_tensor(name).nbytes
            logger.warning(f"The adapter holds {name}, which was trained, whole: {size / 1e6:,.1f} MB.")
        if not idle:
            return
        kept = {name: file.get_tensor(name) for name in file.keys() if name not in idle}  # noqa: SIM118
        metadata = file.metadata()
    logger.warning(f"Not pushed, because it was not trained: {', '.join(sorted(idle))}.")
    _replace(folder / ADAPTER, lambda new: save_file(kept, new, metadata))


def draw_run(run: Path, folder: Path) -> None:
    """Draw what happened in a run, if it has kept a trace of it."""
    from .report.figure import Report, Section  # here: the trainer imports this module
    from .report.of_run import batches, evaluations, perplexity
    from .report.pictures import save_pictures

    trace = read_trace_of(run)
    if not trace:
        return
    curve = evaluations(run, trace, read_json(run / RESULTS) or {})
    blocks = (*(perplexity(curve, {}) if len(curve) > 1 else ()), *batches(trace)[:1])
    for path in save_pictures(Report("", (), (Section("", blocks),)), folder):
        if path.suffix != ".png":
            path.unlink()


def read_trace_of(run: Path) -> list[dict[str, Any]]:
    from .replay import read_trace

    return read_trace(run) if (run / TRACE_NAME).exists() else []


def _refuse_secrets(folder: Path) -> None:
    """Raise a ValueError if the token in use stands in anything that would be pushed."""
    token = get_token()
    if token is None:
        return
    for path in (path for suffix in READABLE for path in folder.rglob(f"*{suffix}")):
        if token in path.read_text(encoding="utf-8"):
            raise ValueError(f"{path.relative_to(folder)} holds your token of the Hub. It is not pushed.")


# ---- How it goes up ----


def patiently(call: Callable[[], Result]) -> Result:
    """Return what a call to the Hub does, made up to `ATTEMPTS` times.

    Raises:
        PushError: It failed in a way that another attempt does not change, or failed each time.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except TROUBLE as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"{f'{status}: ' if status else ''}{one_line(error)}"
            if isinstance(error, OfflineModeIsEnabled):
                raise PushError("HF_HUB_OFFLINE is set.", may_pass=False) from error
            if isinstance(error, LocalTokenNotFoundError) or status == 401:
                raise PushError(f"no valid token: set HF_TOKEN or run `hf auth login`. {reason}", False) from error
            is_of_ours = isinstance(error, ValueError) and status is None  # a card or a name that is refused here
            may_pass = not is_of_ours and (status is None or status >= 500 or status in MAY_PASS)
            if not may_pass or attempt == ATTEMPTS:
                raise PushError(reason, may_pass) from error
            logger.warning(f"The Hub does not take it now, next try in {wait:g} s: {reason}")
            time.sleep(wait)
            wait *= 2
    raise AssertionError("the last attempt returns or raises")


def open_repository(target: Target, token: str | None = None) -> str:
    """Make the repository and its branch unless they are there, and return its full id.

    Raises:
        PushError: The Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    url = patiently(lambda: api.create_repo(target.repository, private=target.private, exist_ok=True))
    branch = target.revision
    if branch is not None and branch != "main":
        patiently(lambda: api.create_branch(url.repo_id, branch=branch, exist_ok=True))
    return url.repo_id


def push(
    folder: Path, run: Path, target: Target, message: str, replaced: str | None = None, token: str | None = None
) -> CommitInfo:
    """Push what `stage` has laid out, in a single commit, and delete the folder.

    The card comes last: it keeps what was written above its marker, there or in the run.

    Args:
        replaced: Folder of the repository whose earlier files go.

    Raises:
        PushError: It did not work. The repository is as it was.
    """
    try:
        repository = open_repository(target, token)
        before = patiently(lambda: _card_of(repository, target.revision, token))
        here = run / CARD
        own = here.read_text(encoding="utf-8") if here.exists() else None
        card = write_card(run, folder, repository, target.base)
        card = with_what_was_written(card, before, own if own and MARKER in own else None)
        write_whole(folder / CARD, card)
        _refuse_secrets(folder)
        api = HfApi(token=token)
        done = patiently(
            lambda: api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                revision=target.revision,
                delete_patterns=f"{replaced}/*" if replaced else None,
            )
        )
        write_whole(here, card)
        return done
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _card_of(repository: str, revision: str | None, token: str | None) -> str | None:
    try:
        path = HfApi(token=token).hf_hub_download(repository, CARD, revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


class Pushes:
    """Pushes in the background, one after the other; one that has not begun makes way for the next.

    Attributes:
        failed: Why the last one did not work; None if it did.
    """

    def __init__(self) -> None:
        self.failed: str | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._last: tuple[Future[CommitInfo], Path] | None = None

    def begin(self, folder: Path, call: Callable[[], CommitInfo], makes_way: bool = True) -> Future[CommitInfo]:
        """Push a staged folder after what is under way.

        Args:
            makes_way: Whether the push that waits, if there is one, is given up for this one.
        """
        if makes_way and self._last is not None and self._last[0].cancel():
            shutil.rmtree(self._last[1], ignore_errors=True)
        self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="push")
        future = self._worker.submit(self._push, call)
        self._last = (future, folder)
        return future

    def _push(self, call: Callable[[], CommitInfo]) -> CommitInfo:
        try:
            done = call()
        except Exception as error:
            self.failed = one_line(error)
            logger.warning(f"Not pushed; training goes on: {self.failed}")
            raise
        self.failed = None
        return done

    def wait(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = self._last = None


# ---- Back ----


def fetch_checkpoint(name: str, output_dir: Path) -> str:
    """Download the last checkpoint of a repository, `ID` or `ID@REVISION`, and return where it lies now.

    It becomes `checkpoint-N` of the output directory, with the trace and the history of the run beside it.

    Raises:
        ValueError: There is none, or it cannot be loaded.
    """
    repository, _, revision = name.partition("@")
    flag = f"--resume_from_checkpoint {name}"
    if not _is_id(repository):
        raise ValueError(f"{flag} is neither a directory nor the id of a repository on the Hub.")
    try:
        found = HfApi().snapshot_download(repository, revision=revision or None, allow_patterns=f"{LAST_CHECKPOINT}/*")
    except TROUBLE as error:
        raise ValueError(f"{flag} is no directory, and cannot be loaded from the Hub: {one_line(error)}") from error
    source = Path(found, LAST_CHECKPOINT)
    if not is_complete(source):
        raise ValueError(f"{flag} has no complete {LAST_CHECKPOINT}: push it with --hub_strategy checkpoint.")
    step = read_json(source / "trainer_state.json")["global_step"]
    checkpoint = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    output_dir.mkdir(parents=True, exist_ok=True)
    if not is_complete(checkpoint):
        shutil.copytree(source, checkpoint, dirs_exist_ok=True)
    for record in (TRACE_NAME, HISTORY_NAME):
        if (checkpoint / record).exists() and not (output_dir / record).exists():
            shutil.copy2(checkpoint / record, output_dir / record)
    return str(checkpoint)


# ---- The trainer ----

_AnyTrainer: Any = object  # what a type checker sees: a mixin calls the Trainer that it is mixed into


class HubMixin(_AnyTrainer):
    """Push what a Trainer with repetition has trained: `push_to_hub`, and each `hub_strategy`.

    Attributes:
        push_failed: Why the last push of the run did not work; None if it did, or there was none.
    """

    hub_model_id: Any
    _pushes: Pushes | None = None
    _base: tuple[str | None, str | None] | None = None

    @property
    def push_failed(self) -> str | None:
        return None if self._pushes is None else self._pushes.failed

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, on the main process.

        Raises:
            ValueError: The Hub refuses, so that it would after training. If it only cannot be reached, that is said.
        """
        if not getattr(self, "_is_active", isinstance(self.args, ABRConfig)):  # Trainer calls it while it is made
            super().init_hf_repo(token, private)
            return
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        try:
            self.hub_model_id = open_repository(self._target(private=private), token)
        except PushError as error:
            if error.may_pass:
                logger.warning(
                    f"The Hub cannot be reached, and is tried again when there is something to push: {error}"
                )
                return
            raise ValueError(f"--push_to_hub to {self.hub_model_id}: {error}") from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model, and push it with its card and the records of the run; the other ranks wait.

        Args:
            commit_message: And the others, as those of `Trainer.push_to_hub`; of the further ones `language`,
                `license`, `tags`, `dataset`, `dataset_tags` and `finetuned_from` go into the card.

        Returns:
            The commit, or the future of it if not `blocking`; None on other ranks.

        Raises:
            PushError: It did not work. The model is saved, and `scripts/push_adapter.py` can push it later.
        """
        if not self._is_active:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self._pushes = self._pushes or Pushes()
        done = None
        try:
            if self.is_world_process_zero():
                self.hub_model_id = (
                    self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
                )
                run = Path(self.args.output_dir)
                target = self._target(revision, private, kwargs.get("finetuned_from"))
                self.write_summary(**kwargs)
                self._pushes.wait()
                folder = stage(run, target)
                message = commit_message or "End of training"
                begun = self._pushes.begin(folder, lambda: push(folder, run, target, message, token=token))
                done = begun.result() if blocking else begun
        finally:
            self.accelerator.wait_for_everyone()
        return done

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_active:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        self._pushes = self._pushes or Pushes()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint, run = Path(checkpoint_folder), Path(self.args.output_dir)
        names = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        target, kept_as = self._target(), names.get(strategy)
        message = f"Training in progress, step {step_of(checkpoint)}"
        try:
            self.write_summary()
            folder = stage(run, target, checkpoint, kept_as)
        except (OSError, ValueError) as error:
            self._pushes.failed = one_line(error)
            logger.warning(f"Not pushed; training goes on: {self._pushes.failed}")
            return
        self._pushes.begin(
            folder,
            lambda: push(folder, run, target, message, replaced=kept_as),
            makes_way=strategy != HubStrategy.ALL_CHECKPOINTS,
        )

    def _finish_current_push(self) -> None:
        if not self._is_active:
            super()._finish_current_push()
        elif self._pushes is not None:
            self._pushes.wait()

    def _target(
        self, revision: str | None = None, private: bool | None = None, finetuned_from: str | None = None
    ) -> Target:
        return Target(
            self.hub_model_id,
            revision or self.args.hub_revision,
            self.args.hub_private_repo if private is None else private,
            self._base_on_the_hub(finetuned_from),
        )

    def _base_on_the_hub(self, finetuned_from: str | None) -> str | None:
        name = finetuned_from or getattr(self.accelerator.unwrap_model(self.model).config, "_name_or_path", None)
        if self._base is None or self._base[0] != name:  # or it would be warned of at each push
            self._base = name, base_on_the_hub(name, getattr(self.args, "hub_base_model", None))
        return self._base[1]

    def write_summary(self, **card: Any) -> None:
        """Write `abr_summary.json`: what rule, what it cost and reached; and what a later push puts into its card.

        Args:
            card: As for `push_to_hub`.
        """
        if not self.is_world_process_zero():
            return
        run = Path(self.args.output_dir)
        logged = [logs for logs in self.state.log_history if "eval_perplexity" in logs]
        followed = (read_json(run / HISTORY_NAME) or {}).get("metric", "eval_perplexity")
        values = [(logs["step"], logs[followed]) for logs in logged if math.isfinite(logs.get(followed, math.nan))]
        tags = card.get("tags") or []
        datasets = card.get("dataset_tags") or []
        summary = {
            "repeat_scheduler": self._scheduler_description,
            "ledger": self.ledger.summary(),
            "perplexity": {
                "metric": followed,
                "before": next((value for step, value in values if step == 0), None),
                "best": min((value for _, value in values), default=None),
                "final": values[-1][1] if values else None,
                "target_tokens": logged[-1].get("eval_target_tokens") if logged else None,
            },
            "arguments": {
                name: str(value) if isinstance(value, str) else value
                for name in ("learning_rate", "lr_scheduler_type", "optim", "per_device_train_batch_size", "seed")
                if (value := getattr(self.args, name)) is not None
            },
            "versions": versions_and_machine(self.args.device, self.args.world_size)["versions"],
            "card": {
                "language": card.get("language"),
                "license": card.get("license"),
                "tags": [tags] if isinstance(tags, str) else list(tags),
                "datasets": [datasets] if isinstance(datasets, str) else list(datasets),
            },
        }
        write_whole(run / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
