"""What the README says exists, exists."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from datasets import Dataset

from abr_trainer import ABRTrainer, Observation
from abr_trainer.cli.main import VERBS
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.schedulers import Row
from tests.conftest import tiny_llama, token_rows

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = (ROOT / "docs" / "rules" / "rows.md").read_text(encoding="utf-8")
EXAMPLE, OWN_RULE, TRL_EXAMPLE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda _: tiny_llama())
    names = {"train_dataset": token_rows(16), "eval_dataset": token_rows(4)}
    exec(EXAMPLE.replace("max_passes=2000", "max_passes=12"), names)
    assert isinstance(names["trainer"], ABRTrainer)
    assert names["trainer"].ledger.passes == 12


def test_the_example_for_trl_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"train_dataset": Dataset.from_list([{"text": "The fox saw nine birds. One of them flew away."}] * 12)}
    quick = f'model="{DEMO_MODEL}"', "max_passes=4, use_cpu=True, bf16=False"
    exec(TRL_EXAMPLE.replace('model="path/or/hub-id"', quick[0]).replace("max_passes=2000", quick[1]), names)
    assert names["trainer"].ledger.passes == 4


def test_the_own_rule_decides():
    names = {}
    exec(OWN_RULE, names)
    rule = names["OnlyTheFirstHalf"]()
    assert [rule.decide(Observation(0, loss, progress)) for loss, progress in ((4, 0.1), (4, 0.9), (2, 0.1))] == [
        2,
        1,
        1,
    ]


def test_the_own_rule_for_rows_decides_and_comes_back_from_a_checkpoint():
    names = {}
    exec(re.search(r"```python\n(.*?)```", ROWS, flags=re.DOTALL)[1], names)
    rule, again = names["AboveTwiceTheMean"](), names["AboveTwiceTheMean"]()
    rows = [Row(loss, 10, 0, position) for position, loss in enumerate((2.0, 3.0, 5.0))]
    assert all(map(rule.decide, rows)), "it has seen none"
    rule.observe(rows, [True, False, False])
    assert [rule.decide(row) for row in rows] == [True, True, False]
    assert rule.evidence(rows[0]) == {"mean": 2.0, "limit": 4.0}
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again == rule
    assert repr(again) == "AboveTwiceTheMean()", "by which a checkpoint tells whether its state fits"


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9-]*", text))


def commands():
    """Return what is said to run of this repository: a verb of `abr` or a script, and the words after it."""
    found = []
    for line in re.findall(r"^    (\S.*)", TEXTS, flags=re.MULTILINE) + re.findall(r"`([^`\n]+)`", TEXTS):
        for command in line.split("; "):
            if re.match(
                rf"(do )?(\w+=\S+ )*(abr ({'|'.join(VERBS)})\b|python (?!-m )|torchrun |accelerate )", command
            ):
                words = shlex.split(command, comments=True)
                program = "abr_trainer" if "abr_trainer" in words else "abr"
                scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
                start = words.index(program) + 1 if program in words else scripts[0] if scripts else len(words)
                found += [(target, words[start:]) for target in words[start : start + 1]]
    return found


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "docs/compare/README.md",
]
DOCSTRINGS = [importlib.import_module(verb.module).__doc__ for verb in VERBS.values()]
EXAMPLES = [f"    {verb.example}" for verb in VERBS.values()]
TEXTS = "\n".join([*(path.read_text(encoding="utf-8") for path in DOCUMENTS), *DOCSTRINGS, *EXAMPLES]).replace(
    "\\\n", " "
)
COMMANDS = commands()


@functools.cache
def flags_of(target):
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
    assert flags_in(own) <= flags_of(target)
    assert flags_in(passed_on) <= flags_of("classify" if target == "compare-prompts" else "train")


def test_every_verb_is_shown_and_exists():
    assert {target for target, _ in COMMANDS if not target.endswith(".py")} == VERBS.keys()
    said = set(re.findall(r"(?:^    |`|; do )abr ([a-z-]+)(?= |`|$)", TEXTS, flags=re.MULTILINE))
    assert said - {"beside"} == VERBS.keys(), "a rule is called abr, too: abr beside its control"


def test_no_document_names_a_script_that_is_gone():
    named = set(re.findall(r"(?<![\w/])(?:scripts|benchmarks|configs|tests)/[\w/]+\.\w+", TEXTS))
    gone = {f"scripts/{name}.py" for name in ("compare_schedulers", "compare_prompts", "run_glue_abr")}  # as is said
    assert {name for name in named - gone if not (ROOT / name).exists()} == set()


def test_every_flag_is_one_of_a_command():
    of_launchers = {"--nodes", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}
    of_launchers |= {"--config_file", "--num_processes", "--cpu"}
    of_others = {"--help", "--help-all", "--logdir", "--no-build-isolation"}
    known = set().union(*(flags_of(target) for target, _ in COMMANDS))
    assert flags_in(README) <= known | of_launchers | of_others


def test_every_test_it_names_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README[README.index("## What works") :])
    assert named
    assert all(f"def {name}(" in tests for name in named)


@pytest.mark.parametrize("line", re.search(r"## What is where\n\n(.*?)\n\n", README, flags=re.DOTALL)[1].splitlines())
def test_every_file_of_the_tree_exists(line):
    name = line.split()[0]
    inside = "abr_trainer/" if line.startswith("      ") else ""
    assert (ROOT / inside / name).exists()
