"""What the commands show while they train: in a terminal with a bar, elsewhere in plain lines."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from abr_trainer.schedulers import BatchTimes, Observation, Outcome
from abr_trainer.training.ledger import ComputeLedger
from abr_trainer.training.log_table import Score
from abr_trainer.training.screen import RunScreen, show_on
from abr_trainer.training.summary import kept_line, perplexity_lines, time_lines, worse
from tests.conftest import Scripted, token_rows

pytestmark = pytest.mark.slow

EVALUATED = {"trainer_options": {"eval_dataset": token_rows(4, seed=9)}, "eval_strategy": "epoch"}


def shown(build, terminal=True, bar=True, **options):
    """Train, and return what was shown: what a terminal would leave, or a file hold."""
    file = io.StringIO()
    trainer = build(**{**EVALUATED, "eval_on_start": True, "num_train_epochs": 2, **options})
    console = Console(file=file, force_terminal=terminal, width=100, _environ={}) if terminal else None
    screen = RunScreen(Score(), trainer.row_rule is not None, shows_bar=bar, console=console)
    show_on(trainer, screen)
    try:
        trainer.train()
    finally:
        screen.close()
    return trainer, file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_lines_and_a_bar_that_is_gone_at_the_end(build):
    _, text = shown(build, repeat_scheduler=Scripted(2, 1, 0, 1))
    lines = plain(text).replace("\r", "\n").splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert any(re.match(r"training +[━╸╺ ]+ \d+/12 batches", line) for line in lines), "a bar"
    rows = [line.split() for line in lines if re.match(r" *\d+ +\d+\.\d ", line)]
    # Two updates, one, a skip for a third of a pass, one; the next ones are as the last.
    assert [row[:2] for row in rows[:3]] == [["0", "0.0"], ["2", "3.0"], ["4", "4.3"]]
    assert rows[1][3:5] == ["1.50", "0"]
    assert rows[2][3:5] == ["0.50", "1"]
    assert text.count("\x1b[?25h") >= text.count("\x1b[?25l") > 0, "the cursor is back, whatever happens"
    assert "{" not in text


def test_under_a_budget_of_seconds_lines_and_bar_count_seconds(build):
    trainer, text = shown(build, max_seconds=1, max_steps=6, repeat_scheduler=Scripted(2))
    lines = plain(text).replace("\r", "\n").splitlines()
    assert all(len(line) <= 100 for line in lines)
    (titles,) = [line.split() for line in lines if line.lstrip().startswith("step")]
    assert titles[:2] == ["step", "seconds"]
    assert any(re.match(r"training +[━╸╺ ]+ [\d.]+/1 seconds", line) for line in lines), "a bar"
    last = [line.split() for line in lines if re.match(r" *\d+ +\d+\.\d ", line)][-1]
    assert last[:2] == [str(trainer.state.global_step), f"{trainer.ledger.seconds:.1f}"]


def test_a_file_gets_plain_lines_and_each_evaluation_beside_the_first(build, capsys):
    trainer, _ = shown(build, terminal=False)
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "{" not in told
    before, *later = [each["eval_perplexity"] for each in trainer.state.log_history if "eval_perplexity" in each]
    assert re.search(rf"^ +0 +0\.0 +{before:.2f} +Before training$", told, flags=re.MULTILINE)
    for epoch, value in enumerate(later, 1):
        change = f"{100 * (value / before - 1):+.1f} %"
        assert f"{value:.2f}  Epoch {epoch}: {change} since before training\n" in told
    assert told.count("updates/batch") == 1, "the titles, once"


def test_rows_have_a_column_where_they_are_judged(build, capsys):
    shown(build, terminal=False, skip_rows="robust")
    assert "dropped" in capsys.readouterr().out


def test_without_tqdm_there_are_lines_and_no_bar(build):
    _, text = shown(build, bar=False)
    assert "━" not in text
    assert "Before training" in plain(text)


def test_warnings_stand_above_the_bar_and_go_their_usual_way_afterwards(build, monkeypatch):
    class Warning(Scripted):
        def observe(self, outcome):
            logging.getLogger("transformers.trainer").warning(f"said of batch {outcome.observation.batch}")

    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    handlers = transformers_logging._get_library_root_logger().handlers
    (handler,) = [each for each in handlers if type(each) is logging.StreamHandler]
    monkeypatch.setattr(handler, "stream", stderr)
    _, text = shown(build, repeat_scheduler=Warning(1))
    lines = plain(text).replace("\r", "\n").splitlines()
    assert any(line.rstrip().endswith("said of batch 3") and "━" not in line for line in lines)
    assert handler.stream is stderr
    assert sys.stderr is stderr


def test_a_run_that_fails_leaves_the_streams_as_they_were(build):
    class Failing(Scripted):
        def observe(self, outcome):
            raise RuntimeError("no more")

    before = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError, match="no more"):
        shown(build, repeat_scheduler=Failing(1))
    assert (sys.stdout, sys.stderr) == before


def test_only_the_main_process_shows_anything(build, capsys, monkeypatch):
    trainer = build(**EVALUATED, eval_on_start=True)
    monkeypatch.setattr(type(trainer.state), "is_world_process_zero", False, raising=False)
    show_on(trainer, RunScreen(Score()))
    trainer.state.is_world_process_zero = False
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    assert capsys.readouterr().out == ""


SHOWS_A_BAR = """
import logging, os, sys
from types import SimpleNamespace
from abr_trainer.training.log_table import Score
from abr_trainer.training.screen import RunScreen
from transformers.utils import logging as transformers_logging

def show():
    screen = RunScreen(Score())
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10, global_step=5, epoch=0.0, log_history=[])
    screen.on_train_begin(SimpleNamespace(), state, None)
    screen.on_log(None, state, None, logs={"loss": 1.25, "learning_rate": 1e-3})
    print("printed")
    print("complained", file=sys.stderr)
    transformers_logging.get_logger("transformers.trainer").warning("warned")
    screen.close()
    transformers_logging.get_logger("transformers.trainer").warning("warned afterwards")

descriptors = [int(each) for each in sys.argv[1:]]
while descriptors:
    out, err, *descriptors = descriptors
    if not (child := os.fork()):
        os.dup2(out, 1)
        os.dup2(err, 2)
        show()
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
"""Shows a bar on the two streams of each pair of descriptors, in processes that share the time to import."""


def test_a_stream_that_goes_to_a_file_stays_there_where_the_other_is_a_terminal(tmp_path):
    terminals = {redirected: pty.openpty() for redirected in ("stdout", "stderr")}
    with contextlib.ExitStack() as files:
        pairs: list[int] = []
        for redirected, (_, terminal) in terminals.items():
            file = files.enter_context((tmp_path / redirected).open("wb"))
            pairs += [file.fileno(), terminal] if redirected == "stdout" else [terminal, file.fileno()]
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        command = [sys.executable, "-c", SHOWS_A_BAR, *map(str, pairs)]
        subprocess.run(command, env=environment, pass_fds=pairs, timeout=120, check=True)
    for redirected, (ours, terminal) in terminals.items():
        os.close(terminal)
        seen = b""
        with contextlib.suppress(OSError):  # how a pseudo-terminal ends
            while part := os.read(ours, 4096):
                seen += part
        os.close(ours)
        told, on_screen = (tmp_path / redirected).read_text(), plain(seen.decode())
        assert "\x1b" not in told
        assert "━" in on_screen, "a bar"
        lines = {"stdout": ["1.250", "printed"], "stderr": ["complained", "warned", "warned afterwards"]}
        for stream, texts in lines.items():
            for text in texts:
                assert (text in told) == (stream == redirected)
                assert (text in on_screen) == (stream != redirected)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_what_trainer_shows_is_replaced(build, disable_tqdm):
    trainer = build(disable_tqdm=disable_tqdm)
    show_on(trainer, RunScreen(Score()))
    kinds = trainer.callback_handler.callbacks
    assert not any(isinstance(each, (ProgressCallback, PrinterCallback)) for each in kinds)
    assert sum(isinstance(each, RunScreen) for each in kinds) == 1


def seen(screen, batches, waiting):
    """What a screen shows of batches of a second, with a log every ten: `waiting(batch)` seconds are a wait."""
    state = SimpleNamespace(is_world_process_zero=True, max_steps=batches, global_step=0, epoch=0.0, log_history=[])
    screen.on_train_begin(SimpleNamespace(), state, None)
    ledger = ComputeLedger()
    for batch in range(batches):
        times = BatchTimes(waiting(batch), 0.0, 0.0, None)
        ledger.close_batch(1, seconds=1.0)
        ledger.waiting_seconds += times.waiting
        ledger.tokens += 64
        ledger.passes += 1
        state.global_step += 1
        outcome = Outcome(Observation(batch, 2.0, progress=0.0), 1, (2.0,))
        screen.on_outcome(None, state, None, outcome=outcome, ledger=ledger, seconds=1.0, times=times)
        if state.global_step % 10 == 0:
            screen.on_log(None, state, None, logs={"loss": 2.0, "learning_rate": 1e-3})


@pytest.mark.parametrize("width", [80, 100])
def test_a_wait_gets_a_column_once_there_is_one_and_keeps_it(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, _environ={})
    seen(RunScreen(Score(), shows_bar=False, console=console), 120, lambda batch: 0.25 if 30 <= batch < 60 else 0.0)
    lines = [line for line in plain(file.getvalue()).splitlines() if line]
    assert all(len(line) <= width for line in lines)
    titles = [number for number, line in enumerate(lines) if "step" in line]
    assert titles == [0, 4], "above the 4th log, of batches 31 to 40, and not again"
    assert "waiting" not in lines[0]
    assert "waiting" in lines[4]
    end = lines[4].index("waiting") + len("waiting")
    assert [line[end - 5 : end].strip() for line in lines[5:]] == [*["25 %"] * 3, *["0 %"] * 6]


def test_a_run_that_hardly_waits_has_no_column_for_it(capsys):
    slow_start = [20.0, *[0.04] * 119]  # a start-up of 20 seconds, and 4 %
    seen(RunScreen(Score(), shows_bar=False), 120, slow_start.__getitem__)
    told = capsys.readouterr().out
    assert "waiting" not in told
    assert told.count("step") == 1


# ---- The end ----


def test_the_end_tells_where_the_time_went():
    times = dict(seconds=43.0, evaluation_seconds=5.125, saving_seconds=1.25, total_seconds=50.0)
    assert time_lines(ComputeLedger(batches=4, **times)) == [
        "time        passes 43.0 s (86 %), evaluation 5.1 s (10 %), saving 1.2 s (2 %), rest 0.6 s (1 %)"
    ]


def test_the_end_tells_nothing_of_times_that_are_small():
    times = dict(seconds=99.4, evaluation_seconds=0.4, saving_seconds=0.1, total_seconds=100.0)
    assert time_lines(ComputeLedger(batches=4, **times)) == [], "passes alone, which stand in the line above"


def test_a_line_on_the_time_that_is_too_long_goes_on_below_its_beginning():
    times = dict(seconds=20_000.0, waiting_seconds=4_000.0, generating_seconds=9_000.0, evaluation_seconds=2_000.0)
    assert time_lines(ComputeLedger(batches=4, saving_seconds=1_000.0, total_seconds=24_000.0, **times)) == [
        "time        passes 7,000.0 s (29 %), waiting 4,000.0 s (17 %), generating 9,000.0 s (38 %),",
        "            evaluation 2,000.0 s (8 %), saving 1,000.0 s (4 %), rest 1,000.0 s (4 %)",
    ]


def test_the_end_compares_the_model_that_was_kept_with_the_one_before():
    log = [{"step": 0, "eval_perplexity": 146.46}, {"step": 28, "eval_perplexity": 155.52}]
    log.append({"step": 42, "eval_perplexity": 171.43})
    results = {"eval_perplexity": 155.52, "eval_target_tokens": 504}
    assert perplexity_lines(log, ComputeLedger(batches=42), results, Score()) == [
        "evaluation  perplexity 146.46 before, 155.52 after (+6.2 %), over 504 target tokens",
        "Training made the model worse: perplexity 146.46 before, 155.52 now.",
    ]


def test_a_run_that_only_evaluates_compares_nothing():
    log = [{"step": 0, "eval_perplexity": 8.18}]
    results = {"eval_perplexity": 8.18, "eval_target_tokens": 10}
    assert perplexity_lines(log, ComputeLedger(), results, Score()) == [
        "evaluation  perplexity 8.18, over 10 target tokens"
    ]


def test_worse_is_told_in_either_direction_and_of_what_is_not_finite():
    accuracy = Score("eval_accuracy", "accuracy", digits=4, is_perplexity=False)
    assert worse(accuracy, 0.75, 0.5, greater_is_better=True).endswith("accuracy 0.7500 before, 0.5000 now.")
    assert worse(accuracy, 0.5, 0.75, greater_is_better=True) is None
    assert worse(Score(), 8.0, float("nan")).endswith("perplexity 8.00 before, nan now.")
    assert worse(Score(), 8.001, 8.002) is None, "nothing that one could see"
    assert worse(Score(), None, 8.0) is None


def test_which_checkpoint_was_kept_is_told_where_it_is_not_the_last(train):
    options = {**EVALUATED, "save_strategy": "epoch", "load_best_model_at_end": True, "do_eval": True}
    trainer = train(**options, learning_rate=5e-2, num_train_epochs=4, data=token_rows(6))
    best = trainer.state.best_global_step
    assert best == 3 < trainer.state.global_step == 12
    (line,) = kept_line(trainer.args, trainer.state, trainer.ledger)
    assert line == "kept        the model after 3 of 12 batches: the best checkpoint"
