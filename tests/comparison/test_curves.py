"""The curves of runs and arms, aligned on what they have spent."""

from __future__ import annotations

import json

import pytest

from abr_trainer.comparison.curves import (
    learning_curve,
    loss_curve,
    mean_curve,
    on_clock,
    over_loss,
    over_passes,
    over_time,
    relative_curve,
)
from abr_trainer.comparison.scores import score_of


def test_curves_of_as_many_evaluations_are_averaged_one_by_one():
    curves = [[[0, 10.0], [20, 6.0]], [[0, 12.0], [22, 8.0]]]
    first, last = mean_curve(curves)
    assert (first["passes"], first["mean"]) == (0, 11)
    assert (last["passes"], last["mean"]) == (21, 7)
    assert last["high"] - last["low"] == pytest.approx(2 * 2**0.5)


def test_curves_of_different_lengths_are_compared_at_equal_compute():
    curves = [[[0, 10.0], [10, 8.0], [20, 6.0]], [[0, 10.0], [20, 4.0]]]
    points = mean_curve(curves)
    assert [(point["passes"], point["mean"]) for point in points] == [(0, pytest.approx(10)), (20, pytest.approx(5))]


def test_there_is_no_mean_where_one_seed_is_not_finite():
    curves = [[[0, 10.0], [10, 8.0], [20, 6.0]], [[0, 10.0], [10, None], [20, 4.0]]]
    assert [(point["passes"], point["mean"]) for point in mean_curve(curves)] == [(0, 10), (20, 5)]
    assert mean_curve([[[0, None]]]) == mean_curve([]) == []
    assert [point["passes"] for point in relative_curve({0: curves[1]}, {0: curves[0]})] == [0, 20]
    assert [point["passes"] for point in relative_curve({0: curves[0]}, {0: curves[1]})] == [0, 20]


def test_an_arm_is_compared_with_the_reference_at_equal_compute():
    reference = {0: [[0, 16.0], [20, 4.0]], 1: [[0, 16.0], [20, 9.0]], 2: [[0, 1.0]]}
    arm = {0: [[0, 16.0], [10, 10.0], [40, 3.0]], 1: [[0, 16.0], [10, 14.4]], 3: [[0, 99.0]]}
    first, second = relative_curve(arm, reference)  # at 10 passes the reference has 8 and 12, at 40 nothing
    assert (first["passes"], first["mean"]) == (0, pytest.approx(0))
    assert (second["passes"], second["mean"]) == (10, pytest.approx((25 + 20) / 2))
    assert second["low"] < 20 < 25 < second["high"]
    assert relative_curve({5: [[0, 1.0]]}, reference) == []


def test_seeds_that_were_evaluated_at_other_times_are_compared_at_equal_compute():
    arm = {0: [[0, 16.0], [10, 8.0], [20, 4.0], [30, 2.0]], 1: [[0, 16.0], [20, 4.0], [30, 2.0]]}
    reference = {seed: [[0, 16.0], [30, 16.0]] for seed in (0, 1)}
    points = [(point["passes"], round(point["mean"], 6)) for point in relative_curve(arm, reference)]
    assert points == [(0, 0), (20, -75), (30, -87.5)]


def test_a_perplexity_beyond_all_bounds_is_that_of_a_run_that_diverged(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    results = {"eval_perplexity": 1e200, "train_passes": 9.0}
    assert learning_curve(tmp_path, [], results) == [[9.0, None]]


def test_a_curve_without_a_result_ends_with_the_evaluation_of_the_model_that_was_kept(tmp_path):
    log = [{"step": step, "eval_perplexity": value} for step, value in ((0, 8.0), (2, 7.5), (4, 900.0))]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    batches = [{"step": step, "passes": 2.0 * step} for step in range(1, 5)]
    totals = {"train_passes": 8.0}
    assert learning_curve(tmp_path, batches, totals, kept=2) == [[0.0, 8.0], [4.0, 7.5], [8.0, 7.5]]
    assert learning_curve(tmp_path, batches, totals, kept=3)[-1] == [8.0, 900.0], "it was not evaluated"
    assert learning_curve(tmp_path, batches, {}, kept=2)[-1] == [8.0, 900.0], "the run is not finished"
    reached = {**totals, "eval_perplexity": 7.4}
    assert learning_curve(tmp_path, batches, reached, kept=2)[-1] == [8.0, 7.4]


def test_runs_that_end_within_a_pass_of_each_other_have_spent_the_same():
    (point,) = relative_curve({0: [[20, 3.0]]}, {0: [[0, 10.0], [19.5, 2.0]]})
    assert point["mean"] == pytest.approx(50)
    assert relative_curve({0: [[21, 3.0]]}, {0: [[0, 10.0], [19.5, 2.0]]}) == []


def batch(passes, loss, losses, repeats):
    return {"passes": passes, "loss": loss, "losses": losses, "repeats": repeats}


def test_batches_are_counted_where_they_belong():
    batches = [
        batch(2, 4.0, [4.0, 3.0], 2),
        batch(2.5, 9.0, [9.0], 0),
        batch(5.5, 4.1, [4.1, 3.3, 3.0], 3),
        batch(6, None, [None], 0),
        batch(100, 1.0, [1.0], 1),
    ]
    first, second, last = over_time(batches, end=100.0)
    assert (first["repeats"], first["skipped"], first["batches"]) == (1, 0.5, 2)
    assert (second["repeats"], second["skipped"]) == (1.5, 0.5)
    assert (last["passes"], last["repeats"]) == (97.5, 1)
    low, middle, high = over_loss(batches, least=1.0, most=9.0)
    assert (low["mean"], middle["mean"], high["mean"]) == (1, 2.5, 0)
    assert (middle["low"], middle["high"], middle["batches"]) == (2, 3, 2)
    changes = over_passes(batches)
    assert [change["pass"] for change in changes] == [1, 2, 3]
    assert [change["mean"] for change in changes] == pytest.approx([0, -0.9, -1.1])
    assert [change["batches"] for change in changes] == [2, 2, 1]


ACCURACY = score_of("test_accuracy")


def test_an_accuracy_is_compared_by_differences_and_interpolated_as_it_is():
    curves, reference = {0: [[0, 0.5], [1, 0.75]]}, {0: [[0, 0.5], [2, 0.7]]}
    first, second = relative_curve(curves, reference, ACCURACY, "epoch")  # after 1 epoch the reference has 0.6
    assert (first["epoch"], first["mean"], second["epoch"], second["mean"]) == (0, 0, 1, pytest.approx(0.15))
    assert relative_curve({0: [[3, 0.9]]}, reference, ACCURACY, "epoch") == [], "the reference was never that far"
    (point,) = mean_curve([[[1, 0.5]], [[1, 0.7]]], ACCURACY, "epoch")
    assert (point["epoch"], point["mean"]) == (1, pytest.approx(0.6))


def test_seconds_are_counted_from_the_beginning_of_a_run(tmp_path):
    trace = [{"step": step, "passes": 3.0 * step, "seconds": 2.0, "repeats": 3} for step in range(1, 5)]
    batches = on_clock(trace, "seconds")
    assert [batch["seconds"] for batch in batches] == [2, 4, 6, 8]
    log = [{"step": step, "eval_perplexity": 10.0 - step} for step in (0, 2)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    results = {"train_passes": 12.0, "train_seconds": 8.0, "eval_perplexity": 5.0}
    assert learning_curve(tmp_path, batches, results, clock="seconds") == [[0, 10], [4, 8], [8, 5]]
    assert [point["seconds"] for point in over_time(batches, 8.0, "seconds")] == [2.2, 4.2, 6.2, 7.8]
    assert on_clock(trace, "passes") == trace


def test_runs_of_equal_seconds_end_with_the_batch_under_way():
    reference = {0: [[0, 8.0], [10.1, 4.0]]}
    *_, last = relative_curve({0: [[0, 8.0], [10.5, 5.0]]}, reference, clock="seconds")
    assert (last["seconds"], last["mean"]) == (10.5, pytest.approx(25))
    assert len(relative_curve({0: [[0, 8.0], [12.0, 5.0]]}, reference, clock="seconds")) == 1


def test_a_learning_curve_over_epochs_ends_with_what_was_reached(tmp_path):
    log = [{"step": 0, "eval_accuracy": 0.5}, {"step": 4, "epoch": 1.0, "eval_accuracy": 0.9}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [*log, {"step": 8, "epoch": 2.0}]}))
    batches = [{"step": step, "epoch": step / 4, "passes": step} for step in range(1, 9)]
    results = {"eval_accuracy": 0.8, "train_passes": 8.0}  # of the best checkpoint, say
    curve = learning_curve(tmp_path, batches, results, "eval_accuracy", "epoch")
    assert curve == [[0.0, 0.5], [1.0, 0.9], [2.0, 0.8]]


def test_the_training_loss_is_that_of_equal_parts_of_the_run():
    batches = [{"epoch": (i + 1) / 20, "loss": float(i)} for i in range(40)]
    points = loss_curve(batches)
    assert len(points) == 20
    assert points[0] == [pytest.approx(0.075), 0.5]
    assert points[-1] == [pytest.approx(1.975), 38.5]
