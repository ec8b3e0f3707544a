"""Push the files of a run to the Hub in one commit, with retries, and fetch checkpoints from there."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..records.errors import Failure, one_line
from ..records.files import (
    CHECKPOINT_PREFIX,
    HISTORY_NAME,
    RESULTS,
    SUMMARY_NAME,
    TASK_NAME,
    TRACE_NAME,
    TRAINER_STATE,
    is_complete,
    read_json,
    unused,
    write_whole,
)
from .card import write_card
from .card_merging import lost_entries, merged_card, read_card
from .local_names import is_id, is_on_the_hub, local_path

logger = logging.get_logger(__name__)

Result = TypeVar("Result")

ADAPTER, ADAPTER_CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
OWN_CARD = "_README-before-push.md"
LAST_CHECKPOINT = "last-checkpoint"

WHOLE_MODEL = ("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json")
WEIGHTS = re.compile(r"(adapter_model|model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")

STAGE_PREFIX = "_push-"
TARGET = "_push.json"

TABLE = re.compile(r"\b(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)(\.base_layer)?\.weight$")
"""Names of embedding tables, at the input and the output, in the file of an adapter."""

TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*", "processor_config.json", "preprocessor_config.json"),
)
NOT_IN_A_CHECKPOINT = ("training_args.bin", CARD)
"""Files of a checkpoint that are not pushed: the pickled arguments, which are not needed, and its card."""

ATTEMPTS, FIRST_WAIT = 5, 1.0
"""Most attempts per call, and seconds before the second attempt; each wait is twice the one before."""

MAY_PASS = (408, 409, 412, 425, 429)
"""Status codes after which another attempt may succeed; 412: another commit was made at the same time."""

BINARY = (".safetensors", ".png", ".pt", ".pth", ".bin")

TROUBLE: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, RuntimeError, ValueError)
"""Errors that a call to the Hub may raise: those of its HTTP client, OSError, and those of its own checks."""


class PushError(Failure):
    """A push to the Hub failed. All files are still here.

    Attributes:
        may_pass: Whether another attempt may succeed, because the cause is the Hub or the network.
    """

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Target:
    """Where to push, and the id of the base model on the Hub.

    Attributes:
        repository: `name` or `namespace/name`.
        revision: A branch, which is created if necessary; None for main.
        private: Whether to create the repository as private; None for the default of the account.
        base: Id of the base model; None if it is not on the Hub.
    """

    repository: str
    revision: str | None = None
    private: bool | None = None
    base: str | None = None

    def remember(self, run: Path) -> None:
        """Store it in the run for a later push, when relative paths may have another meaning."""
        write_whole(run / TARGET, json.dumps(asdict(self)) + "\n")


def remembered_target(run: Path) -> Target | None:
    """Return the stored target of a run; None if there is none."""
    found = read_json(run / TARGET)
    return None if found is None else Target(**found)


def base_on_the_hub(name: str | None, given: str | None, run: Path | None = None) -> str | None:
    """Return the id of a base model on the Hub; None if it is only on this machine.

    Args:
        name: The name that the run was given.
        given: `--hub_base_model`.
        run: The run that was given the name; None if the name is given now.
    """
    return given if given is not None else name if name and is_on_the_hub(name, run) else None


def warn_of_local_base(name: str | None) -> None:
    logger.warning(
        f"The base model {name or '(without a name)'} is not on the Hub, so others cannot load it by its name. If it "
        "is there under another name, give that as --hub_base_model."
    )


# ---- Files to push ----


def stage(run: Path, target: Target, checkpoint: Path | None = None, kept_as: str | None = None) -> Path:
    """Copy the files to push into a new folder of the run, which later saves do not change.

    Args:
        checkpoint: The checkpoint whose weights to push. Default: the weights of the run itself.
        kept_as: Also push the checkpoint under this name, so that others can resume from it.

    Raises:
        ValueError: There is no model.
    """
    source = checkpoint or run
    weights = (ADAPTER, ADAPTER_CONFIG) if (source / ADAPTER).exists() else WHOLE_MODEL
    if not holds_model(source):
        raise ValueError(f"{source} has no trained model: neither {ADAPTER} nor model.safetensors exists.")
    folder = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=run))
    try:
        keep = _link if checkpoint is not None else shutil.copy2  # a checkpoint may be deleted, but never changes
        for path in _matching(source, (*weights, *TOKENIZER)):
            (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            keep(path, folder / path.relative_to(source))
        results = () if checkpoint is not None else (RESULTS,)  # only finished runs have results
        for name in (*results, SUMMARY_NAME, HISTORY_NAME, TASK_NAME):
            if (run / name).exists():
                shutil.copy2(run / name, folder / name)
        _name_labels(run, folder)
        _make_portable(folder, target.base, run)
        if checkpoint is not None and kept_as is not None:
            (folder / kept_as).mkdir()
            for path in (path for path in checkpoint.rglob("*") if path.is_file()):
                if path.name not in NOT_IN_A_CHECKPOINT:
                    (folder / kept_as / path.relative_to(checkpoint)).parent.mkdir(parents=True, exist_ok=True)
                    _link(path, folder / kept_as / path.relative_to(checkpoint))
            _forget_best_path(folder / kept_as / TRAINER_STATE)
            for name in (TRACE_NAME, HISTORY_NAME):
                if (run / name).exists():
                    shutil.copy2(run / name, folder / kept_as / name)
            _make_portable(folder / kept_as, target.base, run)
        draw_run(run, folder / "plots")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def _matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # another file system, or one that does not support links
        shutil.copy2(source, copy)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file by a new one, because writing into a hard link would change the original."""
    new = path.with_name(f"{path.name}.new")
    write(new)
    new.replace(path)


def _forget_best_path(state: Path) -> None:
    """Remove the local path of the best checkpoint. A resumed run looks for it next to its own checkpoint."""
    told = {**(read_json(state) or {}), "best_model_checkpoint": None}
    _replace(state, lambda new: new.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8"))


def _name_labels(run: Path, folder: Path) -> None:
    """Add the names of a classifier's labels to its task file."""
    labels = (read_json(run / "config.json") or {}).get("id2label")
    task = read_json(folder / TASK_NAME)
    if labels is not None and isinstance(task, dict):
        content = json.dumps({**task, "id2label": labels}, indent=1, ensure_ascii=False) + "\n"
        _replace(folder / TASK_NAME, lambda new: new.write_text(content, encoding="utf-8"))


def _make_portable(folder: Path, base: str | None, run: Path) -> None:
    """Record the Hub's id of the base model in an adapter, and remove embedding tables equal to the base model's.

    PEFT saves an embedding table with an adapter if it may have changed. Tables that were trained or resized stay,
    with a warning about their size.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        return
    config = read_json(folder / ADAPTER_CONFIG)
    content = json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n"
    _replace(folder / ADAPTER_CONFIG, lambda new: new.write_text(content, encoding="utf-8"))
    with safe_open(folder / ADAPTER, "pt") as file:
        names = list(file.keys())
        tables = list(filter(TABLE.search, names))
        rows = _rows_of_base(config.get("base_model_name_or_path"), run) if tables else None
        idle = set()
        for name in tables:
            is_trained = _is_trained(name, config)
            if not is_trained and file.get_slice(name).get_shape()[0] == rows:
                idle.add(name)
                continue
            why, size = "was trained" if is_trained else "was resized", file.get_tensor(name).nbytes
            logger.warning(f"The adapter contains all of {name}, which {why}: {size / 1e6:,.1f} MB.")
        if not idle:
            return
        kept = {name: file.get_tensor(name) for name in names if name not in idle}
        metadata = file.metadata()
    logger.warning(f"Not pushed, because it was not trained: {', '.join(sorted(idle))}.")
    _replace(folder / ADAPTER, lambda new: save_file(kept, new, metadata))


def _rows_of_base(name: str | None, run: Path) -> int | None:
    """Return the number of embeddings of a base model; None if it is not known."""
    try:
        found = PreTrainedConfig.get_config_dict(local_path(name, run) or name)[0] if name else {}
    except (OSError, ValueError):
        return None
    return found.get("vocab_size") or found.get("text_config", {}).get("vocab_size")


def _grown_rows(folder: Path) -> int | None:
    """Return the number of embeddings that an adapter with a resized table needs; None if it has no such table."""
    config = read_json(folder / ADAPTER_CONFIG)
    if config is None or not (folder / ADAPTER).exists():
        return None
    with safe_open(folder / ADAPTER, "pt") as file:
        grown = [name for name in filter(TABLE.search, file.keys()) if not _is_trained(name, config)]
        return int(file.get_slice(grown[0]).get_shape()[0]) if grown else None


def _is_trained(name: str, config: dict[str, Any]) -> bool:
    """Tell whether a tensor of an adapter belongs to a fully trained module."""
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ())


def draw_run(run: Path, folder: Path) -> None:
    """Draw the plots of a run, if it has a trace."""
    # Imported here, because plotting modules are slow to import and the trainer imports this module.
    from ..report.figure import Report, Section
    from ..report.of_run import batches, evaluations, perplexity, results_of
    from ..report.pictures import save_pictures
    from ..report.why import read_trace

    trace = read_trace(run) if (run / TRACE_NAME).exists() else []
    if not trace:
        return
    try:
        curve = evaluations(run, trace, results_of(run))
        blocks = (*(perplexity(curve) if len(curve) > 1 else ()), *batches(trace)[:1])
        pictures = save_pictures(Report("", (), (Section("", blocks),)), folder)
    except Exception as error:  # a problem with the trace must not prevent the push
        logger.warning(f"The run is pushed without plots: {one_line(error)}")
        return
    for path in pictures:
        if path.suffix != ".png":
            path.unlink()


def _refuse_secrets(folder: Path, token: str | None) -> None:
    """Raise a ValueError if a file to push contains a token of the Hub. Tensors and pictures are not checked."""
    tokens = [each.encode() for each in (token, get_token()) if each]
    for path in (path for path in folder.rglob("*") if path.is_file() and path.suffix not in BINARY):
        content = path.read_bytes()
        if any(each in content for each in tokens):
            raise ValueError(f"{path.relative_to(folder)} contains your Hub token, so nothing is pushed. Remove it.")


# ---- Pushing ----


def patiently(call: Callable[[], Result]) -> Result:
    """Return the result of a call to the Hub, after up to `ATTEMPTS` attempts.

    Raises:
        PushError: All attempts failed, or one failed with an error that another attempt would not change.
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
            is_of_ours = isinstance(error, ValueError) and status is None  # a card or a name refused on this machine
            may_pass = not is_of_ours and (status is None or status >= 500 or status in MAY_PASS)
            if not may_pass or attempt == ATTEMPTS:
                raise PushError(reason, may_pass) from error
            logger.warning(f"A call to the Hub failed. Next attempt in {wait:g} s: {reason}")
            time.sleep(wait)
            wait *= 2
    raise AssertionError("the last attempt returns or raises")


def open_repository(target: Target, token: str | None = None) -> str:
    """Create the repository and its branch unless they exist, and return its full id.

    Raises:
        PushError: The Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    url = patiently(lambda: api.create_repo(target.repository, private=target.private, exist_ok=True))
    patiently(lambda: api.auth_check(url.repo_id, write=True))  # `exist_ok` does not check write access
    branch = target.revision
    if branch is not None and branch != "main":
        patiently(lambda: api.create_branch(url.repo_id, branch=branch, exist_ok=True))
    return url.repo_id


def push(
    folder: Path, run: Path, target: Target, message: str, replaced: str | None = None, token: str | None = None
) -> CommitInfo:
    """Push the folder that `stage` has made in a single commit, and delete it.

    The card keeps the user's additions, on the Hub or in the run. Only files of an earlier push are deleted from the
    repository.

    Args:
        replaced: Folder of the repository whose earlier files are deleted.

    Raises:
        PushError: The push failed. The repository is unchanged.
    """
    try:
        repository = open_repository(target, token)
        here = run / CARD
        own = _text_of(here, str(here)) if here.exists() else None
        before = patiently(lambda: _card_of(repository, target.revision, token))
        card = write_card(run, folder, repository, target.revision, target.base, _grown_rows(folder))
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        files = sorted(path for path in paths if replaced is None or not path.startswith(f"{replaced}/"))
        card = merged_card(card, before, own, files)
        write_whole(folder / CARD, card)
        there = patiently(lambda: HfApi(token=token).list_repo_files(repository, revision=target.revision))
        pushed = [] if before is None else read_card(before).files
        _warn_of_files_of_others(repository, {*there} - {*pushed}, files)
        _refuse_secrets(folder, token)
        done: CommitInfo = patiently(
            lambda: HfApi(token=token).upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                revision=target.revision,
                delete_patterns=[*({*pushed} - {*files}), *([f"{replaced}/*"] if replaced else [])],
            )
        )
        _keep_what_is_lost(here, own, before, card)
        write_whole(here, card)
        return done
    except PushError:
        raise
    except Exception as error:
        raise PushError(one_line(error), may_pass=False) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def holds_model(folder: Path) -> bool:
    """Tell whether a folder holds trained weights."""
    return any((folder / name).exists() for name in (ADAPTER, "model.safetensors", "model.safetensors.index.json"))


def write_local_card(run: Path, target: Target, own: str | None) -> None:
    """Write the card of a run into its directory. A push writes it anew, with where it was pushed to.

    Args:
        target: Its repository is what the model is loaded by.
        own: The card that stood there before the model was saved: PEFT writes into it. What people wrote stays.

    Raises:
        ValueError: The metadata of their card cannot be read.
    """
    if own is not None and (problem := read_card(own).problem):
        raise ValueError(f"its metadata are no valid YAML: {problem}")
    card = write_card(run, run, target.repository, target.revision, target.base, _grown_rows(run))
    write_whole(run / CARD, merged_card(card, None, own, []))


def _warn_of_files_of_others(repository: str, others: set[str], files: Sequence[str]) -> None:
    """Warn if files that we did not push are replaced, or if such weights stay next to the pushed ones."""
    if replaced := sorted(others.intersection(files)):
        logger.warning_once(
            f"{repository} already had {', '.join(replaced)}, not from a push of a run. Replaced; the old version is "
            "in the repository's history."
        )
    if weights := sorted(name for name in others.difference(files) if WEIGHTS.fullmatch(name)):
        logger.warning_once(
            f"{repository} also has {', '.join(weights)}, not from a push of a run, which is kept. Loading the "
            "repository may use it instead of the pushed weights. Delete it if it is not wanted."
        )


def _keep_what_is_lost(here: Path, own: str | None, before: str | None, card: str) -> None:
    """If the pushed card does not contain all of the run's card, keep a copy of the latter and warn."""
    if before is not None and (problem := read_card(before).problem):
        logger.warning(
            f"The metadata of the card on the Hub were not valid YAML and are replaced: {problem}. The old card is in "
            "the repository's history."
        )
    if own is None:
        return
    mine, new, why = read_card(own), read_card(card), None
    if mine.problem:
        why = f"The metadata of {here} are not valid YAML and were not pushed: {mine.problem}"
    elif mine.above not in (None, new.above):
        why = "The card on the Hub has another text above its marker"
    elif lost := lost_entries(mine, new):
        why = f"The pushed card has other values for {', '.join(lost)}"
    if why is not None:
        write_whole(here.with_name(OWN_CARD), own)
        logger.warning(f"{why}. {here} is kept as {OWN_CARD}.")


def _text_of(path: Path, name: str) -> str:
    """Return the text of a card.

    Args:
        name: Its name for messages.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} cannot be read: {one_line(error)}. Save it as UTF-8.") from error


def _card_of(repository: str, revision: str | None, token: str | None) -> str | None:
    """Return the current card on the Hub, None if there is none. A failed request is an error; no cache is used."""
    api = HfApi(token=token)
    if not api.file_exists(repository, CARD, revision=revision):
        return None
    try:
        path = api.hf_hub_download(repository, CARD, revision=revision, force_download=True)
    except ValueError as error:
        raise OSError(one_line(error)) from error
    return _text_of(Path(path), f"The card of {repository} on the Hub")


# ---- Fetching ----


def _holds(folder: Path, source: Path) -> bool:
    """Tell whether a folder contains all files of another, byte for byte."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    return all(
        (folder / file).is_file() and filecmp.cmp(folder / file, source / file, shallow=False) for file in files
    )


def fetch_checkpoint(name: str, output_dir: Path) -> str:
    """Download the last checkpoint of a repository, `ID` or `ID@REVISION`, and return its path.

    It becomes `checkpoint-N` in the output directory. The trace and the history of the run are copied there, too.

    Raises:
        ValueError: There is none, or it cannot be loaded.
    """
    repository, _, revision = name.partition("@")
    flag = f"--resume_from_checkpoint {name}"
    if not is_id(repository):
        raise ValueError(f"{flag} is neither a directory nor the id of a repository on the Hub.")
    try:
        found = HfApi().snapshot_download(repository, revision=revision or None, allow_patterns=f"{LAST_CHECKPOINT}/*")
    except TROUBLE as error:
        raise ValueError(f"{flag} is not a directory and cannot be loaded from the Hub: {one_line(error)}") from error
    source = Path(found, LAST_CHECKPOINT)
    if not is_complete(source):
        raise ValueError(f"{flag} has no complete {LAST_CHECKPOINT}. Push it with --hub_strategy checkpoint.")
    step = read_json(source / "trainer_state.json")["global_step"]
    checkpoint = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    output_dir.mkdir(parents=True, exist_ok=True)
    if not _holds(checkpoint, source):
        unfinished = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=output_dir))
        shutil.copytree(source, unfinished, dirs_exist_ok=True)
        if checkpoint.exists():
            aside = unused(checkpoint.with_name(f"abandoned-{checkpoint.name}"))
            logger.warning(f"{checkpoint} differs from that of {name} and is renamed to {aside.name}.")
            checkpoint.rename(aside)
        unfinished.rename(checkpoint)
    for record in (TRACE_NAME, HISTORY_NAME):
        if (checkpoint / record).exists() and not (output_dir / record).exists():
            shutil.copy2(checkpoint / record, output_dir / record)
    return str(checkpoint)
