"""Files of flags: what stands there is what the command gets."""

from __future__ import annotations

import pytest

from abr_trainer.records.flags import expand_flags_file, read_flags_file


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("seed: 010", ["--seed", "010"]),
        ("output_dir: 1.10", ["--output_dir", "1.10"]),
        ("run_name: 12:30:00", ["--run_name", "12:30:00"]),
        ("run_name: 2026-01-01", ["--run_name", "2026-01-01"]),
        ("seed: 0x10", ["--seed", "0x10"]),
        ("max_passes: 1_000", ["--max_passes", "1_000"]),
        ("learning_rate: 1.0e-4", ["--learning_rate", "1.0e-4"]),
        ("outlier_sigmas: .inf", ["--outlier_sigmas", ".inf"]),
        ("classes: [01, yes, 1.50]", ["--classes", "01", "true", "1.50"]),
        ("bf16: true\nsave_strategy: no", ["--bf16", "true", "--save_strategy", "no"]),
        ("run_name: --bf16", ["--run_name=--bf16"]),
        ("learning_rate: -1", ["--learning_rate", "-1"]),
        ("repeat_scheduler_kwargs: {max_repeats: 3}", ["--repeat_scheduler_kwargs", '{"max_repeats": 3}']),
        ("seed:\nlearning_rate: 1", ["--learning_rate", "1"]),
        ('{"seed": 3, "learning_rate": 1e-3}', ["--seed", "3", "--learning_rate", "1e-3"]),
        ("base: &b {r: 8}\n<<: {seed: 1}", ["--seed", "1", "--base", '{"r": 8}']),
    ],
)
def test_a_value_is_passed_on_as_it_is_written(tmp_path, text, flags):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert read_flags_file(path) == flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: 1\nseed: 2\n", "has seed twice. Leave one out."),
        (b"max_passes: 1\nmax-passes: 2\n", "has max_passes twice, also as max-passes. Leave one out."),
        (b"? [a]\n: 1\n", "must contain a mapping of flags to values."),
        (b"- seed\n", "must contain a mapping of flags to values."),
        (b"", "must contain a mapping of flags to values."),
        (b"'': 1\n", "has a value without the name of a flag."),
        (b"classes: [a, [b]]\n", "the list of classes must hold texts or numbers."),
        (b"classes: [a, null]\n", "the list of classes must hold texts or numbers."),
        (b"env: [1]\n", "env must be a mapping of environment variables to values."),
        (b"env: {A: null}\n", "env must be a mapping of environment variables to values."),
        (b"env: {A: 1, A: 2}\n", "has A twice. Leave one out."),
        (b"env: {'A=B': 1}\n", "env cannot be set: "),
        (b"seed: \xff\n", "is not UTF-8 text: "),
        (b"seed: !!python/object:os.system x\n", "is not valid: could not determine a constructor"),
        (b"a: " + b"[" * 3000, "is not valid: "),
        (b"seed: *no\n", "is not valid: found undefined alias"),
    ],
)
def test_a_file_that_means_two_things_or_nothing_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="^") as caught:
        expand_flags_file([str(path)])
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
