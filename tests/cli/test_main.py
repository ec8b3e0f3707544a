"""The command `abr`: its verbs, and what it says of those that it does not have."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys

import pytest

from abr_trainer import __version__
from abr_trainer.cli.main import VERBS, main
from abr_trainer.records.errors import Failure, one_line, one_line_errors
from tests.report.dropped import drop, write_run


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


@pytest.mark.parametrize(
    ("argv", "is_unbuffered"),
    [
        (["--help"], False),
        (["rows", "RUN", "--limit", "0"], True),
        (["rows", "RUN", "--clean", "IN", "OUT"], False),
        (["rows", "RUN", "--clean", "IN", "OUT"], True),
    ],
)
def test_it_ends_quietly_where_nobody_reads_what_it_prints(tmp_path, argv, is_unbuffered):
    run, path = write_run(tmp_path / "run", [drop(1, 0, 1, 5.0, "a")]), tmp_path / "notes.jsonl"
    path.write_text("{}\n" * 3)
    names = {"RUN": str(run), "IN": str(path), "OUT": str(tmp_path / "out.jsonl")}
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "abr_trainer", *(names.get(word, word) for word in argv)]
    options = {"stderr": subprocess.PIPE, "text": True, "timeout": 60, "check": False}
    env = {**os.environ, "PYTHONUNBUFFERED": "1" if is_unbuffered else ""}
    done = subprocess.run(command, stdout=writes, env=env, **options)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("the file is empty"), 2),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2),
        (Failure("the run has failed"), 1),
    ],
)
def test_the_status_tells_a_wrong_command_line_from_a_failure(monkeypatch, capsys, tmp_path, error, status):
    def fail(argv):
        with one_line_errors(ValueError, OSError, Failure):
            raise error

    monkeypatch.setattr(importlib.import_module(VERBS["rows"].module), "main", fail)
    with pytest.raises(SystemExit) as caught:
        main(["rows", str(tmp_path)])
    told = caught.value.code if status == 1 else capsys.readouterr().err.strip()  # Python prints what is no number
    assert told == f"error: {one_line(error)}"
    assert status == 1 or caught.value.code == status


def test_a_broken_pipe_of_another_kind_is_an_error(monkeypatch):
    def fail(argv):
        raise BrokenPipeError("a worker has died")

    monkeypatch.setattr(importlib.import_module(VERBS["rows"].module), "main", fail)
    with pytest.raises(BrokenPipeError, match="a worker has died"):
        main(["rows", "runs/demo"])


def test_an_unknown_verb_is_answered_before_torch_and_transformers_are_imported():
    code = "import atexit, sys; atexit.register(lambda: print({'torch', 'transformers'} & sys.modules.keys()));"
    code += "from abr_trainer.cli.main import main; main(); main(['trian'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: abr VERB")
    assert done.stdout.endswith("\nset()\n")
