"""To the Hub and back: what of a run goes up, in one commit, tried again where that may help."""

from __future__ import annotations

import filecmp
import itertools
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

from ..records.errors import one_line
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
"""What stays here of a checkpoint: nothing needs the pickled arguments, and the card is another one."""

ATTEMPTS, FIRST_WAIT = 5, 1.0
"""How often a call is made, and seconds until the second; each wait is twice the one before."""

MAY_PASS = (408, 409, 412, 425, 429)
"""Refusals that the same call may not meet again; 412: somebody else has just made a commit."""

BINARY = (".safetensors", ".png", ".pt", ".pth", ".bin")

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

    def remember(self, run: Path) -> None:
        """Write it down in the run, for a push later: paths may mean something else then."""
        write_whole(run / TARGET, json.dumps(asdict(self)) + "\n")


def remembered_target(run: Path) -> Target | None:
    """Return where a run was to be pushed; None if it has not been told."""
    found = read_json(run / TARGET)
    return None if found is None else Target(**found)


def base_on_the_hub(name: str | None, given: str | None, run: Path | None = None) -> str | None:
    """Return the id of a base model on the Hub; None for what only this machine has.

    Args:
        name: As the run was given it.
        given: `--hub_base_model`.
        run: That was given it earlier; None if it is given now.
    """
    return given if given is not None else name if name and is_on_the_hub(name, run) else None


def warn_of_a_base_that_is_here_only(name: str | None) -> None:
    logger.warning(
        f"The base model {name or '(it has no name)'} is not on the Hub, so nobody else can load the adapter on it by "
        "its name. --hub_base_model says what it is called there."
    )


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
    weights = (ADAPTER, ADAPTER_CONFIG) if (source / ADAPTER).exists() else WHOLE_MODEL
    if not holds_model(source):
        raise ValueError(f"{source} holds no trained model: no {ADAPTER}, no model.safetensors.")
    folder = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=run))
    try:
        keep = _link if checkpoint is not None else shutil.copy2  # a checkpoint is deleted, but never written again
        for path in _matching(source, (*weights, *TOKENIZER)):
            (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            keep(path, folder / path.relative_to(source))
        results = () if checkpoint is not None else (RESULTS,)  # they are of finished runs
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
    except OSError:  # another file system, or one without links
        shutil.copy2(source, copy)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file anew: one that is linked must not be written into."""
    new = path.with_name(f"{path.name}.new")
    write(new)
    new.replace(path)


def _forget_best_path(state: Path) -> None:
    """Leave out where the best checkpoint lies on this machine: a resumed run looks for it beside its checkpoint."""
    told = {**(read_json(state) or {}), "best_model_checkpoint": None}
    _replace(state, lambda new: new.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8"))


def _name_labels(run: Path, folder: Path) -> None:
    """Write the names of the labels of a classifier beside what else is known of its task."""
    labels = (read_json(run / "config.json") or {}).get("id2label")
    task = read_json(folder / TASK_NAME)
    if labels is not None and isinstance(task, dict):
        content = json.dumps({**task, "id2label": labels}, indent=1, ensure_ascii=False) + "\n"
        _replace(folder / TASK_NAME, lambda new: new.write_text(content, encoding="utf-8"))


def _make_portable(folder: Path, base: str | None, run: Path) -> None:
    """Let an adapter name its base as the Hub does, and drop embedding tables that the base has already.

    PEFT saves the table of embeddings with an adapter that changes it, and one that has grown. The latter stays, as do
    those that were trained; of both it is said how large they are.
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
            why, size = "was trained" if is_trained else "has grown", file.get_tensor(name).nbytes
            logger.warning(f"The adapter holds {name}, which {why}, whole: {size / 1e6:,.1f} MB.")
        if not idle:
            return
        kept = {name: file.get_tensor(name) for name in names if name not in idle}
        metadata = file.metadata()
    logger.warning(f"Not pushed, because it was not trained: {', '.join(sorted(idle))}.")
    _replace(folder / ADAPTER, lambda new: save_file(kept, new, metadata))


def _rows_of_base(name: str | None, run: Path) -> int | None:
    """Return the number of embeddings of a base model; None if it cannot be known here."""
    try:
        found = PreTrainedConfig.get_config_dict(local_path(name, run) or name)[0] if name else {}
    except (OSError, ValueError):
        return None
    return found.get("vocab_size") or found.get("text_config", {}).get("vocab_size")


def _grown_rows(folder: Path) -> int | None:
    """Return how many embeddings the base must have for an adapter whose table has grown."""
    config = read_json(folder / ADAPTER_CONFIG)
    if config is None or not (folder / ADAPTER).exists():
        return None
    with safe_open(folder / ADAPTER, "pt") as file:
        grown = [name for name in filter(TABLE.search, file.keys()) if not _is_trained(name, config)]
        return int(file.get_slice(grown[0]).get_shape()[0]) if grown else None


def _is_trained(name: str, config: dict[str, Any]) -> bool:
    """Tell whether a tensor of an adapter is of a module that was trained whole."""
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ())


def draw_run(run: Path, folder: Path) -> None:
    """Draw what happened in a run, if it has kept a trace of it."""
    # Here, because it is slow to import what draws, and the trainer imports this module.
    from ..report.figure import Report, Section
    from ..report.of_run import batches, evaluations, perplexity
    from ..report.pictures import save_pictures
    from ..report.why import read_trace

    trace = read_trace(run) if (run / TRACE_NAME).exists() else []
    if not trace:
        return
    try:
        curve = evaluations(run, trace, read_json(run / RESULTS) or {})
        blocks = (*(perplexity(curve) if len(curve) > 1 else ()), *batches(trace)[:1])
        pictures = save_pictures(Report("", (), (Section("", blocks),)), folder)
    except Exception as error:  # whatever is odd about a trace: what was trained goes up without pictures
        logger.warning(f"The run is pushed without pictures: {one_line(error)}")
        return
    for path in pictures:
        if path.suffix != ".png":
            path.unlink()


def _refuse_secrets(folder: Path, token: str | None) -> None:
    """Raise a ValueError if a token stands in anything that would be pushed, tensors and pictures apart."""
    tokens = [each.encode() for each in (token, get_token()) if each]
    for path in (path for path in folder.rglob("*") if path.is_file() and path.suffix not in BINARY):
        content = path.read_bytes()
        if any(each in content for each in tokens):
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
    patiently(lambda: api.auth_check(url.repo_id, write=True))  # one that exists is "made" by whoever may see it
    branch = target.revision
    if branch is not None and branch != "main":
        patiently(lambda: api.create_branch(url.repo_id, branch=branch, exist_ok=True))
    return url.repo_id


def push(
    folder: Path, run: Path, target: Target, message: str, replaced: str | None = None, token: str | None = None
) -> CommitInfo:
    """Push what `stage` has laid out, in a single commit, and delete the folder.

    The card comes last: it keeps what people have written, there or in the run. Of what is in the repository only
    what an earlier push has put there is deleted.

    Args:
        replaced: Folder of the repository whose earlier files go.

    Raises:
        PushError: It did not work. The repository is as it was.
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
    """Say so where files that no push has put there are replaced, and where other weights stay beside those pushed."""
    whose = "no push of a run has put there"
    if replaced := sorted(others.intersection(files)):
        logger.warning_once(
            f"{repository} holds {', '.join(replaced)}, which {whose}: replaced, and kept in its history."
        )
    if weights := sorted(name for name in others.difference(files) if WEIGHTS.fullmatch(name)):
        logger.warning_once(
            f"{repository} also holds {', '.join(weights)}, which {whose}, so that it stays. Whoever loads the "
            "repository may get that: delete what is not wanted."
        )


def _keep_what_is_lost(here: Path, own: str | None, before: str | None, card: str) -> None:
    """Keep the card in the run where not all of it is in what was pushed, and say what is not in it."""
    if before is not None and (problem := read_card(before).problem):
        logger.warning(f"The metadata of the card on the Hub, now in its history, were no valid YAML: {problem}.")
    if own is None:
        return
    mine, new, why = read_card(own), read_card(card), None
    if mine.problem:
        why = f"The metadata of {here} are no valid YAML and were not pushed: {mine.problem}"
    elif mine.above not in (None, new.above):
        why = "The card on the Hub has another text above its marker"
    elif lost := lost_entries(mine, new):
        why = f"What was pushed says something else of {', '.join(lost)}"
    if why is not None:
        write_whole(here.with_name(OWN_CARD), own)
        logger.warning(f"{why}; {here} is kept as {OWN_CARD}.")


def _text_of(path: Path, name: str) -> str:
    """Return what is in a card.

    Args:
        name: What it is called in messages.

    Raises:
        ValueError: It is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} cannot be read: {one_line(error)}. Save it as UTF-8.") from error


def _card_of(repository: str, revision: str | None, token: str | None) -> str | None:
    """Return the card that is there now, None if there is none. What could not be asked is an error, and no copy."""
    api = HfApi(token=token)
    if not api.file_exists(repository, CARD, revision=revision):
        return None
    try:
        path = api.hf_hub_download(repository, CARD, revision=revision, force_download=True)
    except ValueError as error:
        raise OSError(one_line(error)) from error
    return _text_of(Path(path), f"The card of {repository} on the Hub")


# ---- Back ----


def _holds(folder: Path, source: Path) -> bool:
    """Tell whether a folder holds all files of another, byte for byte."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    return all(
        (folder / file).is_file() and filecmp.cmp(folder / file, source / file, shallow=False) for file in files
    )


def _unused(path: Path) -> Path:
    """Return this path, or the first with a number after it that is not in use."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def fetch_checkpoint(name: str, output_dir: Path) -> str:
    """Download the last checkpoint of a repository, `ID` or `ID@REVISION`, and return where it lies now.

    It becomes `checkpoint-N` of the output directory, with the trace and the history of the run beside it.

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
        raise ValueError(f"{flag} is no directory, and cannot be loaded from the Hub: {one_line(error)}") from error
    source = Path(found, LAST_CHECKPOINT)
    if not is_complete(source):
        raise ValueError(f"{flag} has no complete {LAST_CHECKPOINT}: push it with --hub_strategy checkpoint.")
    step = read_json(source / "trainer_state.json")["global_step"]
    checkpoint = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    output_dir.mkdir(parents=True, exist_ok=True)
    if not _holds(checkpoint, source):
        unfinished = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=output_dir))
        shutil.copytree(source, unfinished, dirs_exist_ok=True)
        if checkpoint.exists():
            aside = _unused(checkpoint.with_name(f"abandoned-{checkpoint.name}"))
            logger.warning(f"{checkpoint} is not that of {name}: it is renamed to {aside.name}.")
            checkpoint.rename(aside)
        unfinished.rename(checkpoint)
    for record in (TRACE_NAME, HISTORY_NAME):
        if (checkpoint / record).exists() and not (output_dir / record).exists():
            shutil.copy2(checkpoint / record, output_dir / record)
    return str(checkpoint)
