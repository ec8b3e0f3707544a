"""Configurations that accelerate takes, and a Slurm job on two nodes that are played by this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file

from tests.conftest import ROOT, run_module

CONFIGURATIONS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))

SCONTROL = "#!/bin/sh\necho 127.0.0.1\necho another-node\n"
SRUN = '#!/bin/sh\nshift\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" || exit 1\nwait $first\n'


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
PUSH = ["--push_to_hub", "--hub_strategy", "end", "--hub_base_model", "demo-org/base"]
LAUNCHES = {
    **{path.stem: (path, [*PUSH, *(IN_4_BIT if "qlora" in path.stem else [])]) for path in CONFIGURATIONS},
    "ddp_4_bit": (ROOT / "configs" / "accelerate" / "ddp.yaml", IN_4_BIT),
}


def environment_of(path, monkeypatch):
    """Return the variables that `accelerate launch` gives to the processes of this configuration."""
    found = {}
    monkeypatch.setattr("torch.distributed.run.run", lambda args: found.update(os.environ))
    flags = ["--config_file", str(path), "--num_processes", "2", "--mixed_precision", "no", "script.py"]
    launch.launch_command(launch.launch_command_parser().parse_args(flags))
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


@pytest.mark.slow
def test_every_configuration_trains_to_the_perplexity_of_ddp(hub, tmp_path, monkeypatch):
    """On two CPU processes instead of eight GPUs, and in fp32; all in the same two processes, which saves minutes.

    Each pushes its adapter, once: the other rank has nothing to do with the Hub.
    """
    flags = ["--dataset_name", "demo", "--max_eval_samples", "16", "--block_size", "64", "--lora_dropout", "0"]
    flags += ["--do_train", "--do_eval", "--max_passes", "4", "--gradient_accumulation_steps", "2", "--use_cpu"]
    flags += ["--skip_outliers", "none", "--report_to", "none"]
    plans = {
        name: (environment_of(path, monkeypatch), [*flags, *more, "--output_dir", str(tmp_path / name)])
        for name, (path, more) in LAUNCHES.items()
        if "deepspeed" not in name or find_spec("deepspeed") is not None
    }
    (tmp_path / "plans.json").write_text(json.dumps(list(plans.values())))
    launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGURATIONS[0]), "--num_processes", "2"]
    launcher += ["--mixed_precision", "no", "-m", "tests.jobs", "scripts"]
    run_module(*launcher, str(tmp_path / "plans.json"), timeout=400, environment=hub.environment)
    results = {name: json.loads((tmp_path / name / "all_results.json").read_text()) for name in plans}
    for name, result in results.items():
        expected = results["ddp_4_bit" if "qlora" in name else "ddp"]
        if name != "ddp_4_bit":
            assert result["eval_perplexity"] == pytest.approx(expected["eval_perplexity"], rel=1e-5)
            assert result["train_flops"] == pytest.approx(expected["train_flops"], rel=1e-3)
        assert result["train_updates"] == 4
        engine = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[name.partition("_")[0]]
        assert (tmp_path / name / "engine").read_text() == engine
        if name != "ddp_4_bit":
            pushed = hub.repository(f"me/{name}")
            assert [commit.title for commit in pushed.commits[1:]] == ["End of training"]
            weights = (tmp_path / name / "adapter_model.safetensors").read_bytes()
            assert pushed.files("main")["adapter_model.safetensors"] == weights
    created = [request for request in hub.requests if request.path.startswith("/api/repos/create")]
    assert len(created) == 2 * (len(results) - 1), "at the start and at the end of each run"


@pytest.mark.slow
def test_a_slurm_job_is_one_run_over_its_nodes(tmp_path):
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "ABR_VENV": str(tmp_path / "none"),
        "OMP_NUM_THREADS": "1",
    }
    flags = ["--dataset_name", "demo", "--do_train", "--max_passes", "4", "--block_size", "64", "--use_cpu"]
    subprocess.run(
        ["bash", "scripts/launch_slurm.sh", *flags, "--output_dir", str(tmp_path / "a run")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=400,
        check=True,
    )
    results = json.loads((tmp_path / "a run" / "all_results.json").read_text())
    assert results["train_passes"] == 4
    assert results["train_tokens"] == 4 * 2 * 8 * 64  # passes, nodes, rows, tokens a row


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
    assert "start this with sbatch" in done.stderr
