"""The card in the directory of a run, whether the run is pushed or not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

import run_clm_abr
from abr_trainer import ABRConfig
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.hub.card_merging import MARKER
from tests.conftest import RUN, token_rows

pytestmark = pytest.mark.slow

TEMPLATE = "More Information Needed"


def lora():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.fixture
def trained(train):
    """A trainer of an adapter, used from Python; nothing is saved yet."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    options = {"processing_class": tokenizer, "data_collator": default_data_collator}
    return train(
        model=lora(),
        data=token_rows(12),
        config_cls=lambda **config: ABRConfig(**config, repeat_scheduler="fixed", max_repeats=3),
        trainer_options=options,
    )


def card_of(trainer):
    return Path(trainer.args.output_dir, "README.md").read_text()


def test_a_saved_adapter_has_our_card_and_it_says_how_to_load_it(trained):
    trained.save_model()
    card = card_of(trained)
    assert TEMPLATE not in card
    assert MARKER in card
    for said in ("ConstantScheduler(repeats=3", "r 2, alpha 8", "| 6 | 0 | 18 |", "Versions: ", "## Limits"):
        assert said in card, said
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)\n```", card, flags=re.DOTALL)[1], names)
    assert isinstance(names["model"], PeftModel)
    assert json.loads(Path(trained.args.output_dir, "abr_summary.json").read_text())["ledger"]["updates"] == 18


def test_a_card_of_the_users_own_keeps_its_text_and_its_metadata(trained):
    own = Path(trained.args.output_dir, "README.md")
    own.write_text("---\nlicense: mit\nmine: {deep: [1, 2]}\n---\n# For my cat\n\nIt purrs.\n")
    for _ in range(2):
        trained.save_model()
        card = card_of(trained)
        above, below = card.split(MARKER)
        assert above.endswith("# For my cat\n\nIt purrs.\n\n"), "PEFT would add to it"
        assert "ConstantScheduler(repeats=3" in below
        assert card.count("It purrs.") == card.count(MARKER) == 1
        assert ModelCard(card).data.license == "mit"
        assert "mine: {deep: [1, 2]}\n" in above
        assert ModelCard(card).data.tags == ["lora", "adaptive-batch-repetition"]


def test_what_the_card_was_told_stays_when_the_model_is_saved_again(trained):
    trained.save_model()
    trained.create_model_card(language="en", license="apache-2.0", tags="cats")
    trained.save_model()
    data = ModelCard(card_of(trained)).data
    assert (data.language, data.license) == ("en", "apache-2.0")
    assert data.tags == ["lora", "adaptive-batch-repetition", "cats"]


def test_elsewhere_and_before_training_the_card_is_left_to_others(build, trained, tmp_path):
    trained.save_model(str(tmp_path / "elsewhere"))
    assert TEMPLATE in (tmp_path / "elsewhere" / "README.md").read_text()
    assert not Path(trained.args.output_dir, "README.md").exists()
    untrained = build(model=lora(), config_cls=ABRConfig, output_dir=str(tmp_path / "untrained"))
    untrained.save_model()
    assert TEMPLATE in card_of(untrained), "there is nothing to say of a run"


def test_a_passive_trainer_leaves_the_card_of_peft(train):
    trainer = train(model=lora(), config_cls=TrainingArguments)
    trainer.save_model()
    assert TEMPLATE in card_of(trainer)
    assert not Path(trainer.args.output_dir, "abr_summary.json").exists()


@pytest.mark.parametrize("content", [b"---\nlicense: [\n---\n# Mine\n", "# Stra\xdfe\n".encode("latin-1")])
def test_a_card_that_cannot_be_read_is_left_as_it_is_and_the_model_is_saved(train, caplog, content):
    trainer = train(config_cls=ABRConfig)
    own = Path(trainer.args.output_dir, "README.md")
    own.write_bytes(content)
    trainer.save_model()
    assert own.read_bytes() == content
    assert "README.md is left as it was: " in caplog.text
    assert Path(trainer.args.output_dir, "model.safetensors").exists()


def test_a_whole_model_gets_a_card_too(train):
    trainer = train(config_cls=ABRConfig)
    trainer.save_model()
    assert "Fine-tuned from a base model that is not on the Hub" in card_of(trainer)


def test_a_command_that_pushes_nothing_leaves_our_card_with_what_was_measured_in_the_end(tmp_path):
    run_clm_abr.main([*RUN, "--do_predict", "--output_dir", str(tmp_path / "run")])
    card = (tmp_path / "run" / "README.md").read_text()
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    measured = {each.metric_name: each.metric_value for each in ModelCard(card).data.eval_results}
    assert measured["perplexity (token), test, final"] == pytest.approx(results["test_perplexity"], rel=1e-5)
    assert "abr train --dataset_name demo" in card
    assert TEMPLATE not in card


def test_positional_arguments_of_the_card_are_told_too(trained):
    trained.save_model()
    trained.create_model_card("en", "mit", ["cats"])
    data = ModelCard(card_of(trained)).data
    assert (data.language, data.license) == ("en", "mit")
    assert "cats" in data.tags


def test_a_summary_that_fails_leaves_the_card_and_the_run(trained, caplog):
    trained.save_model()
    card = card_of(trained)
    summary = Path(trained.args.output_dir, "abr_summary.json")
    summary.unlink()
    summary.mkdir()  # nothing can be written there
    trained.create_model_card(language="en")
    assert card_of(trained) == card
    assert "README.md is left as it was" in caplog.text
