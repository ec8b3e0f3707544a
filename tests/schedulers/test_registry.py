"""Finding a scheduler by name."""

from __future__ import annotations

import pytest

from abr_trainer.schedulers import (
    ConstantScheduler,
    ThresholdScheduler,
    UniformScheduler,
    get_outlier_rule,
    get_repeat_scheduler,
)


def test_names_give_schedulers_with_parameters():
    assert get_repeat_scheduler("baseline") == ConstantScheduler(repeats=1)
    assert get_repeat_scheduler("fixed", repeats=3) == ConstantScheduler(repeats=3)
    assert get_repeat_scheduler("random", max_repeats=2, seed=5) == UniformScheduler(max_repeats=2, seed=5)
    assert get_repeat_scheduler("abr", loss_threshold=2.0) == ThresholdScheduler(loss_threshold=2.0)


def test_a_class_is_found_by_its_import_path():
    found = get_repeat_scheduler("abr_trainer.schedulers:ThresholdScheduler", max_repeats=2)
    assert found == ThresholdScheduler(max_repeats=2)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "abrr",
            {},
            "Unknown repeat scheduler 'abrr'. Did you mean 'abr'. Choose from: abr, baseline, ",
        ),
        ("abr", {"treshold": 1}, "'abr' has no parameter 'treshold'. It takes: loss_threshold, max_repeats."),
        ("no.such.module:Mine", {}, "Cannot import repeat scheduler 'no.such.module:Mine'"),
        ("math:Mine", {}, "Cannot import repeat scheduler 'math:Mine'"),
        ("math:sqrt", {}, "'math:sqrt' is not a RepeatScheduler subclass. It has no RepeatScheduler subclass."),
        ("fixd:2", {}, "There is no module 'fixd' in /.* or among the installed packages. Did you mean 'fixed'?"),
        ("math:Mine", {}, "math has no 'Mine'. It has no RepeatScheduler subclass."),
        ("some/my_rules.py:Mine", {}, "Give a module, not a file: some.my_rules:Mine."),
        ("abr_trainer.schedulers:RepeatScheduler", {}, "cannot be built"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(name, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_repeat_scheduler(name, **kwargs)
    assert "\n" not in str(caught.value)


RULES = """
from abr_trainer.schedulers import RepeatScheduler, ThresholdScheduler, WrappedScheduler
class OnlyFirst(RepeatScheduler):
    def decide(self, observation):
        return 1
class Other(OnlyFirst):
    pass
"""


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            RULES,
            "OnlyFirstHalf",
            "has no 'OnlyFirstHalf'. Its RepeatScheduler subclasses: OnlyFirst, Other. Did you mean",
        ),
        (RULES, "RULES", "has no 'RULES'. Its RepeatScheduler subclasses: OnlyFirst, Other."),
        ("from abr_trainer.schedulers import *", "Threshold", "Did you mean 'ThresholdScheduler'"),
        ("import nowhere_to_be_found", "Mine", "ModuleNotFoundError: No module named 'nowhere_to_be_found'."),
        ("\nclass Mine(:", "Mine", r"SyntaxError: .*, line 2\)\.$"),
        ("\n\nMine = missing", "Mine", r"NameError: name 'missing' is not defined \(.*, line 3\)\.$"),
    ],
)
def test_what_is_wrong_with_a_file_of_rules_is_told(tmp_path, monkeypatch, text, name, message):
    module = f"rules_{abs(hash(text + name))}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        get_repeat_scheduler(f"{module}:{name}")
    assert str(caught.value).startswith(f"Cannot import repeat scheduler '{module}:{name}': ")
    assert "\n" not in str(caught.value)


def test_an_unknown_outlier_rule_is_told():
    with pytest.raises(ValueError, match="Unknown outlier rule 'robbust'"):
        get_outlier_rule("robbust", ConstantScheduler())
