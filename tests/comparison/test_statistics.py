"""What a comparison shows: statistics by hand, and alignment of runs on what they have spent."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from abr_trainer.comparison.scores import score_of
from abr_trainer.comparison.statistics import (
    find_mismatches,
    find_other_configs,
    learning_curve,
    loss_curve,
    mean_curve,
    over_loss,
    over_passes,
    over_time,
    paired,
    read_comparison,
    relative_curve,
    summarise_arm,
    verdict,
)


def test_the_t_interval_is_that_of_the_textbook():
    # Mean -2, deviation 1, standard error 1 / sqrt(5) = 0.4472; t(0.975, 4) = 2.7764: margin 1.2416.
    found = paired([-1.0, -1.0, -2.0, -3.0, -3.0])
    assert found["mean"] == -2
    assert found["t_low"] == pytest.approx(-3.2416, abs=1e-3)
    assert found["t_high"] == pytest.approx(-0.7584, abs=1e-3)
    assert found["wins"] == 5
    assert verdict(found, 5) == "better"


def test_the_bootstrap_interval_lies_within_the_values_and_is_the_same_each_time():
    differences = [-1.0, -0.2, 0.3, -0.7, -0.4]
    found = paired(differences)
    assert min(differences) < found["bootstrap_low"] < found["mean"] < found["bootstrap_high"] < max(differences)
    assert found == paired(differences)


def test_intervals_cover_the_truth_as_often_as_they_say_and_the_bootstrap_less():
    draw = random.Random(0)
    trials = [paired([draw.gauss(0, 1) for _ in range(5)]) for _ in range(400)]
    t = statistics.fmean(found["t_low"] < 0 < found["t_high"] for found in trials)
    bootstrap = statistics.fmean(found["bootstrap_low"] < 0 < found["bootstrap_high"] for found in trials)
    assert t == pytest.approx(0.95, abs=0.033)  # 3 standard errors of a share of 400
    assert bootstrap == pytest.approx(0.84, abs=0.055), "why the verdict does not rest on it"


def test_a_detectable_difference_is_detected_in_four_cases_of_five():
    draw = random.Random(1)
    # Standard errors are those of the population here: 1 / sqrt(5); 3.76 of them are detectable with 5 seeds.
    effect = 3.76 / 5**0.5
    found = [verdict(paired([draw.gauss(-effect, 1) for _ in range(5)]), 5) for _ in range(400)]
    assert found.count("better") / 400 == pytest.approx(0.8, abs=0.06)


def test_a_verdict_needs_seeds_that_differ_and_every_pair_that_was_asked_for():
    assert verdict(paired([-5.0]), 1) == "no verdict: one seed"
    assert "t_low" not in paired([-5.0])
    assert verdict(paired([0.0, 0.0, 0.0]), 3) == "no difference"
    assert (paired([0.0, 0.0])["t_low"], paired([0.0, 0.0])["bootstrap_high"]) == (0, 0)
    assert verdict(paired([-2.0, -2.0]), 2) == "no verdict: the seeds do not differ"
    assert verdict(paired([]), 2) == "no verdict: 0 of 2 pairs"
    assert verdict(paired([-5.0, -5.1, -4.9]), 5) == "no verdict: 3 of 5 pairs"
    assert verdict(paired([1.0, 1.2, 0.9]), 3) == "worse"
    assert verdict(paired([1.0, -1.2, 0.9]), 3) == "no evidence"


def run(seed, perplexity, **others):
    cost = dict.fromkeys(("passes", "updates", "batches", "skips", "repeats", "tokens", "flops", "seconds"), 1.0)
    return {
        "arm": "abr",
        "seed": seed,
        "argv": ["--max_passes", "9"],
        "metrics": {"test_perplexity": perplexity},
        "cost": cost,
        "first_loss": 3.0,
        **others,
    }


def test_differences_are_paired_by_seed_and_runs_that_diverged_are_no_pair():
    reference = [run(0, 10.0), run(1, 20.0), run(2, 30.0)]
    arm = [run(1, 19.0), run(0, 9.0), run(2, None), run(3, 1.0)]
    entry = summarise_arm(arm, reference, ["test_perplexity"], planned=3)["test_perplexity"]
    assert entry["verdict"] == "no verdict: 2 of 3 pairs", "the ones that survived are no fair choice"
    assert entry["not_finite"] == 1
    assert (entry["difference"]["seeds"], entry["difference"]["mean"]) == (2, -1.0)
    assert entry["difference"]["relative_to"] == 15
    assert entry["mean"] == pytest.approx(29 / 3)


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


def test_what_speaks_against_a_comparison_is_said():
    same = {"git": "a", "versions": {"torch": "1"}, "machine": {"device": "cpu"}}
    runs = [run(0, 1.0, **same), run(0, 1.0, **same), run(1, 1.1, **same)]
    runs[0]["arm"] = "baseline"
    assert find_mismatches(runs, "passes") == []
    runs[1] = {**runs[1], "first_loss": 3.1, "git": "b", "cost": {**runs[1]["cost"], "passes": 9.0}}
    text = " ".join(find_mismatches(runs, "passes"))
    for part in ("Seed 0 is not paired", "different commits", "did not spend the same: 1 to 9 passes"):
        assert part in text
    assert "A pass did not cost all runs the same: 0.111 to 1 FLOPs" in text
    assert "gave the same run" not in text
    assert "Seeds of abr gave the same run" in " ".join(find_mismatches([*runs, run(2, 1.1, **same)], "passes"))
    assert "Seed 1" not in text
    assert "did not spend" not in " ".join(find_mismatches(runs, "batches"))


def test_an_arm_that_stops_early_by_itself_is_said_and_no_mismatch():
    same = {"git": "a", "versions": {}, "machine": {}}
    whole, early = run(0, 1.0, **same), run(0, 1.1, **same)
    early |= {"arm": "fixed:2,max_passes=5", "argv": [*early["argv"], "--max_passes", "5"]}
    early["cost"] = {**early["cost"], "passes": 0.5, "flops": 0.5}
    (told,) = find_mismatches([whole, early], "passes")
    assert told == "fixed:2,max_passes=5 stops after 5 of 9 passes, by a flag of its own."


def test_a_directory_without_a_comparison_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(ValueError, match="comparison.json cannot be read"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="is damaged"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="format that this version does not read"):
        read_comparison(tmp_path)


# ---- Scores of which more is better ----

ACCURACY = score_of("test_accuracy")


def test_more_is_better_of_an_accuracy():
    # Mean 0.02, deviation 0.01, standard error 0.01 / sqrt(5) = 0.004472; t(0.975, 4) = 2.7764: margin 0.012416.
    gained = [0.01, 0.01, 0.02, 0.03, 0.03]
    found = paired(gained, lower_is_better=False)
    assert (found["wins"], found["mean"]) == (5, pytest.approx(0.02))
    assert (found["t_low"], found["t_high"]) == (pytest.approx(0.007584, abs=1e-6), pytest.approx(0.032416, abs=1e-6))
    assert verdict(found, 5, lower_is_better=False) == "better"
    assert (paired(gained)["wins"], verdict(paired(gained), 5)) == (0, "worse"), "of a perplexity"
    lost = paired([-gain for gain in gained], lower_is_better=False)
    assert (lost["wins"], verdict(lost, 5, lower_is_better=False)) == (0, "worse")
    unsure = paired([0.02, -0.01, 0.0], lower_is_better=False)
    assert (unsure["wins"], verdict(unsure, 3, lower_is_better=False)) == (1, "no evidence")


def scored(seed, accuracy, **others):
    return run(seed, 1.0, **{"metrics": {"test_accuracy": accuracy}, **others})


def test_the_same_number_of_rows_is_the_same_difference_whatever_floats_make_of_it():
    assert 0.7 - 0.6 != 0.8 - 0.7
    arm, reference = [scored(0, 0.7), scored(1, 0.8)], [scored(0, 0.6), scored(1, 0.7)]
    entry = summarise_arm(arm, reference, ["test_accuracy"], planned=2)["test_accuracy"]
    assert entry["difference"]["deviation"] == 0
    assert entry["verdict"] == "no verdict: the seeds do not differ", "an interval of no width would be a sure gain"


def test_an_accuracy_is_compared_by_differences_and_interpolated_as_it_is():
    curves, reference = {0: [[0, 0.5], [1, 0.75]]}, {0: [[0, 0.5], [2, 0.7]]}
    first, second = relative_curve(curves, reference, ACCURACY, "epoch")  # after 1 epoch the reference has 0.6
    assert (first["epoch"], first["mean"], second["epoch"], second["mean"]) == (0, 0, 1, pytest.approx(0.15))
    assert relative_curve({0: [[3, 0.9]]}, reference, ACCURACY, "epoch") == [], "the reference was never that far"
    (point,) = mean_curve([[[1, 0.5]], [[1, 0.7]]], ACCURACY, "epoch")
    assert (point["epoch"], point["mean"]) == (1, pytest.approx(0.6))


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


def test_what_speaks_against_a_comparison_of_prompts_is_said():
    same = {"git": "a", "versions": {}, "machine": {}}
    none, perfect = scored(0, 0.5, **same), scored(0, 0.6, **same)
    none["arm"], perfect["arm"] = "none", "Same meaning?"
    perfect |= {"first_loss": 0.8, "cost": {**perfect["cost"], "tokens": 9.0, "flops": 9.0}}
    assert find_mismatches([none, perfect], "batches", "prompt") == [], (
        "its loss and its costs are those of the prompt"
    )
    ignored = {**none, "arm": "Same meaning?"}
    (told,) = find_mismatches([none, ignored], "batches", "prompt")
    assert told == 'none and "Same meaning?" gave the same run with seed 0: their prompts have not reached the model.'
    perfect["cost"]["batches"] = 2.0
    assert find_mismatches([none, perfect], "batches", "prompt") == ["The runs did not see the same: 1 to 2 batches."]


def test_models_that_differ_in_more_than_paths_and_seeds_are_told_apart(tmp_path):
    runs = [{"directory": f"seed-{seed}"} for seed in (0, 1)]
    for seed, modules in enumerate((["q_proj", "v_proj"], ["v_proj", "q_proj"])):
        (tmp_path / f"seed-{seed}").mkdir()
        config = {"base_model_name_or_path": f"/models/{seed}", "seed": seed, "r": 8, "target_modules": modules}
        (tmp_path / f"seed-{seed}" / "adapter_config.json").write_text(json.dumps(config))
    assert find_other_configs(tmp_path, runs) == []
    (tmp_path / "seed-1" / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    (tmp_path / "seed-1" / "quant_config.json").write_text('{"bits": 4}')
    assert find_other_configs(tmp_path, runs) == [
        "quant_config.json differs between the runs in bits.",
        "adapter_config.json differs between the runs in r.",
    ]
