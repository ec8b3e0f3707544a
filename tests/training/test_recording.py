"""What a run that a Python program has started leaves for `abr why`, `abr report` and `abr rows`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from abr_trainer import ABRConfig
from abr_trainer.cli import report as report_verb
from abr_trainer.cli import rows as rows_verb
from abr_trainer.records.files import read_lines
from abr_trainer.report.why import explain_batch
from abr_trainer.schedulers import ConstantScheduler, RobustOutlierSkip, RobustRows, ThresholdScheduler
from abr_trainer.training.tensorboard import RunTensorBoardCallback
from tests.conftest import Scripted, token_rows

pytestmark = pytest.mark.slow


def provenance_in(directory):
    return json.loads(Path(directory, "run.json").read_text())


def abr(**fields):
    return lambda **config: ABRConfig(**config, **{"repeat_scheduler": "abr", "loss_threshold": 1.5, **fields})


def why(directory, step):
    """Return what `abr why` says, before it is broken into the lines of a terminal."""
    return "\n".join(explain_batch(Path(directory), step))


def test_a_python_run_says_what_made_it(train):
    trainer = train(config_cls=abr(skip_outliers="classic"))
    written = provenance_in(trainer.args.output_dir)
    assert "argv" not in written
    arguments = written["arguments"]
    assert [arguments[name] for name in ("repeat_scheduler", "loss_threshold", "skip_outliers", "seed")] == [
        *("abr", 1.5, "classic", 42)
    ]
    assert {"abr_trainer", "torch", "transformers"} <= written["versions"].keys()
    assert written["machine"]["device"] == "cpu"
    assert "ClassicOutlierSkip(inner=ThresholdScheduler(loss_threshold=1.5" in why(trainer.args.output_dir, 3)


def test_why_report_and_rows_work_on_a_python_run(train, capsys):
    rows = token_rows(48)
    trainer = train(config_cls=abr(loss_threshold="q0.8", skip_rows="robust"), data=rows, learning_rate=1e-3)
    run = trainer.args.output_dir
    trace = list(read_lines(Path(run, "abr_trace.jsonl")))
    for batch in trace:
        assert "has changed since" not in why(run, batch["step"])
    assert "losses remembered" in why(run, 20)
    report_verb.main([run])
    page = Path(run, "_report", "report.md").read_text()
    assert "A Python program started the run. Its rule: `RobustOutlierSkip(inner=ThresholdScheduler(" in page
    assert "transformers" in page
    rows_verb.main([run])
    assert "48 rows judged in 24 batches" in capsys.readouterr().out


@pytest.mark.parametrize("config_cls", [TrainingArguments, ABRConfig])
def test_a_rule_that_the_trainer_was_given_is_recorded_whatever_its_arguments(train, config_cls):
    rule = RobustOutlierSkip(ThresholdScheduler(1.5, max_repeats=3), sigmas=6.0)
    run = train(config_cls=config_cls, repeat_scheduler=rule).args.output_dir
    assert provenance_in(run)["instances"]["repeat_scheduler"]["name"] == repr(rule)
    text = why(run, 4)
    assert repr(rule) in text
    assert "has changed since" not in text


def test_without_a_rule_for_batches_none_is_made_up(train):
    """A trainer of plain arguments that drops rows skips no outliers, though that is the default of `ABRConfig`."""
    trainer = train(config_cls=TrainingArguments, trainer_options={"row_rule": RobustRows(sigmas=3.5)})
    assert "ConstantScheduler(repeats=1)" in why(trainer.args.output_dir, 2)
    assert set(provenance_in(trainer.args.output_dir)["instances"]) == {"repeat_scheduler", "row_rule"}


def test_of_a_rule_that_cannot_be_made_again_why_says_what_the_trace_knows(train):
    run = train(repeat_scheduler=Scripted(1, 3)).args.output_dir
    text = why(run, 2)
    assert "was trained on 3 times" in text
    assert "Scripted() of tests.conftest:Scripted cannot be made again: its class is no dataclass" in text
    report_verb.main([run])
    assert "Its rule: `Scripted()`" in Path(run, "_report", "report.md").read_text()


def test_a_passive_trainer_writes_nothing(train, tmp_path):
    train(config_cls=TrainingArguments, output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list(tmp_path.rglob("*.json*"))


def test_a_resumed_run_keeps_its_record_and_a_new_one_replaces_it(train):
    options = {"config_cls": abr(), "save_strategy": "steps", "save_steps": 3}
    run = Path(train(**options).args.output_dir)
    begun = {**provenance_in(run), "argv": ["abr", "train", "--do_train"]}
    (run / "run.json").write_text(json.dumps(begun))
    train(**options, resume_from_checkpoint=str(run / "checkpoint-3"))
    resumed = provenance_in(run)
    assert {**resumed, "finished": None} == {**begun, "finished": None}
    train(config_cls=abr(loss_threshold=2.5))
    assert provenance_in(run)["arguments"]["loss_threshold"] == 2.5
    assert "argv" not in provenance_in(run), "or the command of another run would stand for this one"


def test_no_token_is_recorded(train):
    trainer = train(config_cls=TrainingArguments, repeat_scheduler=ThresholdScheduler(), hub_token="hf_secret_of_mine")
    assert "hf_secret" not in Path(trainer.args.output_dir, "run.json").read_text()
    assert provenance_in(trainer.args.output_dir)["arguments"]["use_cpu"] is True


def page_of(run):
    report_verb.main([str(run)])
    return Path(run, "_report", "report.md").read_text()


class Ruin(TrainerCallback):
    """Raise the learning rate without measure after the second batch."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step >= 2:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = 0.2


def test_the_page_of_a_finished_python_run_tells_of_the_model_that_it_has_kept(train):
    options = {
        "config_cls": abr(),
        "data": token_rows(16),
        "learning_rate": 1e-3,
        "trainer_options": {"callbacks": [Ruin()], "eval_dataset": token_rows(4)},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "load_best_model_at_end": True,
        "metric_for_best_model": "perplexity",
        "eval_on_start": True,
    }
    trainer = train(**options)
    run = Path(trainer.args.output_dir)
    measured = {logs["step"]: logs["eval_perplexity"] for logs in trainer.state.log_history if "eval_loss" in logs}
    assert measured[6] > measured[0] > measured[2], "or this tests nothing"
    assert provenance_in(run)["finished"]["kept_step"] == 2
    page = page_of(run)
    assert "is not finished" not in page
    assert "made the model worse" not in page
    assert f"to {measured[2]:.2f} at the end" in page
    ended = provenance_in(run)["finished"]["totals"]
    assert ended["train_passes"] == float(trainer.ledger.passes)
    (run / "all_results.json").write_text(json.dumps({**ended, "test_perplexity": 12.5}))
    assert "test perplexity" in page_of(run)


def test_a_python_run_at_work_is_not_finished_whatever_an_earlier_one_has_left(train):
    run = Path(train(config_cls=abr(), max_steps=2).args.output_dir)
    (run / "all_results.json").write_text(json.dumps(provenance_in(run)["finished"]["totals"]))

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config_cls=abr(), max_steps=2, trainer_options={"callbacks": [Fails()]})
    assert provenance_in(run)["finished"] is None
    train(config_cls=abr(), max_steps=2)
    assert "is not finished" not in page_of(run)
    (run / "run.json").write_text(json.dumps({**provenance_in(run), "finished": None}))
    assert "is not finished" in page_of(run)


@pytest.mark.parametrize("given", [True, False])
def test_why_explains_a_batch_by_the_rule_under_which_the_run_was_resumed(train, given):
    def under(repeats):
        fields = {"repeat_scheduler": "fixed", "max_repeats": repeats, "skip_outliers": "none"}
        config = lambda **others: ABRConfig(**others, **fields)  # noqa: E731
        return {"repeat_scheduler": ConstantScheduler(repeats)} if given else {"config_cls": config}

    options = {"data": token_rows(16), "save_strategy": "steps", "save_steps": 2}
    run = Path(train(**options, **under(1), max_steps=4).args.output_dir)
    train(**options, **under(2), max_steps=6, resume_from_checkpoint=str(run / "checkpoint-4"))
    train(**options, **under(2), max_steps=8, resume_from_checkpoint=str(run / "checkpoint-6"))
    assert [each["step"] for each in provenance_in(run)["resumed"]] == [4]
    for step, repeats in ((1, 1), (4, 1), (5, 2), (8, 2)):
        text = why(run, step)
        assert f"ConstantScheduler(repeats={repeats})" in text, step
        assert "has changed since" not in text, step
    assert "Resumed after batch 4 under `" in page_of(run)
    train(**options, **under(3), max_steps=4, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert [each["step"] for each in provenance_in(run)["resumed"]] == [2]
    assert "ConstantScheduler(repeats=3)" in why(run, 4)


def test_a_rule_that_goes_on_keeps_its_history_where_only_that_for_rows_changes(train):
    rule = {"repeat_scheduler": "abr", "loss_threshold": "q0.8"}
    options = {"data": token_rows(48), "save_strategy": "steps", "save_steps": 12, "learning_rate": 1e-3}
    run = Path(train(**options, config_cls=abr(**rule), max_steps=12).args.output_dir)
    train(
        **options,
        config_cls=abr(**rule, skip_rows="robust"),
        max_steps=24,
        resume_from_checkpoint=str(run / "checkpoint-12"),
    )
    assert [each["step"] for each in provenance_in(run)["resumed"]] == [12]
    for step in range(1, 25):
        assert "has changed since" not in why(run, step), step


class Pairs(ConstantScheduler):
    """A rule that remembers by keys that JSON does not have."""

    def state_dict(self):
        return {(0, 1): 2.5}

    def load_state_dict(self, state):
        pass


def test_a_state_that_is_not_json_is_refused_before_the_first_batch_with_the_name_of_its_rule(train):
    with pytest.raises(TypeError, match=r"The state_dict of Pairs\(repeats=1\) is not JSON: keys must be str"):
        train(repeat_scheduler=Pairs())


def test_a_tensorboard_callback_of_the_users_own_stays_the_one_that_was_given(build):
    mine = TensorBoardCallback()
    trainer = build(trainer_options={"callbacks": [mine]})
    assert mine in trainer.callback_handler.callbacks
    assert isinstance(mine, RunTensorBoardCallback)
    trainer.remove_callback(mine)
    assert not any(isinstance(each, TensorBoardCallback) for each in trainer.callback_handler.callbacks)
