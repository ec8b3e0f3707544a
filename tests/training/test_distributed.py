"""Every engine against a reference: ranks that agree can still be wrong together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from abr_trainer.perplexity.windows import causal_nll, window_nlls
from abr_trainer.records.files import read_lines
from tests.conftest import tiny_llama, token_rows
from tests.jobs import (
    GENERATED,
    LOADERS,
    RESUMED,
    SCENARIOS,
    build_model,
    numbers_of,
    rows_with_a_broken_one,
    some_windows,
    train_scenario,
    whole_weights,
    write_texts,
)

pytestmark = pytest.mark.launches

SPENT = ("batches", "skips", "updates", "tokens")
ZERO = [name for name in SCENARIOS if name.startswith("ZeRO")]
OTHERS = [name for name in SCENARIOS if name not in ZERO]
FSDP = [name for name in OTHERS if name.startswith("FSDP") and "resumed" not in name]
FOUR_RANKS = ["one micro-batch", "four micro-batches", "rows", "rows, four micro-batches"]
ONE_PROCESS_CAN = [
    *("one micro-batch", "two micro-batches", "four micro-batches"),
    *("uneven", "dispatched", "split", "LoRA", "LoRA, checkpointed", "classification"),
    *("asking", "asking but for the gradient", "without targets"),
    *("rows", "rows, two micro-batches", "rows, uneven", "rows, LoRA", "rows, classification"),
]


@pytest.fixture(scope="module")
def two_ranks(launch):
    return launch(2, [*OTHERS, *GENERATED])


@pytest.fixture(scope="module")
def four_ranks(launch):
    return launch(4, FOUR_RANKS)


@pytest.fixture(scope="module")
def two_ranks_of_deepspeed(launch):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return launch(2, ZERO)


def agreed(directory: Path, name: str, ranks: int = 2) -> tuple[torch.Tensor, dict]:
    """Return the weights and numbers of a scenario, which are the same on all ranks to the last bit."""
    first, *others = (torch.load(directory / name / f"weights-{rank}.pt") for rank in range(ranks))
    assert all(torch.equal(first, other) for other in others)
    first_numbers, *other_numbers = (
        json.loads(Path(directory, name, f"rank-{rank}.json").read_text()) for rank in range(ranks)
    )
    assert all(numbers == first_numbers for numbers in other_numbers)
    return first, first_numbers


def assert_alike(weights, numbers, expected_weights, expected):
    torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-5)
    for key in ("loss", "learning_rate", "repeats", "history", "eval_perplexity", "eval_windows_nll"):
        assert numbers[key] == (expected[key] and pytest.approx(expected[key], rel=1e-4)), key
    for key in SPENT:
        assert numbers["ledger"][key] == expected["ledger"][key], key
    assert numbers["eval_target_tokens"] == expected["eval_target_tokens"]
    # The broken micro-batch, once an epoch, on all ranks; of rows only the broken one is dropped.
    assert numbers["ledger"]["skips"] >= (1 if "row rule" in expected else 2)
    assert numbers["ledger"]["updates"] > numbers["ledger"]["batches"] - numbers["ledger"]["skips"]
    if "row rule" in expected:
        assert numbers["row rule"] == pytest.approx(expected["row rule"], rel=1e-4)
        dropped = numbers["ledger"]["rows_dropped"]
        assert dropped == expected["ledger"]["rows_dropped"] == numbers["row rule"]["dropped"] + 2  # not finite: 2
        assert dropped >= 4


def alone(directory: Path, name: str, ranks: int) -> tuple[torch.Tensor, dict]:
    """Run a scenario in this process, on the micro-batches that `ranks` processes had."""
    accumulation = ranks * SCENARIOS[name].get("gradient_accumulation_steps", 1)
    changes = {"first_rows_again": 3} if "uneven" in name else {}  # 29 rows in twos on two ranks are filled up to 32
    name = {"dispatched": "one micro-batch", "split": "one micro-batch"}.get(name, name)
    trainer = train_scenario(str(directory), name, gradient_accumulation_steps=accumulation, **changes)
    return whole_weights(trainer), numbers_of(trainer)


@pytest.mark.parametrize("name", ONE_PROCESS_CAN)
def test_two_ranks_equal_one_process_with_twice_the_accumulation(two_ranks, tmp_path, name):
    assert_alike(*agreed(two_ranks, name), *alone(tmp_path, name, ranks=2))


@pytest.mark.parametrize("name", ["seconds", "seconds, resumed"])
def test_two_ranks_agree_on_the_seconds_of_which_one_rank_needs_more(two_ranks, name):
    _, numbers = agreed(two_ranks, name)
    assert numbers["spent"] >= 2
    assert numbers["ledger"]["batches"] <= 2 / (4 * 0.02) + 2, "each batch waits for four rows of the slower rank"
    assert numbers["learning_rate"][0] < 1e-2
    assert numbers["learning_rate"] == sorted(numbers["learning_rate"], reverse=True)
    lines = list(read_lines(next((two_ranks / name).rglob("abr_trace.jsonl"))))
    assert max(line["waiting_seconds"] for line in lines) >= 4 * 0.02
    assert max(line["repeats"] for line in lines) > 1


def test_a_batch_is_without_targets_if_no_rank_has_any(two_ranks):
    path = next((two_ranks / "without targets").rglob("abr_trace.jsonl"))
    reasons = {batch["step"]: batch["reason"] for batch in read_lines(path)}
    assert [step for step, reason in reasons.items() if reason == "no targets"] == [2, 10]  # in both epochs


def test_all_ranks_repeat_while_one_of_them_waits(two_ranks):
    agreed(two_ranks, "waiting for one rank")
    trace = list(read_lines(next((two_ranks / "waiting for one rank").rglob("abr_trace.jsonl"))))
    assert {batch["repeats"] for batch in trace[:6]} <= {0, 1}, "nothing is known yet"
    assert sum(batch["repeats"] > 1 for batch in trace[6:]) > 4
    assert sum(batch["waiting_seconds"] for batch in trace) > 0.3 * (len(trace) - 2)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_equal_one_process_with_four_times_the_accumulation(four_ranks, tmp_path, name):
    assert_alike(*agreed(four_ranks, name, ranks=4), *alone(tmp_path, name, ranks=4))


def test_a_baseline_on_two_ranks_is_stock_training(two_ranks):
    (ours, numbers), (theirs, stock) = agreed(two_ranks, "baseline"), agreed(two_ranks, "stock")
    assert torch.equal(ours, theirs)
    for key in ("loss", "learning_rate", "eval_loss"):
        assert numbers[key] == stock[key]


def test_a_rule_sees_the_mean_over_targets_also_where_devices_average_for_themselves(two_ranks):
    _, apart = agreed(two_ranks, "means of devices")
    _, together = agreed(two_ranks, "two micro-batches")
    assert apart["history"][0] == pytest.approx(together["history"][0], rel=1e-6)


@pytest.mark.parametrize("name", ["GPT-2", "GPT-2, means of devices"])
def test_a_rule_sees_the_mean_over_targets_also_where_trainer_divides_by_other_labels(two_ranks, name):
    rows = rows_with_a_broken_one(32, broken=10)[:8]  # the first batch of two ranks
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        nll, targets = causal_nll(build_model("gpt2")(batch["input_ids"]).logits, batch["labels"])
    _, numbers = agreed(two_ranks, name)
    assert numbers["history"][0] == pytest.approx(float(nll.sum() / targets.sum()), rel=1e-5)


def reference(name: str) -> str:
    """The DDP scenario of the same model and accumulation."""
    model = SCENARIOS[name].get("model")
    if "without targets" in name:
        return "without targets"
    if "rows" in name:
        return name.partition(", ")[2]
    if "asking" in name:
        return SCENARIOS[name]["trainer"]
    if model is not None:
        return {"lora": "LoRA", "classifier": "classification, broken at first"}[model]
    return "two micro-batches" if SCENARIOS[name].get("gradient_accumulation_steps") == 2 else "one micro-batch"


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_equals_ddp(two_ranks, name):
    weights, numbers = agreed(two_ranks, name)
    assert_alike(weights, numbers, *agreed(two_ranks, reference(name)))
    assert numbers["sharded"] > 0 if "FSDP2" in name else numbers["engine"] == "FullyShardedDataParallel"


@pytest.mark.parametrize("name", [name for name in ZERO if "resumed" not in name])
def test_deepspeed_equals_ddp(two_ranks_of_deepspeed, two_ranks, name):
    weights, numbers = agreed(two_ranks_of_deepspeed, name)
    assert_alike(weights, numbers, *agreed(two_ranks, reference(name)))
    assert numbers["engine"] == "DeepSpeedEngine"


def test_repeats_of_generated_rows_on_two_ranks_are_num_iterations_of_trl(two_ranks):
    (ours, numbers), (theirs, expected) = (agreed(two_ranks, name) for name in GENERATED)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert numbers["reward"] == expected["reward"]
    assert len(numbers["reward"]) == 3
    assert numbers["rule"]["second"] > 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_on_two_ranks_is_bit_identical(request, name):
    directory = request.getfixturevalue("two_ranks_of_deepspeed" if name in ZERO else "two_ranks")
    (weights, numbers), (expected_weights, expected) = agreed(directory, f"{name}, resumed"), agreed(directory, name)
    assert torch.equal(weights, expected_weights)
    assert numbers == expected


def test_ranks_share_the_windows_of_a_measurement_and_all_know_its_result(two_ranks):
    alone = window_nlls(tiny_llama(), some_windows(), batch_size=7)
    for rank in range(2):
        assert json.loads((two_ranks / f"measured-{rank}.json").read_text()) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_write_and_score_texts_as_one_process_to_the_last_bit(request, tmp_path, ranks):
    directory = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks])
    write_texts(str(tmp_path), PartialState(cpu=True))
    alone = json.loads((tmp_path / "texts-0.json").read_text())
    assert len(set(alone[0])) == 7, "each prompt has a text of its own"
    for rank in range(ranks):
        assert json.loads((directory / f"texts-{rank}.json").read_text()) == alone


def test_a_skipped_batch_is_shown_with_the_rows_of_all_ranks(two_ranks, tmp_path):
    alone(tmp_path, "one micro-batch", 2)
    shown, expected = (
        [(line["step"], line["input_ids"]) for line in read_lines(next(directory.rglob("_skipped_batches.jsonl")))]
        for directory in (two_ranks / "one micro-batch", tmp_path)
    )
    assert shown == expected
    assert len(shown) >= 2


@pytest.fixture(scope="module")
def loaded_by_two_ranks(launch, tmp_path_factory):
    """What each rank got, by the name of the loader."""
    directory = tmp_path_factory.mktemp("ranks")
    for part in range(2):
        path = directory / "files" / f"train-{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "".join(
                json.dumps({"text": f"The {word} of {part}."}) + "\n"
                for word in ["girl", "boat", "lamp", "river"] * 12
            )
        )
    launch(2, [], "loaders", directory)
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in LOADERS if "files" not in name])
def test_on_two_ranks_each_row_has_its_index_and_the_batches_are_those_of_stock_trainer(loaded_by_two_ranks, name):
    rows, seen = [row["input_ids"].tolist() for row in token_rows(29)], set()
    for rank in loaded_by_two_ranks:
        found = rank[name]
        assert found["rows"] == found["stock"]
        if "two parts" in name:  # each rank reads one, and knows no place in the whole
            assert not any(found["sources"])
            continue
        assert [[rows[source["index"]] for source in batch] for batch in found["sources"]] == found["rows"]
        seen |= {source["index"] for batch in found["sources"] for source in batch}
    if "stream" not in name and name != "uneven":
        assert seen == set(range(29))


def test_two_ranks_that_share_files_each_name_their_own(loaded_by_two_ranks):
    for part, rank in enumerate(loaded_by_two_ranks):
        found = rank["files, not dispatched"]
        sources = [source for batch in found["sources"] for source in batch]
        assert found["rows"] == found["stock"]
        assert {source["source"] for source in sources} == {f"train-{part}.jsonl"}
        assert [source["first_row"] for source in sources] == sorted(source["first_row"] for source in sources)
        assert sources[0]["first_row"] == 1


TRIALS = [
    *("fails", "is killed", "slow beyond the time-out", "without rows", "a shorter stream", "a shorter set"),
    *("NaN, now and then", "huge, now and then, rows judged"),
]


@pytest.fixture(scope="module")
def befallen(launch):
    return json.loads((launch(2, TRIALS, "trials") / "trials.json").read_text())


@pytest.mark.parametrize("name", TRIALS)
def test_if_something_befalls_one_rank_all_go_on_alike_or_all_end_with_its_message(befallen, name):
    assert not befallen[name]["fault"]
    assert all(befallen[name]["statuses"]) or not any(befallen[name]["statuses"])
