"""Repeating what an earlier run has done."""

from __future__ import annotations

import json
import math

import pytest

from abr_trainer.schedulers import FollowScheduler, Outcome
from tests.schedulers.streams import batch_of_trace, feed, seen, trace_in

REPLAYED = [
    batch_of_trace(1),
    batch_of_trace(2),
    batch_of_trace(3, replayed=[{"step": 1, "loss": 2.0}]),
    batch_of_trace(4, replayed=[{"step": 2, "loss": 2.0}, {"step": 1, "loss": None}]),
    batch_of_trace(5),
]


def following(tmp_path, *batches):
    return FollowScheduler(trace_in(tmp_path, batches))


def test_each_batch_gets_the_passes_that_it_got(tmp_path):
    rule = following(tmp_path, *[batch_of_trace(step, repeats) for step, repeats in enumerate([1, 3, 0, 2], 1)])
    assert feed(rule, [3.0] * 4) == [1, 3, 0, 2]
    assert rule.wants == frozenset()


def test_a_directory_stands_for_the_trace_in_it(tmp_path):
    trace_in(tmp_path, [batch_of_trace(1, 2)])
    assert FollowScheduler(str(tmp_path)).decide(seen(3.0)) == 2
    assert repr(FollowScheduler(tmp_path)) == f"FollowScheduler(trace={str(tmp_path)!r})"


def test_a_pass_that_failed_is_made_again(tmp_path):
    # Of three passes the last had no finite loss: two updates were made.
    failed = batch_of_trace(1, repeats=2, losses=[3.0, 2.9, None], reason="non-finite")
    assert following(tmp_path, failed).decide(seen(3.0)) == 3


@pytest.mark.parametrize(
    "skipped",
    [
        batch_of_trace(1, repeats=0, reason="gradient", grad_norm=90.0),
        batch_of_trace(1, repeats=0, reason="non-finite"),  # an infinite norm is not in the trace
    ],
)
def test_a_skip_after_the_backward_is_decided_after_it(tmp_path, skipped):
    rule = following(tmp_path, skipped)
    assert "grad_norm" in rule.wants
    assert rule.decide(seen(3.0)) == 1
    assert rule.decide(seen(3.0, grad_norm=90.0)) == 0


def test_a_batch_without_a_finite_loss_asks_for_no_gradient(tmp_path):
    rule = following(tmp_path, batch_of_trace(1, repeats=0, loss=None, losses=[None], reason="non-finite"))
    assert rule.wants == frozenset()
    assert rule.decide(seen(3.0)) == 0


def test_what_is_replayed_later_is_held_until_its_last_use(tmp_path):
    rule = following(tmp_path, *REPLAYED)
    assert rule.wants == {"inputs"}
    held, replayed = [], []
    for batch in range(5):
        replayed.append(list(rule.replay(seen(3.0, batch))))
        rule.observe(Outcome(seen(3.0, batch), 1, (3.0,)))
        held.append(list(rule.held()))
    assert replayed == [[], [], [0], [1, 0], []]
    assert held == [[0], [0, 1], [0, 1], [], []]


def test_it_goes_on_from_its_state(tmp_path):
    rule, again = following(tmp_path, *REPLAYED), following(tmp_path, *REPLAYED)
    feed(rule, [3.0] * 3)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again == rule
    assert again.held() == rule.held() == [0, 1]
    assert "losses" not in str(rule.state_dict())


def test_a_trace_that_has_changed_is_refused(tmp_path):
    rule = following(tmp_path, *REPLAYED)
    feed(rule, [3.0] * 3)
    state = rule.state_dict()
    later = [*REPLAYED[:4], batch_of_trace(5, repeats=2)]
    following(tmp_path, *later).load_state_dict(state)  # what is not followed yet may be another
    for changed in ([batch_of_trace(1, repeats=2), *REPLAYED[1:]], REPLAYED[:2]):
        with pytest.raises(ValueError, match="has changed: its first 3 batches are not those") as caught:
            following(tmp_path, *changed).load_state_dict(state)
        assert "\n" not in str(caught.value)


def test_it_ends_with_its_trace(tmp_path):
    rule = following(tmp_path, *[batch_of_trace(step) for step in (1, 2)])
    with pytest.raises(ValueError, match=r"has 2 batches, and this run has a batch 3\. Train on fewer") as caught:
        feed(rule, [3.0] * 3)
    assert str(tmp_path) in str(caught.value)
    rule.observe(Outcome(seen(math.nan, 5), 0, (math.nan,), "non-finite"))  # what the trainer skips by itself
    assert rule.evidence(seen(3.0, 5)) == {"batches in the trace": 2}


def test_it_says_where_the_losses_begin_to_differ(tmp_path):
    rule = following(tmp_path, *[batch_of_trace(step) for step in range(1, 6)])
    feed(rule, [3.0, 3.0 + 1e-9])
    assert rule.remark([]) is None
    feed(rule, [3.0, 3.1, 3.0], first_batch=2)
    assert "the losses differ from batch 4 on" in rule.remark([])
    broken = following(tmp_path, batch_of_trace(1, 0, loss=None, losses=[None]), batch_of_trace(2))
    feed(broken, [3.0])
    assert "the losses differ from batch 1 on" in broken.remark([])


GOOD = json.dumps(batch_of_trace(1)) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no batch."),
        (
            GOOD + '{"step": 2, "lo',
            "is cut off in line 2: the run was killed while it wrote. Resume that run, or delete",
        ),
        (GOOD + "{}\n", "line 2 of .* is no batch of a trace: '{}'"),
        (GOOD + "[1]\n", "line 2 of .* is no batch of a trace"),
        (GOOD + "not JSON\n", "line 2 of .* is no batch of a trace: 'not JSON'"),
        (GOOD + '{"step": 2, "loss": 3.0, "repeats": 1}\n', "line 2 of .* is no batch of a trace"),
        (GOOD + GOOD, "line 2 of .* is batch 1, and should be batch 2"),
        (GOOD + json.dumps(batch_of_trace(3)) + "\n", "line 2 of .* is batch 3, and should be batch 2"),
        (
            GOOD + json.dumps(batch_of_trace(2, replayed=[{"step": 2, "loss": 1.0}])) + "\n",
            "batch 2 comes back to batch 2, which is not before it",
        ),
        ("\xff", "cannot be read"),
    ],
)
def test_a_trace_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "abr_trace.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        FollowScheduler(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
