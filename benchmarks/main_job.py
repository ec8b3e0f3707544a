"""The published protocol and the honest one, side by side: `abr` against `baseline` on WikiText-2 and DailyDialog.

    python benchmarks/main_job.py --data DIR --model DIR --out runs/main_job

DIR of the data holds `wikitext2/wiki.{train,valid,test}.tokens` and `dailydialog/{train,validation,test}.jsonl`; the
model is any causal language model, stories260k in the README. Each run is `abr train` in its own process:
LoRA, blocks of 256, 50 batches of 4 (the same for both schedulers), and once more with the same `--max_passes` for
both. Finished runs are kept. The table is made from the runs' `all_results.json` alone; all numbers go to `--json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEDULERS = ("baseline", "abr")
PROTOCOLS = {"same batches": ["--max_steps", "50"], "same compute": ["--max_passes", "200"]}
FILES = {
    "wikitext2": ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    "dailydialog": ("train.jsonl", "validation.jsonl", "test.jsonl"),
}


def flags_for(corpus: str, data: Path) -> list[str]:
    train, validation, test = (str(data / corpus / name) for name in FILES[corpus])
    return ["--train_file", train, "--validation_file", validation, "--test_file", test]


def run(output: Path, flags: list[str]) -> dict[str, float]:
    """Run the main job unless it is finished, and return its results."""
    results = output / "all_results.json"
    if not (results.exists() and "test_perplexity" in json.loads(results.read_text())):
        command = [sys.executable, "-m", "abr_trainer", "train", *flags, "--output_dir", str(output)]
        print(" ".join(command), flush=True)
        subprocess.run([*command, "--overwrite_output_dir"], check=True, stdout=subprocess.DEVNULL)
    return json.loads(results.read_text())


def mean(runs: list[dict[str, float]], key: str, form: str) -> str:
    values = [results[key] for results in runs]
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and "perplexity" in key else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/main_job"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "main_job.json")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)

    common = ["--model_name_or_path", str(args.model), "--block_size", "256", "--do_eval", "--do_predict", "--use_cpu"]
    common += ["--eval_strategy", "no", "--disable_tqdm", "true", "--report_to", "none"]
    train = ["--do_train", "--per_device_train_batch_size", "4", "--learning_rate", "2e-3", "--save_strategy", "no"]
    runs: dict[str, list[dict[str, float]]] = {}
    for corpus in FILES:
        files = flags_for(corpus, args.data)
        runs[f"{corpus} | before"] = [run(args.out / corpus / "before", [*common, *files, "--use_lora", "false"])]
        for protocol, limit in PROTOCOLS.items():
            for scheduler in SCHEDULERS:
                runs[f"{corpus} | {protocol} | {scheduler}"] = [
                    run(
                        args.out / corpus / protocol.replace(" ", "-") / f"{scheduler}-{seed}",
                        [*common, *files, *train, *limit, "--repeat_scheduler", scheduler, "--seed", str(seed)],
                    )
                    for seed in range(args.seeds)
                ]

    print("| corpus | protocol | scheduler | validation | test | repeats | updates | skips | FLOPs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, results in runs.items():
        corpus, protocol, scheduler = [*name.split(" | "), "-"][:3]
        cells = [
            corpus,
            protocol,
            scheduler,
            mean(results, "eval_perplexity", ".2f"),
            mean(results, "test_perplexity", ".2f"),
        ]
        if "train_updates" in results[0]:
            cells += [
                mean(results, f"train_{key}", form)
                for key, form in (("repeats", ".2f"), ("updates", ".0f"), ("skips", ".1f"), ("flops", ".2e"))
            ]
        else:
            cells += ["-"] * 4
        print("| " + " | ".join(cells) + " |")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(runs, indent=1) + "\n")
    return runs


if __name__ == "__main__":
    main()
