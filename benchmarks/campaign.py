"""A campaign: runs that are drawn from a seed by number, and made until each is as it should be. It can be stopped."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from effectiveness import write_runs

from abr_trainer.records.files import read_json
from abr_trainer.records.provenance import versions_and_machine


def parser_of(description: str | None, runs: int, out: Path) -> argparse.ArgumentParser:
    """Return the flags of a campaign of so many runs, whose results lie in `out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--only", type=int, nargs="*", help="Numbers of runs to make, again if they were made.")
    parser.add_argument("--out", type=Path, default=out)
    return parser


def carry_on(
    args: argparse.Namespace,
    make: Callable[[int], dict[str, Any]],
    good: str,
    told: Callable[[dict[str, Any]], tuple[str, str]],
    summary_of: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """Make the runs that are missing or are not good, write down each, and return the results.

    Args:
        make: Makes the run of a number.
        good: Key of a run that tells whether it is as it should be.
        told: Returns what to print of a run before and after its time.
    """
    results: dict[str, Any] = read_json(args.out) or {}
    if results.get("seed") != args.seed:
        results = {"seed": args.seed, "runs": []}
    results |= versions_and_machine("cpu", torch.get_num_threads(), 1)
    made = {run["number"]: run for run in results["runs"]}
    for number in range(args.runs) if args.only is None else args.only:
        if number in made and args.only is None and made[number][good]:
            continue
        begun = time.monotonic()
        made[number] = make(number)
        before, after = told(made[number])
        print(f"{number}: {before} ({time.monotonic() - begun:.1f} s) {after}".rstrip(), flush=True)
        results["runs"] = [made[each] for each in sorted(made)]
        results["summary"] = summary_of(results["runs"])
        write_runs(results, args.out)
    print(json.dumps(results["summary"], indent=1))
    return results
