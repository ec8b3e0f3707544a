"""The reference says what is there: all flags, all public names, all files of a run, and tests that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import abr_trainer
from abr_trainer import integrations, schedulers
from abr_trainer.cli import describe
from abr_trainer.cli.help_page import reference_page
from abr_trainer.cli.main import main
from abr_trainer.cli.quick import FLAGS_FILE
from abr_trainer.cli.run_directory import RUN_FILES
from tests.conftest import RUN

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
FILES = (REFERENCE / "files.md").read_text(encoding="utf-8")
KNOWN = json.loads(FLAGS_FILE.read_text(encoding="utf-8"))


def test_the_page_of_flags_is_that_of_the_flags():
    assert describe.PAGE == REFERENCE / "flags.md"
    assert describe.PAGE.read_text(encoding="utf-8") == reference_page(KNOWN), "python -m abr_trainer.cli.describe"


def words(text):
    """Return a text without the marks of Markdown."""
    return " ".join(re.sub(r"[\\`]", "", text).split())


@pytest.mark.parametrize("verb", KNOWN["verbs"])
def test_each_flag_of_a_verb_is_on_the_page_with_its_help(verb):
    page = describe.PAGE.read_text(encoding="utf-8")
    common, *sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    named = {section.partition("\n")[0]: section for section in (common, *sections)}
    described = KNOWN["verbs"][verb]
    own = named[f"abr {verb}"] + (common if described["takes_trainer"] else "")
    for flag in {flag["dest"]: flag for flag in reversed(described["flags"])}.values():
        name = flag["names"][0] if flag["names"] else flag["dest"].upper()
        assert re.search(rf"^`{name}\b", own, flags=re.MULTILINE), name
        assert words(flag.get("help", "")) in words(own), name


def test_every_public_name_has_an_entry():
    api = (REFERENCE / "api.md").read_text(encoding="utf-8")
    entries = set(re.findall(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)", api, flags=re.MULTILINE))
    names = {f"abr_trainer.{name}" for name in abr_trainer.__all__ if name != "__version__"}
    names |= {f"abr_trainer.integrations.{name}" for name in integrations.__all__}
    of_schedulers = {name for name in schedulers.__all__ if f"abr_trainer.{name}" not in names}
    names |= {f"abr_trainer.schedulers.{name}" for name in of_schedulers}
    assert names <= entries
    assert "abr_trainer.__version__" in api


def test_every_entry_exists():
    api = (REFERENCE / "api.md").read_text(encoding="utf-8")
    for path in re.findall(r"^\.\. (?:auto(?:class|function|exception|data)|py:data):: ([\w.]+)", api, flags=re.M):
        module, _, name = path.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the directories of real runs: of a language model with all that writes files, and of a classifier."""
    root = tmp_path_factory.mktemp("runs")
    spent = ["--max_passes", "6", "--save_steps", "3", "--learning_rate", "1e-3", "--report_to", "tensorboard"]
    rules = ["--repeat_scheduler", "replay", "--skip_rows", "robust", "--rank_rows"]
    main(["train", *RUN, *spent, *rules, "--do_predict", "--output_dir", str(root / "text")])
    main(["report", str(root / "text")])
    flags = ["--model_name_or_path", "demo", "--task_name", "demo", "--max_steps", "2", "--max_train_samples", "16"]
    flags += ["--max_eval_samples", "8", "--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]
    flags += ["--load_in_8bit", "--do_train", "--do_eval", "--do_predict"]
    main(["classify", *flags, "--output_dir", str(root / "sentences")])
    return root


def names_in_code(text):
    """Return what stands as code in a page, a word each."""
    return {word.strip("/,") for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}


@pytest.mark.parametrize("run", ["text", "sentences"])
def test_every_file_that_a_run_leaves_is_described(runs, run):
    described = names_in_code(FILES)
    left = {re.sub(r"\d+", "N", path.name) for path in (runs / run).iterdir()}
    left |= {path.name for path in (runs / run).glob("checkpoint-*/*")}
    left = {re.sub(r"^(_abr_held_)\d+", r"\1RANK", name) for name in left}
    assert left - described == set()


def test_every_kind_of_file_that_is_known_to_be_of_a_run_is_described():
    page = " ".join(names_in_code(FILES))
    for pattern in RUN_FILES:
        begins = pattern.partition("*")[0] or pattern.strip("*")
        if pattern != "additional_chat_templates":
            assert begins in page, pattern


SCHEMAS = {
    "run.json": "run.json",
    "all_results.json": "all_results.json",
    "abr_summary.json": "abr_summary.json",
    "abr_trace.jsonl": "abr_trace.jsonl",
    "_dropped_rows.jsonl": "_dropped_rows.jsonl",
    "_row_trace.jsonl": "_row_trace.jsonl",
    "_ranked_rows.jsonl": "_row_losses.npz and _ranked_rows.jsonl",
    "perplexity_history.json": "perplexity_history.json",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_of_a_file_is_described(runs, name):
    lines = (runs / "text" / name).read_text(encoding="utf-8")
    found = [json.loads(line) for line in lines.splitlines()] if name.endswith("l") else [json.loads(lines)]
    section = re.search(rf"^### {re.escape(SCHEMAS[name])}$(.*?)^##+ (?!#)", FILES, flags=re.M | re.S)[1]
    if name == "_ranked_rows.jsonl":
        section = re.search(r"^### _dropped_rows.jsonl$(.*?)^### ", FILES, flags=re.M | re.S)[1]
    described = names_in_code(section)
    by_pattern = tuple(word.strip("*") for word in described if "*" in word)
    for key in {key for line in found for key in line}:
        assert key in described or key.endswith(by_pattern or ("\0",)), key


def test_every_file_of_the_tree_exists():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"## What is where\n\n(.*?)\n\n", contributing, flags=re.DOTALL)[1].splitlines()
    names = [("abr_trainer/" if line.startswith("      ") else "") + line.split()[0] for line in tree]
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_test_that_the_support_matrix_names_exists():
    support = (REFERENCE / "support.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", support))
    assert len(named) > 50
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_only_the_support_matrix_names_tests():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path != REFERENCE / "support.md"]
    named = {path: re.findall(r"\b(test_\w+)", path.read_text(encoding="utf-8")) for path in pages}
    assert {(path.name, name) for path, names in named.items() for name in names if f"def {name}(" in tests} == set()
