"""What is read of the runs of a comparison, and what speaks against comparing them."""

from __future__ import annotations

import json

import pytest

from abr_trainer.comparison.collecting import find_mismatches, find_other_configs, read_comparison, summarise_arm


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


def test_the_wait_of_an_arm_is_known_where_all_its_runs_have_counted_it():
    def waited(*seconds):
        runs = [run(seed, 9.0) for seed in range(len(seconds))]
        for each, wait in zip(runs, seconds, strict=True):
            each["cost"] |= {} if wait is None else {"waiting_seconds": wait}
        return summarise_arm(runs, runs, ["test_perplexity"], planned=len(runs))["cost"].get("waiting_seconds")

    assert waited(1.0, 2.0) == 1.5
    assert waited(1.0, None) is None


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


def test_runs_of_equal_seconds_may_differ_in_compute_but_not_in_seconds():
    same = {"git": "a", "versions": {}, "machine": {}, "argv": ["--max_seconds", "60"]}
    runs = [run(0, 1.0, **same), run(0, 1.1, **same)]
    runs[1]["arm"] = "fixed:2"
    for each, seconds in zip(runs, (60.1, 61.0), strict=True):
        each["cost"] = {**each["cost"], "seconds": seconds, "flops": seconds**2}
    assert find_mismatches(runs, "seconds") == []
    runs[1]["cost"]["seconds"] = 75.0
    (told,) = find_mismatches(runs, "seconds")
    assert told.startswith("A run ends with its batch under way: the longest took 75.0 of 60 seconds. Give a larger")
    runs[1]["cost"]["seconds"] = 31.5
    (told,) = find_mismatches(runs, "seconds")
    assert told.startswith("The runs did not spend the same: 31.5 to 60.1 seconds. The data ended before the budget")
    runs[1] |= {"arm": "fixed:2,max_seconds=30", "argv": ["--max_seconds", "60", "--max_seconds", "30"]}
    (told,) = find_mismatches(runs, "seconds")
    assert told == "fixed:2,max_seconds=30 stops after 30 of 60 seconds, by a flag of its own."


def test_a_directory_without_a_comparison_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(ValueError, match="comparison.json cannot be read"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="is damaged"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="format that this version does not read"):
        read_comparison(tmp_path)


def scored(seed, accuracy, **others):
    return run(seed, 1.0, **{"metrics": {"test_accuracy": accuracy}, **others})


def test_the_same_number_of_rows_is_the_same_difference_whatever_floats_make_of_it():
    assert 0.7 - 0.6 != 0.8 - 0.7
    arm, reference = [scored(0, 0.7), scored(1, 0.8)], [scored(0, 0.6), scored(1, 0.7)]
    entry = summarise_arm(arm, reference, ["test_accuracy"], planned=2)["test_accuracy"]
    assert entry["difference"]["deviation"] == 0
    assert entry["verdict"] == "no verdict: the seeds do not differ", "an interval of no width would be a sure gain"


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
