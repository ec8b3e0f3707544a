"""The examples of `docs/start/chat.md` run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from abr_trainer.cli import sft
from abr_trainer.cli.command_line import parse_arguments
from abr_trainer.cli.main import VERBS
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.records.files import read_lines

CHAT = (Path(__file__).resolve().parents[2] / "docs" / "start" / "chat.md").read_text()
EXAMPLES = dict(re.findall(r"### (DPO|KTO|Reward models)\n.*?```python\n(.*?)```", CHAT, flags=re.DOTALL))
QUICK = "max_passes=4, use_cpu=True, bf16=False, report_to='none', disable_tqdm=True, gradient_checkpointing=False"


@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward models"])
def test_the_example_of_a_trainer_of_trl_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = EXAMPLES[name].replace("Qwen/Qwen2.5-0.5B-Instruct", str(DEMO_MODEL)).replace("max_passes=200", QUICK)
    Path("example.py").write_text(code)
    names = runpy.run_path("example.py", run_name="example")  # a module: the arguments are pickled
    spent = names["trainer"].ledger
    assert 3 < spent.passes <= 4
    trace = list(read_lines(next(tmp_path.glob("runs/*/abr_trace.jsonl"))))
    assert sum(batch["repeats"] for batch in trace) == spent.updates
    if 'repeat_scheduler="fixed"' in code:
        # A pass of DPO costs 4/3, as the forward of the reference model is charged: three fit into four.
        assert [batch["repeats"] for batch in trace] == ([2, 1] if name == "DPO" else [2, 2])


def test_the_file_of_flags_and_the_commands_are_read(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(re.search(r"```yaml\n(.*?)```", CHAT, flags=re.DOTALL)[1].replace("env:", "env: {}\n_:"))
    flags = yaml.safe_load(config.read_text())
    flags.pop("_")
    config.write_text(yaml.safe_dump(flags))
    _, data, _, args = parse_arguments(sft.ARGUMENTS, [str(config), "--learning_rate", "1e-4", "--use_cpu"])
    assert (args.learning_rate, args.max_passes, args.packing) == (1e-4, 2000, True)
    assert data.split_aliases["validation"] == ("test_sft",)
    verbs = re.findall(r"^abr ([\w-]+)", CHAT, flags=re.MULTILINE)
    assert set(verbs) <= set(VERBS)
    assert {"sft", "compare"} <= set(verbs)
