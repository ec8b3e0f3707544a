"""How fast a perplexity is measured, beside the loops that people paste: same model, same text, same number.

    python benchmarks/perplexity.py --model DIR --text FILE --token_length 256 --stride 128

Each pair takes turns; the median of the ratios of their times, with quartiles. Numbers go to
benchmarks/results/perplexity.json. The loops are written after what they are named for: the documentation of
transformers ("Perplexity of fixed-length models") takes one window at a time and all of its logits, the metric
`perplexity` of the package evaluate sixteen padded texts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abr_trainer.models.devices import provenance_of
from abr_trainer.perplexity.definitions import DEFINITIONS, Text
from abr_trainer.perplexity.measurement import cut_windows, numbers_of
from abr_trainer.perplexity.windows import window_nlls
from abr_trainer.records.files import write_whole

RESULTS = Path(__file__).parent / "results" / "perplexity.json"


def ours(name: str, text: Text, model: Any, length: int, stride: int, batch_size: int) -> float:
    definition = DEFINITIONS[name]
    windows = cut_windows(definition, text, length, stride, None, "the text")
    return numbers_of(definition, text, windows, window_nlls(model, windows, batch_size))[0]["perplexity"]


@torch.no_grad()
def loop_of_the_documentation(text: Text, model: Any, length: int, stride: int) -> float:
    ids = torch.as_tensor(text.joined("\n\n"), device=model.device)[None]
    size, before, total, count = ids.shape[1], 0, 0.0, 0
    for begin in range(0, size, stride):
        end = min(begin + length, size)
        labels = ids[:, begin:end].clone()
        labels[:, : before - end] = -100
        loss = model(ids[:, begin:end], labels=labels).loss
        weight = int((labels != -100).sum()) - 1
        if weight:
            total, count = total + loss.item() * weight, count + weight
        before = end
        if end == size:
            break
    return math.exp(total / count)


@torch.no_grad()
def metric_of_evaluate(text: Text, model: Any, length: int, batch_size: int = 16) -> float:
    rows = [row for row in text.rows if row.strip()]
    begun = [[text.prefix, *text.tokens_of(row)[: length - 1]] for row in rows]
    found: list[float] = []
    for start in range(0, len(begun), batch_size):
        batch = begun[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=model.device)
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        found += torch.exp(nll.sum(1) / mask[:, 1:].sum(1)).tolist()
    return statistics.fmean(found)


def timed(function: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    number = function()
    return number, time.perf_counter() - start


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--token_length", type=int, default=256)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1500, help="lines of the text")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
    lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)[: args.rows]
    text = Text(lines, rows_are_lines=True, tokenizer=AutoTokenizer.from_pretrained(args.model))
    length, strides = args.token_length, (args.token_length, args.stride)
    pairs = [
        ("hf-stride", stride, lambda stride=stride: loop_of_the_documentation(text, model, length, stride))
        for stride in strides
    ]
    pairs.append(("evaluate", length, lambda: metric_of_evaluate(text, model, length)))
    found = []
    for name, stride, theirs in pairs:
        ratios = []
        for _ in range(args.pairs):
            number, seconds = timed(
                lambda name=name, stride=stride: ours(name, text, model, length, stride, args.batch_size)
            )
            reference, reference_seconds = timed(theirs)
            ratios.append(reference_seconds / seconds)
        low, middle, high = statistics.quantiles(ratios, n=4)
        found.append(
            {
                "definition": name,
                "token_length": length,
                "stride": stride,
                "perplexity": number,
                "reference": reference,
                "times_faster": middle,
                "quartiles": [low, high],
            }
        )
        faster = f"{middle:.2f} times faster ({low:.2f} to {high:.2f})"
        print(f"{name}, stride {stride}: {number:.6f}, reference {reference:.6f}; {faster}", flush=True)
    result = {
        "model": Path(args.model).name,
        "text": args.text.name,
        "rows": len(lines),
        **provenance_of(torch.device(device), 1),
        "found": found,
    }
    write_whole(RESULTS, json.dumps(result, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
