"""One run at a time in a directory, whatever became of the one before."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import run_clm_abr
from abr_trainer.cli import classify
from abr_trainer.records.files import LOCK_NAME, is_unused
from abr_trainer.records.locking import SILENCE, Holder, locked
from tests.conftest import RUN

ELSEWHERE = replace(Holder.this(), host="another-machine", pid=4711)


def leave(directory: Path, holder: Holder, seconds_ago: float = 0.0) -> Path:
    """Leave the lock of a holder in a directory, as one that was killed does."""
    directory.mkdir(exist_ok=True)
    path = directory / LOCK_NAME
    path.write_text(json.dumps(asdict(holder)))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def without_locks(descriptor, operation):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_a_second_one_is_told_who_is_at_work_and_the_end_leaves_nothing(tmp_path):
    directory = tmp_path / "runs" / "one"
    who = rf"--output_dir .*one is in use by process {os.getpid()} on {socket.gethostname()} since 20"
    with locked(directory, "--output_dir"):
        assert is_unused(directory), "a lock is no run"
        with pytest.raises(ValueError, match=who), locked(directory, "--output_dir"):
            pass
        assert (directory / LOCK_NAME).exists(), "whoever is refused does not take the lock away"
    assert not (tmp_path / "runs").exists(), "what was made for the lock goes with it"


def test_what_has_been_written_stays(tmp_path):
    with locked(tmp_path / "run", "--output_dir"):
        (tmp_path / "run" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_an_error_gives_the_lock_up(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path, "--out"):
        raise RuntimeError
    with locked(tmp_path, "--out"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path, caplog):
    code = (
        "import os, signal, sys, pathlib; from abr_trainer.records.locking import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), '--out'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / LOCK_NAME).exists()
    with locked(tmp_path, "--out"):
        assert "which ended without releasing it" in caplog.text
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_worker_that_was_forked_does_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    is_up = context.Event()
    with locked(tmp_path, "--out"):
        worker = context.Process(target=lambda: (is_up.set(), time.sleep(60)))
        worker.start()
        assert is_up.wait(60)
    with locked(tmp_path, "--out"):
        pass
    worker.kill()
    worker.join()


@pytest.mark.parametrize("holder", [replace(Holder.this(), pid=2**22 + 1), replace(Holder.this(), started=0.0)])
def test_a_process_that_is_gone_or_whose_id_is_anothers_holds_nothing(tmp_path, monkeypatch, caplog, holder):
    leave(tmp_path, holder)
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with locked(tmp_path, "--out"):
        assert "which ended without releasing it" in caplog.text


def test_without_locks_of_the_file_system_a_living_process_is_known_by_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    in_use = pytest.raises(ValueError, match="is in use by process")
    with locked(tmp_path, "--out"), in_use, locked(tmp_path, "--out"):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def test_another_machine_holds_the_lock_as_long_as_it_gives_signs_of_life(tmp_path, caplog):
    path = leave(tmp_path, ELSEWHERE, seconds_ago=20)
    wanted = rf"process 4711 on another-machine .* last seen 2\d s ago.* delete {path}, or try again after 90 s"
    with pytest.raises(ValueError, match=wanted), locked(tmp_path, "--output_dir"):
        pass
    assert json.loads(path.read_text())["host"] == "another-machine"
    leave(tmp_path, ELSEWHERE, seconds_ago=SILENCE + 1)
    with locked(tmp_path, "--output_dir"):
        assert "on another-machine" in caplog.text


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr("abr_trainer.records.locking.BEAT", 0.01)
    with locked(tmp_path, "--out"):
        path = tmp_path / LOCK_NAME
        os.utime(path, (0, 0))
        for _ in range(500):
            if path.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 10


def test_a_directory_that_cannot_be_made_is_one_line():
    refused = pytest.raises(ValueError, match="--output_dir /proc/run cannot be written to")
    with refused, locked(Path("/proc/run"), "--output_dir"):
        pass


@pytest.mark.parametrize(
    "flags", [[], ["--resume_from_checkpoint", "true"], ["--overwrite_output_dir"], ["--do_eval"]], ids=str
)
@pytest.mark.parametrize("script", [run_clm_abr, classify], ids=["clm", "glue"])
def test_a_run_is_refused_before_its_first_check_where_another_one_is_at_work(tmp_path, script, flags):
    output = tmp_path / "run"
    task = ["--model_name_or_path", "demo", "--task_name", "demo", "--use_cpu", "--report_to", "none"]
    own = RUN if script is run_clm_abr else [*task, "--do_train"]
    with locked(output, "--output_dir"), pytest.raises(SystemExit, match="is in use by process") as caught:
        script.run([*own, *flags, "--output_dir", str(output)])
    assert "\n" not in str(caught.value)


def test_a_lock_that_a_killed_run_has_left_is_no_reason_to_overwrite(tmp_path):
    leave(tmp_path / "run", replace(Holder.this(), pid=2**22 + 1))
    results = run_clm_abr.run([*RUN, "--max_steps", "1", "--output_dir", str(tmp_path / "run")])
    assert results["train_batches"] == 1
    assert not (tmp_path / "run" / LOCK_NAME).exists()
