"""Draw runs and streams of losses at random, for long: the properties of the tests, with more examples.

    python benchmarks/properties.py --minutes 20      # goes on where it was stopped
    python benchmarks/properties.py --quick --out runs/properties.json

Each round draws `--examples` of a property by a seed of its own. A failure ends the program with the smallest example.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
from effectiveness import write_runs
from hypothesis import settings
from transformers.utils import logging

from abr_trainer.records.provenance import versions_and_machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "properties.json"

sys.path.insert(0, str(ROOT))

from tests.schedulers import test_properties  # noqa: E402
from tests.training import test_laws  # noqa: E402

PROPERTIES = {
    name: found
    for module in (test_laws, test_properties)
    for name, found in vars(module).items()
    if name.startswith("test_") and hasattr(found, "hypothesis")
}
"""The properties, by the names of their tests."""

SLOW = ("test_any_run_does_what_the_laws_say",)
TIMES = 20
"""How many more examples the others draw: they train nothing."""


def draw(name: str, seed: int, examples: int) -> dict[str, Any]:
    """Draw examples of a property by a seed, and tell how many. Raises what the property raises."""
    found, begun = PROPERTIES[name], time.perf_counter()
    count = examples if name in SLOW else TIMES * examples
    profile = found._hypothesis_internal_use_settings
    found._hypothesis_internal_use_settings = settings(profile, max_examples=count, derandomize=False)
    hypothesis.seed(seed)(found)()
    return {"property": name, "seed": seed, "examples": count, "seconds": round(time.perf_counter() - begun, 1)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--examples", type=int, default=100, help="of the slowest property in a round")
    parser.add_argument("--rounds", type=int, default=20, help="stop after so many, those of earlier calls included")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no property after so many")
    parser.add_argument("--quick", action="store_true", help="one round of few examples")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.examples = 1, 3
    logging.set_verbosity_error()  # skips are what is tried here
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    results = {**versions_and_machine("cpu", 1, 1), "runs": results["runs"]}
    done = {(run["property"], run["seed"]) for run in results["runs"]}
    begun = time.monotonic()
    for seed in range(args.rounds):
        for name in PROPERTIES:
            if (name, seed) in done or time.monotonic() - begun > 60 * args.minutes:
                continue
            results["runs"].append(draw(name, seed, args.examples))
            print(json.dumps(results["runs"][-1]), flush=True)
            write_runs(results, args.out)
    return results


if __name__ == "__main__":
    main()
