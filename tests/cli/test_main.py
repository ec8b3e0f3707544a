"""The command `abr`: its verbs, and what it says of those that it does not have."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys

import pytest

from abr_trainer import __version__
from abr_trainer.cli.main import VERBS, main


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_all_verbs_are_listed_on_one_screen(capsys, argv):
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 100 for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS)


def test_the_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"abr {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian", "--do_train"], "error: Unknown verb 'trian'. Did you mean 'train'?"),
        (["compare_prompts"], "error: Unknown verb 'compare_prompts'. Did you mean 'compare-prompts'?"),
        (["frobnicate"], "error: Unknown verb 'frobnicate'. `abr` lists the verbs."),
        (["run.yaml"], "error: Unknown verb 'run.yaml'. `abr` lists the verbs."),
        (["--do_train"], "error: Give a verb before --do_train. `abr` lists the verbs."),
        ([""], "error: Unknown verb ''. `abr` lists the verbs."),
    ],
)
def test_an_unknown_verb_gets_one_line(capsys, argv, line):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_calls_the_main_of_its_module(monkeypatch, tmp_path, verb):
    given = []
    monkeypatch.setattr(importlib.import_module(VERBS[verb].module), "main", given.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    argv = shlex.split(VERBS[verb].example)[2:]
    main([verb, *argv])
    assert given == [argv]


def test_an_unknown_verb_is_answered_before_torch_and_transformers_are_imported():
    code = "import atexit, sys; atexit.register(lambda: print({'torch', 'transformers'} & sys.modules.keys()));"
    code += "from abr_trainer.cli.main import main; main(); main(['trian'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: abr VERB")
    assert done.stdout.endswith("\nset()\n")
