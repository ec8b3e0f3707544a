"""What a command says at the end of a run: what the model that it kept has reached, what that cost, where it is."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..records.files import ROW_LOSSES_NAME, TRACE_NAME, step_of
from ..report.rows import has_row_rule
from ..report.text import share
from ..report.times import parts_of_time
from .ledger import ComputeLedger
from .log_table import PLAIN_WIDTH, Score, shown_change, shown_passes, shown_score, shown_share

Logs = Sequence[Mapping[str, float]]


def kept_step(args: Any, state: Any) -> int:
    """Return after how many batches the weights were saved that a run has kept."""
    loaded = state.best_model_checkpoint if args.load_best_model_at_end else None
    return step_of(Path(loaded)) if loaded else int(state.global_step)


def measured_before(log_history: Logs, key: str) -> float | None:
    """Return what was measured before the first batch; None where nothing was."""
    first = next((logs for logs in log_history if key in logs), None)
    return None if first is None or first["step"] else first[key]


def perplexity_lines(
    log_history: Logs, ledger: ComputeLedger, results: Mapping[str, float], score: Score
) -> list[str]:
    """Return lines on what the model that was kept has reached.

    Args:
        log_history: Where the perplexity before the first batch is.
        results: What was measured of the model that was kept.
        score: The perplexity that the run was followed by; that of the tokens is told beside another one.
    """
    lines = []
    for key, title in {score.key: score.title, "eval_perplexity": "perplexity"}.items():
        if key not in results:
            continue
        now, before = results[key], measured_before(log_history, key) if ledger.batches else None
        changed = (
            shown_score(now)
            if before is None
            else f"{shown_score(before)} before, {shown_score(now)} after ({shown_change(now, before)})"
        )
        tokens = f", over {results['eval_target_tokens']:,.0f} target tokens" if key == "eval_perplexity" else ""
        lines.append(f"evaluation  {title} {changed}{tokens}")
        if key == score.key and (told := worse(score, before, now)):
            lines.append(told)
    if "test_perplexity" in results:
        lines.append(f"test        perplexity {shown_score(results['test_perplexity'])}")
    return lines


def worse(score: Score, before: float | None, now: float | None, greater_is_better: bool = False) -> str | None:
    """Say that training has made a model worse, if it has.

    >>> worse(Score(), 146.46, 155.52)
    'Training made the model worse: perplexity 146.46 before, 155.52 now.'
    >>> worse(Score(), 8.0, 7.9)
    """
    if before is None or now is None or not math.isfinite(before):
        return None
    is_better = now >= before if greater_is_better else now <= before
    shown = [shown_score(value, score.digits) for value in (before, now)]
    if is_better or shown[0] == shown[1]:
        return None
    return f"Training made the model worse: {score.title} {shown[0]} before, {shown[1]} now."


def kept_line(args: Any, state: Any, ledger: ComputeLedger) -> list[str]:
    """Return a line on which model was kept, where it is not simply the last one."""
    kept = kept_step(args, state)
    if not ledger.batches or kept == state.global_step:
        return []
    return [f"kept        the model after {kept:,} of {state.global_step:,} batches: the best checkpoint"]


def time_lines(ledger: ComputeLedger) -> list[str]:
    """Return where the time of the training went, where it went into more than passes."""
    total, parts = parts_of_time(asdict(ledger))
    if len(parts) < 2:
        return []
    solid = "\N{NO-BREAK SPACE}"  # a line ends between two parts only
    short = {"waiting for data": "waiting"}
    said = (f"{short.get(name, name)} {seconds:,.1f} s ({shown_share(seconds / total)})" for name, seconds in parts)
    text = "time        " + ", ".join(part.replace(" ", solid) for part in said)
    return [line.replace(solid, " ") for line in textwrap.wrap(text, PLAIN_WIDTH, subsequent_indent=" " * 12)]


def cost_lines(ledger: ComputeLedger, output_dir: Path, most_seconds: int | None = None) -> list[str]:
    """Return a line each on what a run spent, and where its files are; nothing of one that only evaluates.

    Args:
        most_seconds: The budget of seconds, if there is one.
    """
    if not ledger.batches:
        return []
    abr_rows = f"abr rows {shlex.quote(str(output_dir))}"
    skipped = f"{ledger.skips:,} skipped" + (f" ({share(ledger.skips, ledger.batches)})" if ledger.skips else "")
    dropped = f"{ledger.rows_dropped:,} dropped ({share(ledger.rows_dropped, ledger.rows)})"
    listed = f": {abr_rows}" if ledger.rows_dropped else ""
    seconds = f"{ledger.seconds:,.1f} s" + ("" if most_seconds is None else f" of {most_seconds:,}")
    return [
        f"batches     {ledger.batches:,} seen, {skipped}, {ledger.repeats:.2f} updates/batch",
        *([f"rows        {ledger.rows:,} judged, {dropped}{listed}"] if has_row_rule(output_dir) else []),
        *([f"ranked      {abr_rows} --all"] if (output_dir / ROW_LOSSES_NAME).is_file() else []),
        f"cost        {shown_passes(float(ledger.passes)).removesuffix('.0')} passes, {ledger.updates:,} updates, "
        f"{ledger.tokens:,} tokens, {ledger.flops:.3g} FLOPs, {seconds}",
        *time_lines(ledger),
        f"model       {output_dir}",
        f"trace       {output_dir / TRACE_NAME}",
        *(f"TensorBoard tensorboard --logdir {shlex.quote(str(logs))}" for logs in output_dir.glob("runs")),
    ]
