"""The campaigns of kills and of failing disks, with a few of their runs."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from tests.conftest import ROOT
from tests.hub_server import Hub

pytestmark = pytest.mark.launches


@pytest.fixture(scope="module")
def campaigns():
    """The two programs, which are no package: they import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setenv("DS_ACCELERATOR", "cpu")
        kills, disks = importlib.import_module("kills"), importlib.import_module("disks")
        kills.warm()
        yield kills, disks
    for name in ("kills", "disks", "campaign", "forked", "effectiveness"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def place(campaigns, tmp_path_factory):
    kills, _ = campaigns
    directory = tmp_path_factory.mktemp("kills")
    kills.write_data(directory / "data")
    with Hub(directory / "hub") as hub:
        yield kills.Place(directory, hub)


@pytest.fixture(scope="module")
def baseline(campaigns, tmp_path_factory):
    return campaigns[1].Baseline(tmp_path_factory.mktemp("disks"))


COMMON = ["--use_cpu", "--disable_tqdm true", "--do_train", "--do_eval", "--max_eval_samples 4", "--block_size 48"]
COMMON += ["--learning_rate 5e-3", "--per_device_train_batch_size 2", "--report_to none", "--sample_prompts 0"]
STREAM = ["--dataset_name {data}/a", "--streaming", "--max_steps 6", "--save_steps 2", "--repeat_scheduler replay"]
STREAM += ['--repeat_scheduler_kwargs {"quantile":0.4,"spacing":2,"window":10}', "--skip_rows robust"]
PUSHED = ["--dataset_name demo", "--max_train_samples 16", "--max_steps 4", "--save_steps 2", "--save_total_limit 1"]
PUSHED += ["--push_to_hub --hub_model_id me/run --hub_base_model demo-org/base --hub_strategy checkpoint"]
TWO_RANKS = ["--dataset_name demo", "--max_train_samples 24", "--max_passes 14", "--save_steps 1"]
TWO_RANKS += ["--repeat_scheduler random", "--rank_rows"]


@pytest.mark.parametrize(
    ("flags", "moments", "ranks", "pushes"),
    [
        (STREAM, [("write", 0.5, 0.7)], 1, False),
        (PUSHED, [("request", 0.5, 0.0)], 1, True),
        pytest.param(TWO_RANKS, [("time", 0.7, 0.0), ("change", 0.3, 0.0)], 2, False, marks=pytest.mark.long),
    ],
    ids=["in a write", "in a push", "one rank of two, twice"],
)
def test_a_run_that_is_killed_and_resumed_leaves_what_an_unbroken_run_leaves(
    campaigns, place, flags, moments, ranks, pushes
):
    kills, _ = campaigns
    words = tuple(word for flag in (*COMMON, *flags) for word in flag.split())
    case = kills.Case(0, "train", words, tuple(kills.Moment(*each) for each in moments), ranks, ranks - 1, pushes)
    found = kills.try_case(case, place)
    assert found["equal"], found["problems"]
    assert [kill["killed"] for kill in found["kills"]] == [True] * len(moments)


def test_each_run_of_the_campaign_is_drawn_from_its_number(campaigns):
    kills, disks = campaigns
    cases = [kills.draw(0, number) for number in range(100)]
    assert cases == [kills.draw(0, number) for number in range(100)]
    assert sum(case.ranks == 2 for case in cases) == 20
    assert {case.verb for case in cases} == {"train", "sft", "classify"}
    told = " ".join(flag for case in cases for flag in case.flags)
    for rule in kills.RULES:
        assert f"--repeat_scheduler {rule} " in told
    assert {disks.draw(0, number, is_root=False).what for number in range(100)} == {*disks.ERRORS, *disks.DAMAGE}


@pytest.mark.parametrize(("what", "share"), [("no space", 0.5), ("read-only", 0.7)])
def test_a_run_whose_disk_fails_says_so_in_a_line_and_is_resumed(campaigns, baseline, what, share):
    _, disks = campaigns
    found = disks.try_case(disks.Case(0, "quick", what, share), baseline)
    assert found["right"], found["problems"]
    assert found["said"]


def test_the_committed_figures_are_those_of_the_campaigns(campaigns):
    for campaign, good in zip(campaigns, ("equal", "right"), strict=True):
        results = json.loads(campaign.RESULTS.read_text())
        assert results["summary"] == campaign.summary_of(results["runs"])
        assert all(run[good] for run in results["runs"])
