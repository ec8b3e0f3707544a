"""The compute clock."""

from __future__ import annotations

import json
from fractions import Fraction
from xml.etree import ElementTree

from abr_trainer.training.ledger import ComputeLedger, forward_share


def test_a_forward_costs_its_share_of_two_to_four_units_of_work():
    # Units of 2 FLOPs a parameter and token: forward 1, activation gradients 1, weight gradients 1, recomputation 1.
    assert forward_share(frozen_base=False, activation_checkpointing=False) == Fraction(1, 3)
    assert forward_share(frozen_base=True, activation_checkpointing=False) == Fraction(1, 2)
    assert forward_share(frozen_base=False, activation_checkpointing=True) == Fraction(1, 4)
    assert forward_share(frozen_base=True, activation_checkpointing=True) == Fraction(1, 3)


def test_a_pass_costs_one_and_a_skip_its_forward_share():
    ledger = ComputeLedger(share=Fraction(1, 3))
    for backwards, repeats in ((1, 1), (0, 0), (0, 0), (0, 0)):
        ledger.charge_pass(micro_batches=1, backwards=backwards, tokens=8, forward_flops=2.0)
        ledger.close_batch(repeats, seconds=0.5)
    assert ledger.passes == 2  # 1 + 3 * 1/3, exactly
    assert (ledger.batches, ledger.skips, ledger.forwards, ledger.backwards, ledger.updates) == (4, 3, 4, 1, 1)
    assert (ledger.tokens, ledger.seconds) == (32, 2.0)
    assert ledger.flops == 6.0 + 3 * 2.0  # a forward is 2, a forward-backward three times that
    assert ledger.repeats == 0.25


def test_a_skip_under_accumulation_saves_the_last_backward_only():
    ledger = ComputeLedger(share=Fraction(1, 2))
    ledger.charge_pass(micro_batches=4, backwards=3, tokens=0, forward_flops=0.0)
    assert ledger.passes == Fraction(7, 8)  # 4 forwards at 1/8 and 3 backwards at 1/8


def test_extra_forwards_of_a_loss_are_charged():
    ledger = ComputeLedger(share=Fraction(1, 3), extra_forwards=Fraction(1))
    ledger.charge_pass(micro_batches=2, backwards=2, tokens=10, forward_flops=1.0)
    assert (ledger.passes, ledger.pass_cost) == (Fraction(4, 3), Fraction(4, 3))
    assert (ledger.forwards, ledger.backwards, ledger.tokens, ledger.flops) == (4, 2, 20, 4.0)
    ledger.charge_pass(micro_batches=1, backwards=0, tokens=5, forward_flops=1.0)  # a skip: two forwards
    assert ledger.passes == 2
    ledger.extra_forwards = Fraction(1, 2)  # one more forward for two micro-batches
    ledger.charge_pass(micro_batches=2, backwards=2, tokens=10, forward_flops=1.0)
    assert (ledger.passes, ledger.forwards) == (2 + Fraction(7, 6), 4 + 2 + 3)


def test_the_state_is_json_and_exact():
    ledger = ComputeLedger(share=Fraction(1, 3), extra_forwards=Fraction(1, 4))
    ledger.charge_pass(micro_batches=3, backwards=2, tokens=5, forward_flops=0.1)
    ledger.close_batch(0, seconds=0.1)
    restored = ComputeLedger()
    restored.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert restored == ledger


def test_a_ledger_is_printed_as_a_small_table_and_its_repr_tells_all():
    ledger = ComputeLedger(batches=1234, skips=3, passes=Fraction(7, 3), updates=1300, tokens=1536, flops=3.25e15)
    lines = str(ledger).splitlines()
    assert lines[:4] == [
        "batches           1,234",
        "skipped               3  0.2% of the batches",
        "passes             2.33",
        "updates           1,300",
    ]
    assert [line.split()[0] for line in lines[4:]] == ["updates/batch", "tokens", "FLOPs", "seconds"]
    assert f"{ledger}" == str(ledger)
    assert eval(repr(ledger)) == ledger  # `Fraction` and `ComputeLedger` are imported here


def test_a_ledger_tells_where_the_time_went_as_far_as_that_is_much():
    times = dict(seconds=80.0, waiting_seconds=20.0, evaluation_seconds=15.0, saving_seconds=0.4, total_seconds=100.0)
    assert str(ComputeLedger(batches=4, **times)).splitlines()[-5:] == [
        "seconds           80.0",
        "in passes         60.0  60.0% of 100.0 s",
        "waiting for data  20.0  20.0% of 100.0 s",
        "evaluation        15.0  15.0% of 100.0 s",
        "rest               4.6  4.6% of 100.0 s",
    ]
    generated = ComputeLedger(batches=4, seconds=10.0, generating_seconds=9.0)
    assert str(generated).splitlines()[-2:] == [
        "in passes       1.0  10.0% of 10.0 s",
        "generating      9.0  90.0% of 10.0 s",
    ]
    assert str(ComputeLedger(batches=4, seconds=10.0)).splitlines()[-1].startswith("seconds"), "all of it in passes"


def test_a_ledger_of_a_run_that_judged_rows_counts_those_dropped():
    ledger = ComputeLedger(batches=2, rows=1600, rows_dropped=12)
    assert "rows dropped     12  0.75% of 1,600 rows" in str(ledger).splitlines()
    assert "rows" not in str(ComputeLedger(batches=2))
    assert "nan" not in str(ComputeLedger())


def test_a_notebook_shows_a_ledger_as_the_same_table():
    ledger = ComputeLedger(batches=4, skips=1, rows=8, rows_dropped=1, seconds=3.0, waiting_seconds=1.0)
    assert ("waiting for data", "1.0", "33.3% of 3.0 s") in ledger.table()
    cells = [cell for row in ledger.table() for cell in row]
    root = ElementTree.fromstring(ledger._repr_html_())
    assert [cell.text or "" for cell in root.iter("td")] == cells
    assert len(ledger._repr_html_()) < 2000
