"""Nothing that we write is a pickle: to read one is to run what it says."""

from __future__ import annotations

import ast
import pickletools
import zipfile

import numpy as np
import pytest
import torch

import run_clm_abr
from abr_trainer.cli import classify, export, perplexity, prune, report, sft
from tests.conftest import ROOT, RUN

OF_TRAINER = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
"""What transformers writes as pickles, in checkpoints, and the first of them beside a model too."""

SHORT = ["--max_steps", "3", "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--learning_rate", "1e-3"]
SAVES = ["--save_strategy", "steps", "--save_steps", "2"]


def is_pickle(path):
    """Tell whether a file is a pickle, or has one in it: of PyTorch, or an array of Python objects."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as held:
            names = held.namelist()
            arrays = [held.read(name)[:200] for name in names if name.endswith(".npy")]
        return any(name.endswith(".pkl") for name in names) or any(b"'|O'" in array for array in arrays)
    content = path.read_bytes()
    if not content.startswith(b"\x80"):  # the protocols from 2 on; nothing writes those before unless it is asked to
        return b"'|O'" in content[:200] and content.startswith(b"\x93NUMPY")
    try:
        return any(operation.name == "STOP" for operation, *_ in pickletools.genops(content))
    except ValueError:
        return False


def pickles_in(directory):
    return {path.name for path in directory.rglob("*") if path.is_file() and is_pickle(path)}


def test_pickles_are_told_from_other_files(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "new.pt")
    torch.save({"a": 1}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    np.savez(tmp_path / "numbers.npz", np.arange(3))
    (tmp_path / "text.json").write_text("{}")
    assert pickles_in(tmp_path) == {"new.pt", "old.bin", "objects.npy", "objects.npz"}


@pytest.mark.launches
def test_no_verb_writes_a_pickle_but_those_of_trainer(tmp_path):
    rows = ["--skip_rows", "robust", "--rank_rows", "--sample_prompts", "2"]
    replay = ["--repeat_scheduler", "replay", "--repeat_scheduler_kwargs", '{"quantile": 0.0, "spacing": 1}']
    trained, classified, chats = (tmp_path / name for name in ("trained", "classified", "chats"))
    run_clm_abr.main([*RUN, *SHORT, *SAVES, *rows, *replay, "--lora_r", "2", "--output_dir", str(trained)])
    task = [
        "--model_name_or_path",
        "demo",
        "--task_name",
        "demo",
        "--do_train",
        "--do_predict",
        "--max_eval_samples",
        "8",
    ]
    classify.main([*task, *SHORT, *SAVES, "--output_dir", str(classified)])
    talk = [
        "--dataset_name",
        "demo",
        "--chat_template",
        "alpaca",
        "--do_train",
        "--do_eval",
        "--max_eval_samples",
        "4",
    ]
    sft.main([*talk, *SHORT, *SAVES, "--output_dir", str(chats)])
    prune.main(["--output_dir", str(tmp_path / "pruned")])
    export.main(["--adapter_name_or_path", str(trained), "--output_dir", str(tmp_path / "whole")])
    measured = ["--output_file", str(tmp_path / "perplexity.json"), "--use_cpu", "--max_rows", "10"]
    perplexity.main(["--dataset_name", "demo", "--token_length", "64", *measured])
    report.main([str(trained)])
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("_row_losses.npz", "_samples.jsonl", "_abr_held_0.safetensors", "report.html", "perplexity.json"):
        assert name in written, name
    assert pickles_in(tmp_path) == OF_TRAINER


def test_our_code_neither_writes_nor_reads_pickles():
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = []
    for path in [*(ROOT / "abr_trainer").rglob("*.py"), ROOT / "run_clm_abr.py"]:
        source = path.read_text(encoding="utf-8")
        if not any(word in source for word in (*unsafe, "torch.save", "torch.load")):
            continue
        for node in ast.walk(ast.parse(source)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}: {name}" for name in imported if name.split(".")[0] in unsafe]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                is_allowed = any(
                    each.arg == "allow_pickle" and ast.unparse(each.value) == "True" for each in node.keywords
                )
                if called in ("torch.save", "torch.load") or is_allowed:
                    found.append(f"{path}: {called}")
    assert not found
