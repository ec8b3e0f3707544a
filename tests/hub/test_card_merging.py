"""What people have written into a card, and what of it is there after the next push."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard

from abr_trainer.hub.card_merging import MARKER, merged_card, read_card

OURS = f"""---
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- adaptive-batch-repetition
base_model: org/base
---

{MARKER}

# New
"""

THEIRS = """# a comment of mine
license: other
license_name: my-own
language: no   # Norwegian
extra_gated_prompt: |
  You agree
  to be kind.
extra_gated_fields:
  Name: text
  Purpose:
    type: select
    options: [Research, "Other"]
widget:
- text: "Once upon"
date: 2024-01-31
tags:
- mine
- lora
"""


def merge(remote=None, local=None, ours=OURS, files=()):
    return merged_card(ours, remote, local, files)


def with_block(block, text="", begin=""):
    return f"{begin}---\n{block}---\n{text}"


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    "text", ["", "\n# My text\n", f"\n# My text\n\n{MARKER}\n\n# Old\n", f"\n{MARKER}\n\n# Old\n"]
)
@pytest.mark.parametrize("where", ["remote", "local"])
def test_metadata_of_people_stay_with_and_without_a_text(text, where):
    new = merge(**{where: with_block(THEIRS, text)})
    for kept in THEIRS.partition("tags:")[0].splitlines(keepends=True):
        assert kept in new, "as it was written, comments included"
    assert metadata(new)["tags"] == ["lora", "adaptive-batch-repetition", "mine"]
    assert metadata(new)["library_name"] == "peft"
    assert metadata(new)["base_model"] == "org/base"
    assert ("# My text" in new.partition(MARKER)[0]) == ("# My text" in text)
    assert "# Old" not in new
    assert new.count("license:") == 1
    assert ModelCard(new).data.license == "other"


def test_tags_of_people_and_ours_are_one_list():
    assert metadata(merge(with_block(THEIRS)))["tags"] == ["lora", "adaptive-batch-repetition", "mine"]
    sorted_by_hand = "tags: [adaptive-batch-repetition, lora, mine]  # by the alphabet\n"
    assert sorted_by_hand in merge(with_block(sorted_by_hand))
    assert metadata(merge(with_block("tags: mine\n")))["tags"] == ["lora", "adaptive-batch-repetition", "mine"]
    assert metadata(merge(with_block("tags:\n"), with_block("tags: [a, lora]\n", "# Text\n")))["tags"] == [
        "lora",
        "adaptive-batch-repetition",
        "a",
    ]


@pytest.mark.parametrize("begin", ["\ufeff", "\n", "\n \n\n", "\ufeff\n"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_marks_of_editors_do_not_hide_the_metadata(begin, line_break):
    card = with_block(THEIRS, "\n# My text\n", begin).replace("\n", line_break)
    new = merge(card)
    assert metadata(new)["license"] == "other"
    assert new.count("---\n") == 2
    assert new.partition(MARKER)[0].rstrip().endswith("---\n\n# My text")


def test_a_block_that_peft_has_put_before_one_with_a_byte_order_mark_hides_nothing():
    new = merge(local="---\nlibrary_name: peft\n---\n\ufeff---\nlicense: mit\n---\n\n# My text\n")
    assert metadata(new)["license"] == "mit"
    assert new.count("---\n") == 2
    assert "# My text" in new.partition(MARKER)[0]


def test_a_line_above_and_below_a_text_is_no_metadata():
    new = merge("---\nWritten with care\n---\n\nMore of it.\n")
    assert "---\nWritten with care\n---\n\nMore of it." in new.partition(MARKER)[0]


def test_what_an_earlier_push_put_there_goes_and_what_people_changed_stays():
    first = merge()
    edited = first.replace("- lora\n", "- mine\n- lora\n", 1).replace("text-generation\n", "translation\n", 1)
    again = OURS.replace("- lora\n", "- prompt-tuning\n").replace("base_model: org/base\n", "")
    data = metadata(merge(edited, ours=again))
    assert data["tags"] == ["prompt-tuning", "adaptive-batch-repetition", "mine"]
    assert data["pipeline_tag"] == "translation"
    assert "base_model" not in data, "that of the first push"
    named = first.replace("org/base", "org/other", 1)
    assert metadata(merge(named, ours=again))["base_model"] == "org/other", "named by somebody"
    assert metadata(merge(first, ours=OURS.replace("org/base", "org/new")))["base_model"] == "org/new"


def test_what_was_pushed_twice_is_what_was_pushed_once():
    once = merge(with_block(THEIRS, "# My text\n"), files=["a.json"])
    assert merge(once, once, files=["a.json"]) == once
    assert read_card(once).files == ["a.json"]


def test_of_two_cards_that_of_the_hub_counts_and_the_other_adds_to_it():
    new = merge(with_block("license: mit\n", "# Theirs\n"), with_block("license: gpl\nlanguage: en\n", "# Mine\n"))
    assert (metadata(new)["license"], metadata(new)["language"]) == ("mit", "en")
    assert "# Theirs" in new
    assert "# Mine" not in new


def test_what_peft_writes_into_the_directory_of_a_run_is_not_taken_for_what_people_wrote():
    template = "# Model Card\n\n" + 3 * "[More Information Needed]\n"
    block = "base_model: /home/me/base\nlibrary_name: peft\nlicense: mit\ntags:\n- base_model:adapter:/home/me/base\n"
    new = merge(local=with_block(block, template), ours=OURS.replace("base_model: org/base\n", ""))
    assert "/home/me" not in new
    assert metadata(new)["license"] == "mit"


def result(value, name="perplexity (token), test, final"):
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "org/text", "name": "org/text"},
        "metrics": [{"type": "perplexity", "name": name, "value": value}],
    }


def test_results_that_people_added_stay_beside_ours_and_ours_are_renewed():
    def ours(value):
        index = yaml.safe_dump({"model-index": [{"name": "run", "results": [result(value)]}]})
        return OURS.replace("base_model:", f"{index}base_model:")

    first = merge(ours=ours(5.0))
    data = metadata(first)
    data["model-index"][0]["results"].append(result(0.3, "arc_easy"))
    data["model-index"].append({"name": "elsewhere", "results": [result(7.0)]})
    edited = with_block(yaml.safe_dump(data, sort_keys=False), first.split("---\n")[2])
    index = metadata(merge(edited, ours=ours(4.0)))["model-index"]
    values = {(entry["name"], each["metrics"][0]["value"]) for entry in index for each in entry["results"]}
    assert values == {("run", 4.0), ("run", 0.3), ("elsewhere", 7.0)}
    unrecorded = first.partition("<!-- pushed")[0]
    assert metadata(merge(unrecorded, ours=ours(4.0)))["model-index"][0]["results"] == [result(4.0)]


@pytest.mark.parametrize("block", ["license: [\n", "license: mit\n\tx: 1\n", "a: b: c\n"])
def test_metadata_that_are_no_yaml_are_named_with_their_line(block):
    card = read_card(with_block(block, "# My text\n"))
    assert card.problem
    assert ", line " in card.problem
    assert "# My text" in merge(with_block(block, "# My text\n"))


def test_entries_that_refer_to_each_other_mean_the_same_afterwards():
    new = merge(with_block("tags: &all [mine]\nalso: *all\n"))
    assert metadata(new)["also"] == ["mine"]
    assert metadata(new)["tags"] == ["lora", "adaptive-batch-repetition", "mine"]


def test_metadata_on_one_line_stay():
    assert metadata(merge(with_block("{license: mit, tags: [mine]}\n")))["license"] == "mit"
