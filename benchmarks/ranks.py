"""What ranks do when one of them gets into trouble: they agree, or all of them end with one message.

    python benchmarks/ranks.py                   # on 2, 4 and 8 ranks; half an hour on two cores
    python benchmarks/ranks.py --quick --out DIR # on 2 ranks, with short waits

Each trial trains a tiny model over gloo. The ranks are forked from this process, which has imported everything. In
each trial something befalls one rank, drawn by `--seed`: losses that are not finite or huge, a wait, a data set
without rows or without targets, an exception, a sudden end. A trial holds if

- no rank works on for longer than the time-out of the group and what ending takes;
- either all ranks succeed, with the same weights, log and decisions; or none does, each ends with the message of the
  one that failed, and with a status other than 0.

Each trial is written to benchmarks/results/ranks.json when it is finished; the same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from effectiveness import write_runs
from forked import fork, ranks_at
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
from transformers.data.data_collator import default_data_collator

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.records.files import read_lines
from abr_trainer.records.provenance import versions_and_machine
from abr_trainer.training.failing import LOST, ending_together

RESULTS = Path(__file__).resolve().parent / "results" / "ranks.json"

VOCABULARY = 64
LENGTH = 12
MARK = VOCABULARY - 1
"""The first token of the rows that befall a rank; no other row has it."""


@dataclass(frozen=True)
class Trial:
    """Something that befalls one rank.

    Attributes:
        ends: Whether all ranks must fail.
        says: What each of them must say then, in part.
        loss: What a marked row makes of its loss.
        act: What the rank does at its third batch.
        data: What its training set is instead.
        options: Of the run.
        time_out: Of the group, in seconds.
    """

    name: str
    ends: bool = False
    says: str = ""
    loss: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_lasting: bool = False
    act: Callable[[], None] | None = None
    data: str = "rows"
    options: dict[str, Any] | None = None
    time_out: float = 60.0


def fails() -> None:
    raise ValueError("row 17 of train.jsonl has no text")


def has_a_bug() -> None:
    raise KeyError("labels")


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaves() -> None:
    sys.exit(3)


def runs_out_of_memory() -> None:
    raise torch.OutOfMemoryError("Tried to allocate 20 GiB")


def trials(wait: float) -> list[Trial]:
    """Return all trials; a slow rank waits for so many seconds."""
    broken: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda loss: loss * float("nan"),
        "inf": lambda loss: loss + float("inf"),
        "-inf": lambda loss: loss - float("inf"),
        "huge": lambda loss: loss * 1e30,
    }
    rows = {"skip_rows": "robust"}
    return [
        *(Trial(f"{name}, now and then", loss=change) for name, change in broken.items()),
        *(Trial(f"{name}, now and then, rows judged", loss=broken[name], options=rows) for name in ("NaN", "huge")),
        Trial("NaN, lasting", ends=True, says="batches in a row were skipped", loss=broken["NaN"], is_lasting=True),
        Trial("slow", act=functools.partial(time.sleep, wait)),
        Trial("slow beyond the time-out", True, LOST, act=functools.partial(time.sleep, 2 * wait), time_out=wait / 2),
        Trial("without targets", data="without targets"),
        Trial("without rows", True, "ended after 0 micro-batches on rank", data="without rows"),
        Trial("a shorter stream", data="a shorter stream"),
        Trial("a shorter set", True, "must be as many on each", data="a shorter set"),
        Trial("fails", True, "row 17 of train.jsonl has no text", act=fails),
        Trial("has a bug", True, "KeyError: 'labels'", act=has_a_bug),
        Trial("out of memory", True, "Tried to allocate 20 GiB", act=runs_out_of_memory),
        Trial("leaves", True, "3", act=leaves),
        Trial("is killed", True, LOST, act=is_killed),
    ]


class Rows(Dataset):  # type: ignore[type-arg]
    """Rows that are the same on all ranks, and of which each rank gets its share."""

    def __init__(self, count: int, marks: range, is_without_targets: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, MARK, (count, LENGTH), generator=generator)
        self.ids[list(marks), 0] = MARK
        self.labels = self.ids.clone()
        if is_without_targets:
            self.labels[list(marks)] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Stream(IterableDataset):  # type: ignore[type-arg]
    """So many rows of a data set."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.rows, self.count = rows, count

    def __iter__(self) -> Any:
        return (self.rows[index] for index in range(self.count))


class OwnLoader(ABRTrainer):
    """A trainer whose ranks bring their own loaders, as some do."""

    loader: Any = None

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader() if self.loader is None else self.loader


class Befalls(TrainerCallback):
    """Let something befall the rank when its third batch begins."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.act()


class Changed(LlamaForCausalLM):
    """A model that changes the loss of micro-batches with a marked row, or the logits of these rows alone."""

    change: Any = None
    changes_rows = False

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        marked = (input_ids[:, 0] == MARK) & self.training & (self.change is not None)
        with contextlib.ExitStack() as hooked:
            if self.changes_rows and marked.any():

                def changed(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
                    return torch.where(marked[:, None, None], self.change(logits), logits)

                hooked.callback(self.lm_head.register_forward_hook(changed).remove)
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if marked.any() and not self.changes_rows:
            output.loss = self.change(output.loss)
        return output


def train(trial: Trial, victim: int, directory: Path) -> dict[str, Any]:
    """Be a rank of a trial; return what all ranks must agree on."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    args = ABRConfig(
        output_dir=str(directory / "run"),
        per_device_train_batch_size=2,
        max_steps=24 if trial.is_lasting else 8,
        repeat_scheduler="fixed",
        max_repeats=2,
        learning_rate=1e-3,
        logging_steps=2,
        save_strategy="no",
        train_sampling_strategy="sequential",
        ddp_timeout=max(1, round(trial.time_out)),
        ddp_find_unused_parameters=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **(trial.options or {}),
    )
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Changed(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    model.change, model.changes_rows = trial.loss, bool(trial.options)
    whole = 2 * ranks * args.max_steps
    of_batch = 2 * ranks  # accelerate gives rank r the micro-batches r, r + ranks, ...
    marks = range(
        victim * 2 if trial.is_lasting else of_batch + victim * 2, whole, of_batch * (1 if trial.is_lasting else 3)
    )
    rows = Rows(whole, marks, trial.data == "without targets")
    trainer = OwnLoader(
        model=model,
        args=args,
        train_dataset=rows,
        callbacks=[Befalls(trial.act)] if trial.act and rank == victim else None,
    )
    count = {"without rows": 0, "a shorter stream": 6, "a shorter set": 8}.get(trial.data)
    if count is not None:
        own: Any = Stream(rows, count if rank == victim else 10)
        loader = torch.utils.data.DataLoader(own, batch_size=2, collate_fn=default_data_collator)
        if trial.data == "a shorter set":
            part = torch.utils.data.Subset(rows, range(count if rank == victim else 10))
            loader = torch.utils.data.DataLoader(part, batch_size=2, collate_fn=default_data_collator)
            args.max_steps = -1
            args.num_train_epochs = 1
        trainer.loader = loader
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert weights.isfinite().all(), "the weights are not finite"
    return {
        "weights": torch.hash_tensor(weights).item()
        if hasattr(torch, "hash_tensor")
        else weights.double().sum().item(),
        "steps": trainer.state.global_step,
        "passes": float(trainer.ledger.passes),
        "skips": trainer.ledger.skips,
        "updates": trainer.ledger.updates,
        "losses": [logs["loss"] for logs in trainer.state.log_history if "loss" in logs],
    }


def be_rank(rank: int, trial: Trial, victim: int, directory: Path) -> None:
    """Be a process of a trial, as one that torchrun has started."""
    with ending_together():  # as `abr train` does
        numbers = train(trial, victim, directory)
    Path(directory, f"rank-{rank}.json").write_text(json.dumps(numbers))
    torch.distributed.barrier()


def befall(trial: Trial, ranks: int, victim: int, directory: Path) -> dict[str, Any]:
    """Make a trial, and return what has become of it; `fault` says what does not hold."""
    directory.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start, running, ended = time.monotonic(), {}, {}
    for rank, place in enumerate(ranks_at(port, ranks)):
        work = functools.partial(be_rank, rank, trial, victim, directory)
        running[fork(work, directory / f"said-{rank}.txt", place)] = rank
    slept = trial.act.args[0] if isinstance(trial.act, functools.partial) else 0.0
    limit = trial.time_out + slept + 30 + 5 * ranks  # to start, to train, and to end
    hung: list[int] = []
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            ended[running.pop(pid)] = (os.waitstatus_to_exitcode(status), round(time.monotonic() - start, 1))
        elif time.monotonic() - start > limit and not hung:
            hung = sorted(running.values())
            for each in running:
                os.kill(each, signal.SIGKILL)
        else:
            time.sleep(0.02)
    statuses = [ended[rank][0] for rank in range(ranks)]
    said = [Path(directory, f"said-{rank}.txt").read_text(errors="replace").strip() for rank in range(ranks)]
    return {
        "trial": trial.name,
        "ranks": ranks,
        "victim": victim,
        "statuses": statuses,
        "seconds": max(seconds for _, seconds in ended.values()),
        "apart": round(max(seconds for _, seconds in ended.values()) - min(s for _, s in ended.values()), 1),
        "fault": f"ranks {hung} hang" if hung else _fault(trial, victim, statuses, said, directory),
        "said": sorted({each.splitlines()[-1] for each in said if each}) if any(statuses) else [],
    }


def victim_of(seed: str, ranks: int) -> int:
    """Draw a rank: as often the first one, which keeps the store of the group, as one of the others."""
    draw = random.Random(seed)
    return draw.choice([0, draw.randrange(1, ranks)])


def _fault(trial: Trial, victim: int, statuses: list[int], said: list[str], directory: Path) -> str:
    """Return what does not hold of a trial in which no rank hung; nothing if all does."""
    if not trial.ends:
        if any(statuses):
            return f"it failed: {[each[-300:] for each in said]}"
        numbers = [json.loads(Path(directory, f"rank-{rank}.json").read_text()) for rank in range(len(statuses))]
        if any(each != numbers[0] for each in numbers):
            return f"ranks differ: {numbers}"
        batches = list(read_lines(directory / "run" / "abr_trace.jsonl"))
        return "" if len(batches) == numbers[0]["steps"] else f"the trace has {len(batches)} batches"
    if 0 in statuses:
        return f"some ranks ended with status 0: {statuses}"
    silent = victim if statuses[victim] == -signal.SIGKILL or trial.name.startswith("slow") else None
    unlike = [rank for rank, each in enumerate(said) if rank != silent and trial.says not in each]
    return f"ranks {unlike} say something else: {[said[rank][-300:] for rank in unlike]}" if unlike else ""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="on 2 ranks, waiting for 3 seconds instead of 30")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the results instead")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--wait", type=float, default=30.0, help="seconds for which a slow rank waits")
    parser.add_argument("--only", nargs="*", default=None, help="names of trials")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick needs --out: it must not replace the results")
    counts, wait = ([2], 3.0) if args.quick else (args.ranks, args.wait)
    path = RESULTS if args.out is None else args.out / "ranks.json"
    results = (
        json.loads(path.read_text())
        if path.exists()
        else {**versions_and_machine("cpu", 1, max(counts)), "seed": args.seed, "runs": []}
    )
    plan = [
        (trial, ranks, victim_of(f"{args.seed}, {trial.name}, {ranks}", ranks))
        for ranks in counts
        for trial in trials(wait)
    ]
    torch.set_num_threads(1)
    for trial, ranks, victim in plan:
        is_done = any((run["trial"], run["ranks"]) == (trial.name, ranks) for run in results["runs"])
        if is_done or (args.only is not None and trial.name not in args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = befall(trial, ranks, victim, Path(folder) / "trial")
        results["runs"].append(found)
        write_runs(results, path)
        print(json.dumps(found), flush=True)
    return results["runs"]


if __name__ == "__main__":
    main()
