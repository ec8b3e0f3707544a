"""What paired differences show: statistics by hand."""

from __future__ import annotations

import random
import statistics

import pytest

from abr_trainer.comparison.statistics import paired, verdict


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
