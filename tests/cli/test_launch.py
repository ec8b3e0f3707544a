"""Configurations that accelerate takes, and a Slurm job on two nodes that are played by this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands import launch as accelerate
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from abr_trainer.records.files import last_complete_checkpoint, read_lines
from tests.conftest import ROOT
from tests.hub_server import Hub

CONFIGURATIONS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))

SCONTROL = """#!/bin/sh
if [ "$1" = requeue ]; then echo "$2" > requeued; fi
echo 127.0.0.1
echo another-node
"""
SRUN = """#!/bin/sh
shift
trap : TERM
echo $$ > srun.pid
SLURM_NODEID=0 "$@" & nodes=$!
if [ "$SLURM_JOB_NUM_NODES" = 2 ]; then SLURM_NODEID=1 "$@" & nodes="$nodes $!"; fi
worst=0
for node in $nodes; do
    while kill -0 $node 2> /dev/null; do wait $node; status=$?; done
    [ $status = 0 ] || worst=$status
done
exit $worst
"""
SCANCEL = f"""#!{sys.executable}
import psutil, sys
for process in psutil.Process(int(open("srun.pid").read())).children(recursive=True):
    process.terminate()
"""
"""Like that of Slurm, it signals all processes on the nodes."""
RANK = f"""#!{sys.executable}
import signal, sys, time
assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "what the launcher inherits"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open("arguments", "w").write(" ".join(sys.argv[1:]))
while "auto" not in sys.argv:
    time.sleep(0.01)
"""
"""In place of torchrun: a run that ends at SIGTERM, or at once if it may be resumed."""


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configuration(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[path.stem.partition("_")[0]]
    assert config.distributed_type == expected
    if expected == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if expected == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


IN_4_BIT = ["--load_in_4bit", "--torch_dtype", "float32", "--bnb_4bit_compute_dtype", "float32"]
LAUNCHES = {
    **{path.stem: (path, IN_4_BIT if "qlora" in path.stem else []) for path in CONFIGURATIONS},
    "ddp_4_bit": (ROOT / "configs" / "accelerate" / "ddp.yaml", IN_4_BIT),
}
PUSH = ["--push_to_hub", "--hub_strategy", "end", "--hub_base_model", "demo-org/base"]
BOTH = ["--do_train", "--do_eval", "--lora_dropout", "0", "--use_cpu", "--report_to", "none"]
TEXTS = [*BOTH, "--dataset_name", "demo", "--max_eval_samples", "16", "--block_size", "64", "--max_passes", "4"]
TEXTS += [
    "--gradient_accumulation_steps",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--skip_outliers",
    "none",
    "--sample_prompts",
    "0",
]
CLASSES = [*BOTH, "--task_name", "demo", "--model_name_or_path", "demo", "--max_train_samples", "24", "--do_predict"]
CLASSES += ["--max_eval_samples", "21", "--max_seq_length", "24", "--per_device_train_batch_size", "2"]
CLASSES += ["--max_steps", "3", "--learning_rate", "1e-3", "--optim", "adamw_torch"]


def environment_of(path, monkeypatch, precision="no"):
    """Return the variables that `accelerate launch` gives to the processes of this configuration."""
    found = {}
    monkeypatch.setattr("torch.distributed.run.run", lambda args: found.update(os.environ))
    flags = ["--config_file", str(path), "--num_processes", "2", "--mixed_precision", precision, "script.py"]
    accelerate.launch_command(accelerate.launch_command_parser().parse_args(flags))
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


@pytest.fixture(scope="module")
def launched(tmp_path_factory, launch):
    """The runs of both verbs under each configuration, and the Hub that they pushed to.

    On two CPU processes instead of eight GPUs, and in fp32; all in the same two processes, which saves minutes.
    """
    folder = tmp_path_factory.mktemp("launched")
    plans = []
    with pytest.MonkeyPatch.context() as patch, Hub(folder / "of_hub_clients") as hub:
        for name, (path, more) in LAUNCHES.items():
            if "deepspeed" in name and find_spec("deepspeed") is None:
                continue
            environment = environment_of(path, patch)
            pushes = [] if name == "ddp_4_bit" else PUSH
            for verb, flags in (("train", [*TEXTS, *pushes]), ("classify", CLASSES)):
                output = folder / verb / name
                plans.append((environment, verb, [*flags, *more, "--output_dir", str(output)]))
                if verb == "classify" and "zero2" in name:
                    in_bf16 = [*flags, *more, "--bf16", "--output_dir", f"{output}_bf16"]
                    plans.append((environment_of(path, patch, "bf16"), verb, in_bf16))
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "hub.json").write_text(json.dumps({"environment": hub.environment, "url": hub.url}))
        launch(2, [], "trainings", folder)
        yield folder, hub


def results_in(folder):
    return {path.name: json.loads((path / "all_results.json").read_text()) for path in folder.iterdir()}


@pytest.mark.launches
def test_every_configuration_trains_to_the_perplexity_of_ddp(launched):
    folder, hub = launched
    results = results_in(folder / "train")
    for name, result in results.items():
        expected = results["ddp_4_bit" if "qlora" in name else "ddp"]
        if name != "ddp_4_bit":
            assert result["eval_perplexity"] == pytest.approx(expected["eval_perplexity"], rel=1e-5)
            assert result["train_flops"] == pytest.approx(expected["train_flops"], rel=1e-3)
        assert result["train_updates"] == 4
        engine = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[name.partition("_")[0]]
        assert (folder / "train" / name / "engine").read_text() == engine
        if name != "ddp_4_bit":  # each pushes its adapter, once: the other rank has nothing to do with the Hub
            pushed = hub.repository(f"me/{name}")
            assert [commit.title for commit in pushed.commits[1:]] == ["End of training"]
            weights = (folder / "train" / name / "adapter_model.safetensors").read_bytes()
            assert pushed.files("main")["adapter_model.safetensors"] == weights
    created = [request for request in hub.requests if request.path.startswith("/api/repos/create")]
    assert len(created) == 2 * (len(results) - 1), "at the start and at the end of each run"


@pytest.mark.launches
def test_every_configuration_trains_a_classifier_as_ddp_does(launched):
    folder, _ = launched
    results = results_in(folder / "classify")
    for name, result in results.items():
        expected = results["ddp_4_bit" if "qlora" in name or "4_bit" in name else "ddp"]
        in_halves = name.endswith("bf16")  # a head among them, which is in fp32 elsewhere
        for metric in ("train_loss", "eval_loss", "test_loss"):
            assert result[metric] == pytest.approx(expected[metric], rel=0.1 if in_halves else 1e-4), (name, metric)
        assert in_halves or result["eval_accuracy"] == expected["eval_accuracy"]
        saved = load_file(folder / "classify" / name / "adapter_model.safetensors")
        assert saved["base_model.model.score.weight"].shape == (2, 96)


@pytest.fixture
def slurm(tmp_path):
    """Start the Slurm script as a job whose nodes are this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "ABR_VENV": str(tmp_path / "none"),
        "OMP_NUM_THREADS": "1",
    }

    def slurm(*flags, nodes=1, **more):
        command = ["bash", str(ROOT / "scripts" / "launch_slurm.sh"), *flags]
        return subprocess.Popen(command, env=environment | {"SLURM_JOB_NUM_NODES": str(nodes)} | more)

    return slurm


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


DEMO = ["--dataset_name", "demo", "--do_train", "--block_size", "64", "--use_cpu"]


@pytest.mark.long  # the script itself is tested below, and torchrun by a comparison
@pytest.mark.launches
def test_a_slurm_job_is_one_run_over_its_nodes(tmp_path, slurm):
    flags = [*DEMO, "--max_passes", "4", "--output_dir", str(tmp_path / "a run")]
    assert slurm(*flags, nodes=2).wait(timeout=400) == 0
    results = json.loads((tmp_path / "a run" / "all_results.json").read_text())
    assert results["train_passes"] == 4
    assert results["train_tokens"] == 4 * 2 * 8 * 64  # passes, nodes, rows, tokens a row
    assert not (tmp_path / "requeued").exists()


def test_a_slurm_job_that_is_stopped_goes_back_into_the_queue(tmp_path, slurm):
    (tmp_path / "bin" / "torchrun").write_text(RANK)
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    job = slurm("run.yaml", "--output_dir", "a run")
    wait_for((tmp_path / "arguments").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 143
    assert (tmp_path / "requeued").read_text() == "7\n"
    asked = (tmp_path / "arguments").read_text()
    assert asked.endswith("-m abr_trainer train run.yaml --output_dir a run --enable_jit_checkpoint")

    (tmp_path / "requeued").unlink()
    assert slurm("run.yaml", SLURM_RESTART_COUNT="1").wait(timeout=60) == 0
    asked = (tmp_path / "arguments").read_text()
    assert asked.endswith(
        "train run.yaml --enable_jit_checkpoint --resume_from_checkpoint auto --overwrite_output_dir"
    )
    assert not (tmp_path / "requeued").exists()


@pytest.mark.long
@pytest.mark.launches
def test_a_stopped_slurm_job_is_saved_by_all_nodes_and_continues(tmp_path, slurm):
    out = tmp_path / "a run"
    flags = [*DEMO, "--max_passes", "40", "--output_dir", str(out), "--dataloader_num_workers", "1"]
    job = slurm(*flags, nodes=2)
    trace = out / "abr_trace.jsonl"
    wait_for(lambda: trace.exists() and len(list(read_lines(trace))) > 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=200) != 0
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert last_complete_checkpoint(out) is not None
    assert slurm(*flags, nodes=2, SLURM_RESTART_COUNT="1").wait(timeout=400) == 0
    assert 39 < json.loads((out / "all_results.json").read_text())["train_passes"] <= 40
    steps = [batch["step"] for batch in read_lines(trace)]
    assert steps == list(range(1, len(steps) + 1))


def test_the_slurm_script_says_how_it_is_started():
    done = subprocess.run(
        ["bash", "scripts/launch_slurm.sh", "run.yaml"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "with sbatch, so that Slurm" in done.stderr
