"""What repeats are worth where a fresh batch costs more than a pass: text that comes slowly, at equal seconds.

    python benchmarks/waiting.py --data DIR --models DIR             # an hour or two, most of it asleep
    python benchmarks/waiting.py --data DIR --models DIR --quick     # a minute, into --out
    python benchmarks/waiting.py --table                             # the page, made of benchmarks/results alone

DIR of the data holds `wikitext2/wiki.{train,test}.tokens`; DIR of the models `stories260k-hf`. `--jobs` runs are made
at a time, since they mostly sleep. Each is written to benchmarks/results/waiting.json when it is finished, and the
same command goes on where it was stopped. Runs whose passes were slowed down by other work of the machine are
discarded; the same command makes them again. The page is docs/measure/waiting.md: the tables go between its marks.

Two sources, both a real HTTP server on this machine, with `datasets` streaming or requests of its own:

- "stream": a gzip-compressed JSONL file, sent at a limited rate, read by `datasets` and tokenised in a worker process.
  The source goes on while the model trains.
- "request": ranges of a JSONL file, each answered after a delay, and asked for when the batch is needed. Nothing is
  loaded while the model trains.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gzip
import http.server
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
from effectiveness import blocks_of, difference, texts_of, write_runs
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.comparison.statistics import paired, verdict
from abr_trainer.records.files import TRACE_NAME, read_lines, write_whole
from abr_trainer.records.provenance import versions_and_machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "waiting.json"
PAGE = ROOT / "docs" / "measure" / "waiting.md"
BEGIN, END = "<!-- begin: made by benchmarks/waiting.py --table -->", "<!-- end -->"

MODEL = "stories260k-hf"
BLOCK, ROWS = 64, 4
FORWARD, BACKWARD = 0.35, 0.45
"""Seconds that the parts of a pass are filled up to, so that it takes as long whatever else the machine does."""
HEAD = 64
"""Bytes that are sent at once: `gzip` takes a part of its header for no header at all."""
MOST_SLOWER = 1.15
"""A run whose passes took longer than that, by other work of the machine, is discarded: its wait is another one."""
LEARNING_RATE = 1e-3
SEEDS = (0, 1, 2, 3, 4)
WAITS = {"stream": (0, 1, 2, 4), "request": (1, 2, 4)}
CHUNK = 512
"""Bytes of JSON that `datasets` reads at once: less than a batch. By default it reads 10 MB, and waits for all."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        source: How the text comes, "stream" or "request".
        wait: Passes that a batch with one pass waits for.
        arm: "baseline", "fixed N", or "wait".
        seconds: Of training, after which the run ends.
    """

    source: str
    wait: int
    arm: str
    seconds: float
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.source, str(self.wait), self.arm.replace(" ", ""), str(self.seed)])


def arms_at(wait: int) -> list[str]:
    """Return the arms for a wait of so many passes, each once."""
    fixed = [f"fixed {repeats}" for repeats in (2, 1 + wait) if repeats > 1]
    return list(dict.fromkeys(["baseline", *fixed, "wait"]))


def cases(seconds: float, seeds: Sequence[int]) -> Iterator[Case]:
    for source, waits in WAITS.items():
        for seed in seeds:
            for wait in waits:
                for arm in arms_at(wait):
                    if source == "request" and arm not in ("baseline", "fixed 2", "wait"):
                        continue  # there, fixed 1 + wait and wait do the same
                    yield Case(source, wait, arm, seconds, seed)


# ---- The server ----


class Slow(http.server.SimpleHTTPRequestHandler):
    """Send `/rate/BYTES_PER_SECOND/NAME/file` slowly, and parts of `/delay/SECONDS/NAME/file` late.

    Once it is asked for `/release/0/NAME/file`, it sends the rest of what goes by that name at once.
    """

    protocol_version = "HTTP/1.1"
    released: ClassVar[set[str]] = set()

    def do_HEAD(self) -> None:
        self._begin(self._file().stat().st_size)

    def do_GET(self) -> None:
        kind, value, name, _ = self.path.strip("/").split("/")
        content = self._file().read_bytes()
        if kind == "delay":
            start, _, stop = self.headers["Range"].removeprefix("bytes=").partition("-")
            time.sleep(float(value))
            part = content[int(start) : int(stop) + 1]
            self._begin(len(part), status=206)
            self.wfile.write(part)
            return
        self._begin(len(content))
        started, sent = time.monotonic(), 0
        if kind == "release":
            self.released.add(name)
        while sent < len(content):
            is_fast = value == "inf" or name in self.released
            due = len(content) if is_fast else HEAD + int(float(value) * (time.monotonic() - started))
            if due > sent:
                self.wfile.write(content[sent:due])
                self.wfile.flush()
                sent = min(due, len(content))
            time.sleep(0.01)

    def _file(self) -> Path:
        return Path(self.directory, Path(self.path).name)

    def _begin(self, length: int, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "none")  # so that it is read as a stream, not in blocks of 5 MB
        self.end_headers()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the reader has gone: its run has ended
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


def serve(directory: str, port: Any) -> None:
    """Be the server, until this process is ended."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, directory=directory))
    server.daemon_threads = True
    port.send(server.server_port)
    server.serve_forever()


# ---- The data ----


class Source(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Blocks of tokens from lines of text that come over HTTP."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def lines(self) -> Iterator[str]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        ids: list[int] = []
        for line in self.lines():
            ids += self.tokenizer(line, add_special_tokens=False)["input_ids"]
            while len(ids) >= BLOCK:
                block, ids = torch.tensor(ids[:BLOCK]), ids[BLOCK:]
                yield {"input_ids": block, "labels": block}


class Streamed(Source):
    def __init__(self, tokenizer: Any, url: str) -> None:
        super().__init__(tokenizer)
        self.url = url

    def lines(self) -> Iterator[str]:
        rows = datasets.load_dataset("json", data_files=self.url, split="train", streaming=True, chunksize=CHUNK)
        for row in rows:
            yield row["text"]


class Requested(Source):
    def __init__(self, tokenizer: Any, url: str, size: int, total: int) -> None:
        super().__init__(tokenizer)
        self.url, self.size, self.total = url, size, total

    def lines(self) -> Iterator[str]:
        rest = b""
        for start in range(0, self.total, self.size):
            request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{start + self.size - 1}"})
            with urllib.request.urlopen(request) as answer:
                *whole, rest = (rest + answer.read()).split(b"\n")
            for line in whole:
                yield json.loads(line)["text"]


class Corpus:
    """WikiText-2, its files for the server, and the size of a batch in them."""

    def __init__(self, data: Path, models: Path, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(models / MODEL, model_max_length=10**9)
        self.model = AutoModelForCausalLM.from_pretrained(models / MODEL, dtype=torch.float32)
        self.directory = directory
        blocks = blocks_of(texts_of("wikitext2", "test", data), self.tokenizer, BLOCK)
        self.test = torch.tensor(random.Random(0).sample(blocks, 192))
        self._lines = [line for line in texts_of("wikitext2", "train", data) if line.strip()]

    @functools.cache  # noqa: B019  # one corpus lives as long as the process
    def files(self, seed: int) -> tuple[Path, Path, float, float]:
        """Write the lines in the order of a seed, compressed and not; return both files and their bytes a batch."""
        lines = random.Random(seed).sample(self._lines, 6000)
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        whole, packed = self.directory / f"train-{seed}.jsonl", self.directory / f"train-{seed}.jsonl.gz"
        whole.write_text(text)
        packed.write_bytes(gzip.compress(text.encode()))
        batches = len(blocks_of(lines, self.tokenizer, BLOCK)) / ROWS
        return whole, packed, whole.stat().st_size / batches, packed.stat().st_size / batches

    def source(self, case: Case, port: int, one_pass: float) -> Source:
        whole, packed, of_whole, of_packed = self.files(case.seed)
        if case.source == "request":
            url = f"http://127.0.0.1:{port}/delay/{case.wait * one_pass:.4f}/{case.name}/{whole.name}"
            return Requested(self.tokenizer, url, round(of_whole), whole.stat().st_size)
        rate = of_packed / ((1 + case.wait) * one_pass) if case.wait else math.inf
        return Streamed(self.tokenizer, f"http://127.0.0.1:{port}/rate/{rate:.1f}/{case.name}/{packed.name}")


# ---- Runs ----


class EndsAfter(TrainerCallback):
    """End training when so many seconds are on the ledger, those of the first batch not counted.

    Args:
        release: What to ask the server for, so that a worker which waits for it can end too.

    Attributes:
        spent: Share of the seconds that is spent.
    """

    def __init__(self, seconds: float, release: str) -> None:
        self.seconds = seconds
        self.release = release
        self.spent = 0.0
        self._first: float | None = None

    def on_outcome(self, args: Any, state: Any, control: Any, ledger: Any, **kwargs: Any) -> None:
        self._first = ledger.seconds if self._first is None else self._first
        self.spent = min(1.0, (ledger.seconds - self._first) / self.seconds)
        if self.spent >= 1:
            control.should_training_stop = True
            if self.release:
                urllib.request.urlopen(self.release).read()


class PacedTrainer(ABRTrainer):
    """Passes that take `FORWARD + BACKWARD` seconds, and a little for the update."""

    _forward_began = _forward_ended = 0.0

    def pace(self, model: Any) -> list[Any]:
        """Return the handles of what fills up the forwards of a model."""

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            self._fill(self._forward_ended + BACKWARD)  # of the pass before
            self._forward_began = time.perf_counter()

        def end(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self._fill(self._forward_began + FORWARD)
            self._forward_ended = time.perf_counter()

        before = model.register_forward_pre_hook(begin, with_kwargs=True)
        return [before, model.register_forward_hook(end, with_kwargs=True)]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._fill(self._forward_ended + BACKWARD)
        return loss

    def _fill(self, until: float) -> None:
        time.sleep(max(0.0, until - time.perf_counter()))


def train(case: Case, data: Any, corpus: Corpus, directory: str, release: str = "", **options: Any) -> Any:
    """Train until the seconds are spent, with a learning rate that falls linearly over them."""
    set_seed(case.seed)
    model = copy.deepcopy(corpus.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    clock = EndsAfter(case.seconds, release)
    name, _, repeats = case.arm.partition(" ")
    config = ABRConfig(
        output_dir=directory,
        per_device_train_batch_size=ROWS,
        dataloader_num_workers=1 if case.source == "stream" else 0,
        repeat_scheduler=name,
        max_repeats=int(repeats) if repeats else None,
        skip_outliers="none",
        seed=case.seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"max_steps": 100_000, **options},
    )
    trainer = PacedTrainer(
        model=model,
        args=config,
        train_dataset=data,
        callbacks=[clock],
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1 - clock.spent)),
    )
    handles = trainer.pace(model)
    trainer.train()
    for handle in handles:
        handle.remove()
    return trainer


def measure_pass(corpus: Corpus) -> float:
    """Return the median seconds of a pass over data that are there."""
    rows = [{"input_ids": block, "labels": block} for block in corpus.test] * 10
    with tempfile.TemporaryDirectory() as directory:
        case = Case("request", 0, "wait", math.inf, 0)
        train(case, rows, corpus, directory, max_steps=15)
        return statistics.median(line["pass_seconds"] for line in list(read_lines(Path(directory, TRACE_NAME)))[5:])


def run(case: Case, corpus: Corpus, port: int, one_pass: float) -> dict[str, Any]:
    """Train once, and return what it cost and how good the model is."""
    with tempfile.TemporaryDirectory() as directory:
        data = corpus.source(case, port, one_pass)
        release = f"http://127.0.0.1:{port}/release/0/{case.name}/{corpus.files(case.seed)[1].name}"
        trainer = train(case, data, corpus, directory, release if case.source == "stream" else "")
        trace = list(read_lines(Path(directory, TRACE_NAME)))
    passes = sum(len(line["losses"]) for line in trace[1:])
    spent, waited = (sum(line[name] for line in trace[1:]) for name in ("seconds", "waiting_seconds"))
    return asdict(case) | {
        "nll": score(trainer.model, corpus.test),
        "batches": trainer.ledger.batches,
        "updates": trainer.ledger.updates,
        "spent": round(spent, 2),
        "waited": round(waited, 2),
        "pass_seconds": round((spent - waited) / passes, 4),
        "repeats": [line["repeats"] for line in trace],
        "load": round(os.getloadavg()[0], 1),
    }


def several(cases: Sequence[Case], jobs: int, corpus: Corpus, port: int, one_pass: float) -> Iterator[dict[str, Any]]:
    """Make so many runs at a time, each in a process of its own, and yield what they return."""
    forked = multiprocessing.get_context("fork")
    left, working = list(cases), {}
    while left or working:
        while left and len(working) < jobs:
            receiver, sender = forked.Pipe(duplex=False)
            process = forked.Process(target=_send_run, args=(sender, left.pop(0), corpus, port, one_pass))
            process.start()
            sender.close()
            working[receiver] = process
        for receiver in multiprocessing.connection.wait(list(working)):
            with contextlib.suppress(EOFError):  # a run that has failed has said so; the same command makes it again
                yield receiver.recv()
            working.pop(receiver).join()


def _send_run(sender: Any, *arguments: Any) -> None:
    sender.send(run(*arguments))


@torch.no_grad()
def score(model: Any, blocks: torch.Tensor) -> float:
    """Return the nll per token."""
    model.eval()
    return statistics.fmean(float(model(input_ids=part, labels=part).loss) for part in blocks.split(32))


# ---- The page ----


def key_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("source", "wait", "arm", "seconds", "seed"))


def table(runs: Sequence[Mapping[str, Any]], source: str) -> list[str]:
    """Return a line for each arm at each wait."""
    lines = [
        "| wait, in passes | arm | batches | updates | updates a batch | waiting | perplexity | beside baseline | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for wait in WAITS[source]:
        at = [entry for entry in runs if (entry["source"], entry["wait"]) == (source, wait)]
        arms = {arm: {entry["seed"]: entry for entry in at if entry["arm"] == arm} for arm in arms_at(wait)}
        for arm, found in arms.items():
            if not found:
                continue
            entries = list(found.values())
            mean = functools.partial(lambda name, of: statistics.fmean(entry[name] for entry in of), of=entries)
            against, said = "", ""
            if arm != "baseline" and (seeds := sorted(found.keys() & arms["baseline"].keys())):
                by_seed = paired([found[seed]["nll"] - arms["baseline"][seed]["nll"] for seed in seeds])
                one = f"{by_seed['mean']:+.4f}, {100 * math.expm1(by_seed['mean']):+.1f} % (one seed)"
                against = one if len(seeds) == 1 else difference(by_seed)
                said = verdict(by_seed, len(seeds))
            cells = [
                f"{wait}",
                arm,
                f"{mean('batches'):.0f}",
                f"{mean('updates'):.0f}",
                f"{mean('updates') / mean('batches'):.2f}",
                f"{mean('waited') / mean('spent'):.0%}",
                f"{math.exp(mean('nll')):.2f}",
                against,
                said,
            ]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return lines


def tables(results: Mapping[str, Any]) -> str:
    """Return the part of the page that is made of the results."""
    runs = results["runs"]
    lines = [f"{len(runs)} runs of {results['seconds']:g} s, up to {len({entry['seed'] for entry in runs})} seeds."]
    slowest = max((entry["pass_seconds"] for entry in runs), default=math.nan)
    lines += [f"A pass takes {results['pass_seconds']:.2f} s; in the slowest run it took {slowest:.2f} s."]
    loads = [entry["load"] for entry in runs]
    lines += [f"Load of the machine: {min(loads)} to {max(loads)}, on {results['cores']} cores.", ""]
    titles = {"stream": "The source goes on while the model trains", "request": "The source waits for a request"}
    for source, title in titles.items():
        if any(entry["source"] == source for entry in runs):
            lines += [f"### {title}", "", *table(runs, source), ""]
    return "\n".join(lines)


def page(results: Mapping[str, Any]) -> str:
    """Return the page with its tables made anew."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{head}{BEGIN}\n\n{tables(results)}\n{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the corpora")
    parser.add_argument("--models", type=Path, help="directory of the models")
    parser.add_argument("--out", type=Path, default=Path("runs/waiting"), help="where --quick writes")
    parser.add_argument("--quick", action="store_true", help="few short runs, into --out instead of the results")
    parser.add_argument("--seconds", type=float, default=80, help="of training in a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="run these only")
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time; they mostly sleep")
    parser.add_argument("--most", type=int, help="stop after so many runs")
    parser.add_argument("--table", action="store_true", help="write the tables of the page anew, and run nothing")
    args = parser.parse_args(argv)
    path = args.out / "waiting.json" if args.quick else RESULTS
    results: dict[str, Any] = {"runs": []}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    if args.table:
        write_whole(PAGE, page(results))
        return results
    if args.data is None or args.models is None:
        parser.error("--data and --models say where corpora and models are")
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    results |= versions_and_machine("cpu", threads=1, processes=1)
    results |= {"seconds": 4.0 if args.quick else args.seconds, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as directory:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.get_context("fork").Process(target=serve, args=(directory, sender), daemon=True)
        server.start()
        port = receiver.recv()
        corpus = Corpus(args.data, args.models, Path(directory))
        results["pass_seconds"] = results.get("pass_seconds") or round(measure_pass(corpus), 4)
        done = {key_of(entry) for entry in results["runs"]}
        wanted = list(cases(results["seconds"], args.seeds[:1] if args.quick else args.seeds))
        left = [case for case in wanted if key_of(asdict(case)) not in done][: args.most]
        for seed in {case.seed for case in left}:
            corpus.files(seed)
        for number, entry in enumerate(several(left, args.jobs, corpus, port, results["pass_seconds"]), start=1):
            if is_valid := entry["pass_seconds"] <= MOST_SLOWER * results["pass_seconds"]:
                results["runs"].append(entry)
                write_runs(results, path)
            print(f"{number}/{len(left)}", "kept" if is_valid else "discarded", json.dumps(entry), flush=True)
        server.terminate()
    if not args.quick:
        write_whole(PAGE, page(results))
    return results


if __name__ == "__main__":
    main()
