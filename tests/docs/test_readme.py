"""What the README says is true: its commands, its example, its links; and it stays short."""

from __future__ import annotations

import configparser
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from abr_trainer import ABRTrainer
from abr_trainer.cli.command_line import parse_arguments
from abr_trainer.cli.main import VERBS
from run_clm_abr import ARGUMENTS
from tests.conftest import tiny_llama, token_rows

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPOSITORY = "https://github.com/abr-trainer/abr-trainer"
PAGE, PICTURE = f"{REPOSITORY}/blob/main/", "https://raw.githubusercontent.com/abr-trainer/abr-trainer/main/"
MARKDOWN = MarkdownIt("commonmark").enable("table")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of the README in one language."""
    return [token.content for token in MARKDOWN.parse(README) if token.type == "fence" and token.info == language]


def paragraphs() -> Iterator[str]:
    """Yield headings, paragraphs, items and cells of the README as plain text, a piece of code as one word."""
    for token in MARKDOWN.parse(README):
        if token.type == "inline":
            shown = {"code_inline": "code", "softbreak": " "}
            yield "".join(shown.get(child.type, child.content) for child in token.children if child.type != "image")


def attributes(kind: str, name: str) -> list[str]:
    """Return an attribute of all links or all pictures of the README."""
    children = [child for token in MARKDOWN.parse(README) for child in token.children or ()]
    return [child.attrs[name] for child in children if child.type == kind]


# ---- It can be read ----


def test_it_is_at_most_150_lines_of_120_characters():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_no_sentence_is_too_long_to_be_read_once():
    sentences = [sentence for text in paragraphs() for sentence in re.split(r"(?<=[.!?:])\s+", text)]
    assert len(sentences) > 60
    assert [sentence for sentence in sentences if len(sentence.split()) > 25] == []


def test_it_names_no_tests():
    assert not re.search(r"\btest_\w", README)


def test_it_begins_with_a_picture_before_the_first_heading_of_a_section():
    begin = README[: README.index("\n## ")]
    assert "![" in begin
    assert len([line for line in begin.splitlines() if line.startswith("**")]) == 1, "one sentence"


# ---- It renders on an index page ----


def test_every_link_is_absolute_and_those_to_the_repository_lead_to_a_file():
    links = attributes("link_open", "href")
    assert len(links) > 12
    assert [link for link in links if not link.startswith("https://")] == []
    ours = [link for link in links if "abr-trainer" in link]
    assert [link for link in ours if not link.startswith(PAGE)] == []
    assert [link for link in ours if not (ROOT / link.removeprefix(PAGE)).is_file()] == []


def test_every_picture_is_a_small_file_with_a_text_that_stands_in_for_it():
    pictures = attributes("image", "src")
    assert len(pictures) == 2
    assert [picture for picture in pictures if not picture.startswith(PICTURE)] == []
    files = [ROOT / picture.removeprefix(PICTURE) for picture in pictures]
    assert [file.name for file in files if not 1000 < file.stat().st_size < 150_000] == []
    children = [child for token in MARKDOWN.parse(README) for child in token.children or ()]
    assert all(len(child.content) > 15 for child in children if child.type == "image")


def test_the_package_names_the_same_address():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    metadata = settings["metadata"]
    assert metadata["url"] == REPOSITORY
    named = dict(line.split(" = ") for line in metadata["project_urls"].strip().splitlines())
    assert {"Documentation", "Changelog"} <= named.keys()
    assert [url for url in named.values() if not url.startswith(REPOSITORY)] == []
    files = [url.removeprefix(PAGE) for url in named.values() if url.startswith(PAGE)]
    assert [file for file in files if not (ROOT / file).is_file()] == []


# ---- What it shows works ----


def test_the_example_has_15_lines_and_trains(tmp_path, monkeypatch):
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda _: tiny_llama())
    names = {"train_dataset": token_rows(16)}
    exec(example.replace("max_passes=2000", "max_passes=3"), names)
    assert isinstance(names["trainer"], ABRTrainer)
    assert names["trainer"].ledger.passes == 3
    assert names["trainer"].ledger.rows > 0, "the rule for rows has judged"
    assert names["trainer"].ledger.repeats == 1, "the first example repeats nothing"


def test_the_file_of_flags_has_12_lines_and_is_read(tmp_path):
    (flags,) = blocks("yaml")
    assert len(flags.splitlines()) == 12
    (tmp_path / "run.yaml").write_text(flags)
    (tmp_path / "notes.txt").write_text("A fox.\n")
    own = str(tmp_path / "notes.txt")
    model, data, *_, args = parse_arguments(
        ARGUMENTS, [str(tmp_path / "run.yaml"), "--train_file", own, "--max_passes", "500", "--use_cpu"]
    )
    assert model.model_name_or_path == yaml.safe_load(flags)["model_name_or_path"]
    assert (data.train_file, args.max_passes, args.learning_rate) == (own, 500, 2e-4)
    assert args.repeat_scheduler == "baseline"
    assert args.skip_rows == "robust"


def test_its_first_command_repeats_nothing_and_its_own_output_follows():
    quickstart = README[README.index("## Install") : README.index("## Your own data")]
    assert "--repeat_scheduler" not in quickstart
    output = quickstart[quickstart.index("<!-- quickstart output -->") :]
    assert output.splitlines()[1] == "```text"


def test_the_verdict_is_that_of_the_comparison_it_links_to():
    verdict = re.search(r"^> (.+)$", README, flags=re.MULTILINE)[1]
    report = (ROOT / "docs" / "compare" / "stories260k-wikitext2" / "report.md").read_text(encoding="utf-8")
    assert verdict in " ".join(report.split())


# ---- Commands, here and in the other documents ----


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9-]*", text))


def code_in(markdown: str) -> Iterator[str]:
    """Yield the lines of blocks of code, continued ones as one, and pieces of code within text."""
    for token in MARKDOWN.parse(markdown):
        if token.type in ("fence", "code_block"):
            yield from token.content.replace("\\\n", " ").splitlines()
        yield from (child.content for child in token.children or () if child.type == "code_inline")


COMMAND = rf"(do )?(\w+=\S+ )*(abr ({'|'.join(VERBS)})\b|python (?!-m )|torchrun |accelerate )"


def commands() -> list[tuple[str, list[str]]]:
    """Return what is said to run of this repository: a verb of `abr` or a script, and the words after it."""
    found = []
    for command in (part for line in CODE for part in re.split(r"; |&& ", line.strip())):
        if re.match(COMMAND, command):
            words = shlex.split(command, comments=True)
            program = "abr_trainer" if "abr_trainer" in words else "abr"
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            start = words.index(program) + 1 if program in words else scripts[0] if scripts else len(words)
            found += [(target, words[start:]) for target in words[start : start + 1]]
    return found


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
DOCUMENTS += sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "report.md")  # reports are records
TEXTS = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
DOCSTRINGS = [importlib.import_module(verb.module).__doc__ for verb in VERBS.values()]
HEADERS = [
    "\n".join(
        line.lstrip("# ") and f"    {line.lstrip('# ')}" for line in path.read_text().split("\n\n")[0].splitlines()
    )
    for path in sorted((ROOT / "examples").glob("*.yaml"))
]
SHOWN = [
    *TEXTS,
    *DOCSTRINGS,
    *(f"\n{header}" for header in HEADERS),
    *(f"    {verb.example}" for verb in VERBS.values()),
]
CODE = [line for text in SHOWN for line in code_in(text)]
COMMANDS = commands()


@functools.cache
def flags_of(target: str) -> set[str]:
    """Return the flags in the usage of a verb or a script, which is the first paragraph of its help."""
    shown = io.StringIO()
    if target in VERBS:
        main = importlib.import_module(VERBS[target].module).main
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend((ROOT / target).parent)  # a script finds what is beside it
            main = runpy.run_path(str(ROOT / target))["main"]
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main(["--help"])
    return flags_in(shown.getvalue().partition("\n\n")[0])


@pytest.mark.parametrize(("target", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_every_flag_of_a_command_is_one_that_it_takes(target, words):
    own, _, passed_on = " ".join(words).partition(" -- ")
    assert flags_in(own) - {"--config"} <= flags_of(target)
    behind = {"compare-prompts": "classify"}.get(target, "sft" if "--command sft" in own else "train")
    assert flags_in(passed_on) <= flags_of(behind)


def test_the_commands_of_the_readme_are_among_them():
    shown = [line for language in ("bash", "yaml") for block in blocks(language) for line in block.splitlines()]
    verbs = {words[0] for line in shown if (words := line.split()[1:]) and line.startswith("abr ")}
    assert verbs == {"train", "sft", "compare", "report", "why", "rows"}
    assert verbs <= {target for target, _ in COMMANDS}


def test_every_verb_is_shown_and_exists():
    assert {target for target, _ in COMMANDS if not target.endswith(".py")} == VERBS.keys()
    said = {found[1] for line in CODE if (found := re.match(r"abr ([a-z-]+)(?= |$)", line))}
    assert said - {"beside"} == VERBS.keys(), "a rule is called abr, too: abr beside its control"


def test_no_document_names_a_script_that_is_gone():
    named = set(re.findall(r"(?<![\w/])(?:scripts|benchmarks|configs|tests|examples)/[\w/]+\.\w+", "\n".join(SHOWN)))
    gone = {f"scripts/{name}.py" for name in ("compare_schedulers", "compare_prompts", "run_glue_abr")}  # as is said
    assert {name for name in named - gone if not (ROOT / name).exists()} == set()


def test_every_flag_that_the_readme_names_is_one_of_a_command():
    of_others = {"--nproc_per_node", "--logdir"}
    assert flags_in(README) <= set().union(*map(flags_of, VERBS)) | of_others
