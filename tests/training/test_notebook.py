"""What a notebook shows, run in a real kernel."""

from __future__ import annotations

import re
from html import unescape

import nbformat
import pytest
from nbclient import NotebookClient

from abr_trainer.training.notebook import ABRNotebookProgressCallback
from tests.conftest import ON_CPU, ROOT
from tests.training.test_screen import seen

pytestmark = pytest.mark.launches

SETUP = """
from transformers import Trainer, TrainingArguments, TrainerCallback
from abr_trainer import ABRConfig, ABRTrainer
from tests.conftest import Scripted, tiny_llama, token_rows

def run(trainer_cls=ABRTrainer, config_cls=ABRConfig, scheduler=Scripted(2, 1, 0, 1), **options):
    defaults = dict(output_dir=OUTPUT, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=2)
    defaults |= dict(save_strategy="no", report_to="none", use_cpu=True, num_train_epochs=1)
    own = {} if scheduler is None else {"repeat_scheduler": scheduler}
    trainer = trainer_cls(model=tiny_llama(), args=config_cls(**{**defaults, **options}), train_dataset=token_rows(12),
                          eval_dataset=token_rows(4), **own)
    trainer.train()
    return trainer
"""
CELLS = [
    'run(max_passes=12, num_train_epochs=2, skip_outliers="none")',
    'run(eval_strategy="epoch", num_train_epochs=2, eval_on_start=True, do_eval=True)',
    'run(skip_rows="robust", scheduler=None, disable_tqdm=False)',
    "run(Trainer, TrainingArguments, scheduler=None)",
    "run(disable_tqdm=True, scheduler=None)",
    "print([type(each).__name__ for each in run(scheduler=None).callback_handler.callbacks])",
    "run(scheduler=None, eval_strategy='epoch').evaluate()",
]


def shown(cell):
    """All texts that a cell shows, and the rows of the last table of each output."""
    html = [output["data"].get("text/html", "") for output in cell.outputs if "data" in output]
    rows = [
        [unescape(re.sub("<[^>]*>", "", item)) for item in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
        for each in html
        for row in re.findall(r"<tr.*?>(.*?)</tr>", each, flags=re.DOTALL)
    ]
    return " ".join(html), rows, "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    setup = SETUP.replace("OUTPUT", repr(str(tmp_path_factory.mktemp("notebook"))))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in (setup, *CELLS)])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ON_CPU | {"PYTHONPATH": str(ROOT)}).items():
            patch.setenv(name, value)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    return [shown(cell) for cell in notebook.cells[1:]]


def test_a_run_with_a_budget_counts_passes_and_shows_our_columns(cells):
    html, rows, _ = cells[0]
    assert rows[0] == ["Step", "Passes", "Training loss", "Perplexity", "Updates/batch", "Skipped"]
    # Two updates, one, a skip for a third of a pass, one and one ...
    assert [row[:2] + row[4:] for row in rows[1:3]] == [["2", "3.0", "1.50", "0"], ["4", "4.3", "0.50", "1"]]
    assert "passes, " in html
    assert re.search(r"1[12](\.\d)?/12 ", html), "of the budget, not of the batches that it could buy"
    assert "Epoch" not in html


def test_an_evaluation_stands_beside_the_log_of_its_step(cells):
    _, rows, _ = cells[1]
    columns = rows[0]
    assert columns[-2:] == ["Validation loss", "Validation perplexity"]
    assert rows[1][0] == "0"
    assert rows[1][columns.index("Training loss")] == ""
    assert rows[1][-1], "that before the first batch"
    assert [row[0] for row in rows[1:]] == ["0", "2", "4", "6", "8", "10", "12"]
    assert [bool(row[-1]) for row in rows[1:]] == [True, False, False, True, False, False, True]
    assert all(row[columns.index("Updates/batch")] for row in rows[2:])


def test_dropped_rows_have_a_column_where_rows_are_judged(cells):
    assert cells[2][1][0][-1] == "Rows dropped"


def test_the_notebook_of_stock_trainer_is_left_alone(cells):
    assert cells[3][1][0] == ["Step", "Training Loss"]
    assert not cells[4][1], "no table where it is not wanted"
    assert "ABRNotebookProgressCallback" in cells[5][2]
    assert "'NotebookProgressCallback'" not in cells[5][2]


def test_an_evaluation_after_the_end_is_shown(cells):
    _, rows, _ = cells[6]
    assert "Validation Loss" in rows[-2] or "Validation loss" in rows[-2]


def test_a_wait_gets_a_column_once_there_is_one(capsys):
    notebook = ABRNotebookProgressCallback()
    seen(notebook, 60, lambda batch: 0.25 if batch >= 30 else 0.0)
    titles, *rows = notebook.training_tracker.inner_table
    at = titles.index("Waiting")
    # 2.5 of 39 seconds after the first batch are more than 5 %.
    assert [row[at] for row in rows] == ["", "", "", "25 %", "25 %", "25 %"]
