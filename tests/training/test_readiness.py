"""What a run needs later is checked before its first batch, and a full disk is one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

import run_clm_abr
from abr_trainer.records.files import last_complete_checkpoint
from abr_trainer.training.readiness import check_disk, is_full, mend_generation_config, telling_of_a_failing_disk
from tests.conftest import RUN, tiny_llama

pytestmark = pytest.mark.slow

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """The demo model with a generation config that transformers does not save: LLaMA-2's was so."""
    from abr_trainer.data.demo import DEMO_MODEL

    directory = tmp_path_factory.mktemp("model") / "samples"
    shutil.copytree(DEMO_MODEL, directory)
    config = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "max_length": 77}
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def test_a_model_whose_generation_config_upstream_refuses_is_trained_whole_and_saved(samples, tmp_path, caplog):
    flags = ["--model_name_or_path", str(samples), "--use_lora", "false", "--max_steps", "2", "--save_steps", "1"]
    run_clm_abr.run([*RUN, *flags, "--output_dir", str(tmp_path / "run")])
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert saved["max_length"] == 77, "what is not refused stays"
    assert not {"temperature", "top_p"} & {name for name, value in saved.items() if value is not None}
    assert "will be saved without temperature 0.6, top_p 0.9, which the model ignores" in caplog.text


@pytest.mark.parametrize(
    ("options", "unset"),
    [
        ({"temperature": 0.6, "top_k": 20}, "temperature 0.6, top_k 20"),
        ({"early_stopping": True, "length_penalty": 2.0}, "early_stopping True, length_penalty 2.0"),
        ({"output_scores": True}, "output_scores True"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
    ],
)
def test_what_generation_ignores_is_unset_with_a_line(tmp_path, caplog, options, unset):
    model = tiny_llama()
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="is invalid"):
        model.save_pretrained(tmp_path / "before")
    mend_generation_config(model)
    assert f"will be saved without {unset}, which" in caplog.text
    model.save_pretrained(tmp_path / "after")
    LlamaForCausalLM.from_pretrained(tmp_path / "after")


def test_a_generation_config_that_can_be_saved_is_left_alone(caplog):
    model = tiny_llama()
    model.generation_config.update(do_sample=True, temperature=0.6, num_beams=3, length_penalty=2.0)
    before = model.generation_config.to_dict()
    mend_generation_config(model)
    assert model.generation_config.to_dict() == before
    assert not caplog.records


def test_a_generation_config_that_contradicts_itself_is_refused():
    model = tiny_llama()
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match=r"could not be saved: Greedy methods .* Mend its generation_config.json"):
        mend_generation_config(model)


def with_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))


def test_a_disk_that_holds_no_checkpoint_is_refused_before_the_first_batch(build, monkeypatch, caplog):
    model = tiny_llama()
    weights = sum(each.numel() * 4 for each in model.parameters())
    args = build(save_strategy="steps").args
    with_free(monkeypatch, 3 * weights - 1)  # with two moments of AdamW for each weight
    with pytest.raises(ValueError, match=r"--output_dir .* has 0.000 GB free, and a checkpoint takes at least"):
        check_disk(args, model)
    with_free(monkeypatch, 3 * weights)
    check_disk(args, model)
    assert "It may get full; --save_total_limit 1 keeps the last one only." in caplog.text
    caplog.clear()
    with_free(monkeypatch, 7 * weights)
    check_disk(args, model)
    assert not caplog.records
    with_free(monkeypatch, weights)
    check_disk(build(save_strategy="no").args, model)
    with pytest.raises(ValueError, match="and a checkpoint takes at least"):
        check_disk(build(save_strategy="no", save_passes=3).args, model)
    check_disk(build(save_strategy="steps", save_only_model=True).args, model)


def test_the_script_checks_the_disk(tmp_path, monkeypatch):
    with_free(monkeypatch, 100)
    with pytest.raises(SystemExit, match="error: --output_dir .*run: its disk has 0.000 GB free") as caught:
        run_clm_abr.run([*RUN, "--output_dir", str(tmp_path / "run")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_file_of_the_run_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    output = tmp_path / "run"
    run_clm_abr.run([*RUN, "--max_steps", "2", "--save_steps", "1", "--output_dir", str(output)])
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "run.json" and may(path, mode))
    with pytest.raises(SystemExit, match="run: run.json cannot be written to. Change its permissions."):
        run_clm_abr.run([*RUN, "--resume_from_checkpoint", "true", "--output_dir", str(output)])


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_disk_that_gets_full_is_one_line_and_costs_one_checkpoint(tmp_path, monkeypatch, name):
    output, save = tmp_path / "run", torch.save

    def is_full_at_the_second(what, path, *args, **kwargs):
        save(what, path, *args, **kwargs)
        if str(path).endswith(f"checkpoint-4/{name}"):
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    flags = [*RUN, "--max_steps", "6", "--save_steps", "2", "--output_dir", str(output)]
    whole = run_clm_abr.run([*flags[:-1], str(tmp_path / "whole")])
    monkeypatch.setattr(torch, "save", is_full_at_the_second)
    with pytest.raises(SystemExit, match="is full. checkpoint-4, cut off, is removed.") as caught:
        run_clm_abr.run(flags)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"--resume_from_checkpoint true goes on from {output / 'checkpoint-2'}.")
    assert last_complete_checkpoint(output) == str(output / "checkpoint-2")
    monkeypatch.setattr(torch, "save", save)
    resumed = run_clm_abr.run([*flags, "--resume_from_checkpoint", "true"])
    assert resumed["eval_perplexity"] == whole["eval_perplexity"]


def test_a_disk_that_gets_full_costs_no_checkpoint_that_was_saved_without_its_optimizer(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0)
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(b"whole")
        (checkpoint / "trainer_state.json").write_text(f'{{"global_step": {step}}}')

    def save_until_the_disk_is_full():
        (tmp_path / "checkpoint-6").mkdir()
        os.utime(tmp_path / "checkpoint-6", (time.time() + 1,) * 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(SystemExit, match="is full. checkpoint-6, cut off, is removed."),
        telling_of_a_failing_disk(args),
    ):
        save_until_the_disk_is_full()
    with (
        pytest.raises(SystemExit, match="error: the disk of /cache/model is full."),
        telling_of_a_failing_disk(args),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/model")
    with pytest.raises(SystemExit, match="is full. Free some"), telling_of_a_failing_disk(args):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda run: OSError(errno.EROFS, "Read-only file system", f"{run}/a"), "Read-only file system"),
        (lambda run: OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (lambda run: PermissionError(errno.EACCES, "Permission denied", f"{run}/a"), "Permission denied"),
        (lambda run: SafetensorError("I/O error: Read-only file system (os error 30)"), "Read-only file system"),
        (lambda run: RuntimeError(f"File {run}/optimizer.pt cannot be opened."), "File .* cannot be opened"),
        (lambda run: RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), "Pytorch.*"),
    ],
)
def test_a_disk_that_fails_is_one_line(tmp_path, error, said):
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0)
    with (
        pytest.raises(SystemExit, match=f"^error: {tmp_path} cannot be written to: {said}.* Mend that; start again.$"),
        telling_of_a_failing_disk(args),
    ):
        raise error(tmp_path)


def test_an_error_of_another_file_is_not_one_of_the_output_directory(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), process_index=0)
    with pytest.raises(PermissionError), telling_of_a_failing_disk(args):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl")
    with pytest.raises(RuntimeError, match="File /data/model.pt cannot"), telling_of_a_failing_disk(args):
        raise RuntimeError("File /data/model.pt cannot be opened.")


def test_each_library_says_in_its_own_words_that_the_disk_is_full(tmp_path, monkeypatch):
    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path)
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path)
    of_torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1018752 vs 1018644")
    assert not is_full(of_torch, tmp_path), "there is space: it is something else"
    with_free(monkeypatch, 0)
    assert is_full(of_torch, tmp_path)
    assert not is_full(OSError(errno.EACCES, "Permission denied"), tmp_path)


def test_a_run_that_had_ended_keeps_what_it_has_reached(tmp_path, caplog):
    flags = [*RUN, "--max_steps", "2", "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    finished = run_clm_abr.run(flags)
    for name in ("all_results.json", "run.json"):  # as a kill, or a broken disk, leaves them
        (tmp_path / "run" / name).write_text("{")
    again = run_clm_abr.run([*flags, "--resume_from_checkpoint", "true"])
    assert "--max_steps 2 is reached. Nothing is trained" in caplog.text
    times = ("runtime", "per_second")
    assert {k: v for k, v in again.items() if not k.endswith(times)} == {
        k: v for k, v in finished.items() if not k.endswith(times)
    }
