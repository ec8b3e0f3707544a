"""What of a run goes to the Hub, how it gets there, and that a stranger can use it: with the real client."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm_abr
from abr_trainer.cli import classify, evaluate
from abr_trainer.cli import push as push_verb
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.hub import repository as hub_module
from abr_trainer.hub.card import text_of
from abr_trainer.hub.card_merging import MARKER, merged_card, read_card
from abr_trainer.hub.local_names import LOCAL_NAMES, is_on_the_hub, local_path
from abr_trainer.report import pictures
from tests.conftest import RUN, tiny_llama
from tests.hub_server import READ_TOKEN, WRITE_TOKEN
from tests.sentence_rows import QUICK, tales_and_reports, write_rows

pytestmark = pytest.mark.slow

PUSH = ["--push_to_hub", "--hub_model_id", "me/adapter", "--hub_base_model", "demo-org/base"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(hub_module, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module", autouse=True)
def pictures_are_drawn_once():
    """Most pushes here are of runs with the same numbers, and drawing them takes longer than pushing them."""
    draw, drawn = pictures._render, {}

    def render(figure, look_of):
        key = figure, *look_of.items()
        if key not in drawn:
            drawn[key] = draw(figure, look_of)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_render", render)
        yield


def run_script(output, *flags):
    return run_clm_abr.main([*RUN, *PUSH, *flags, "--output_dir", str(output)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was told where to push, and did not."""
    output = tmp_path_factory.mktemp("trained") / "run"
    repeats = ["--do_predict", "--repeat_scheduler", "fixed", "--max_repeats", "2"]
    run_clm_abr.main([*RUN, *PUSH, *repeats, "--push_to_hub", "false", "--output_dir", str(output)])
    return output


@pytest.fixture
def finished(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def push(run, *flags):
    return push_verb.main([str(run), *flags])


def test_a_stranger_loads_what_was_pushed(hub, tmp_path):
    run_script(tmp_path / "run", "--do_predict", "--hub_strategy", "end")
    repository = hub.repository("me/adapter")
    files = repository.files("main")
    assert set(files) - {".gitattributes"} == {
        "README.md",
        "abr_summary.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "all_results.json",
        "perplexity_history.json",
        "plots/batches.png",
        "plots/perplexity.png",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "demo-org/base"
    assert files["plots/batches.png"].startswith(b"\x89PNG")
    assert len(repository.commits) == 2, "the repository, and all of the adapter at once"
    ids = torch.tensor([[5, 6, 7, 8]])
    stranger = Path(snapshot_download("me/adapter"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), stranger).eval()
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), tmp_path / "run").eval()
    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert AutoTokenizer.from_pretrained(stranger).encode("A word") == AutoTokenizer.from_pretrained(
        DEMO_MODEL
    ).encode("A word")
    assert not list((tmp_path / "run").glob("_push-*"))


def test_the_card_says_what_it_is_and_the_hub_takes_it(hub, finished):
    push(finished)
    results = json.loads((finished / "all_results.json").read_text())
    card = ModelCard(hub.repository("me/adapter").files("main")["README.md"].decode())
    card.validate()
    assert card.data.base_model == "demo-org/base"
    assert card.data.library_name == "peft"
    measured = {each.metric_name: each.metric_value for each in card.data.eval_results}
    history = json.loads((finished / "perplexity_history.json").read_text())["summary"]
    assert measured == {
        "perplexity (token), validation, before training": pytest.approx(history["baseline"], rel=1e-5),
        "perplexity (token), validation, best": pytest.approx(history["best"], rel=1e-5),
        "perplexity (token), validation, final": pytest.approx(results["eval_perplexity"], rel=1e-5),
        "perplexity (token), test, final": pytest.approx(results["test_perplexity"], rel=1e-5),
    }
    loading = re.search(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL)[1]
    assert len(loading.splitlines()) == 5
    names = {}
    exec(loading.replace("demo-org/base", str(DEMO_MODEL)), names)
    assert isinstance(names["model"], PeftModel)
    for said in (
        "--repeat_scheduler fixed --max_repeats 2",
        "ConstantScheduler(repeats=2",
        "r 8, alpha 32",
        "Versions: ",
        "## Limits",
    ):
        assert said in card.text, said
    assert "--output_dir" in card.text, "the exact command"
    assert f"| {results['train_batches']} | {results['train_skips']} | {results['train_updates']} |" in card.text


def card_of(repository):
    return repository.files("main")["README.md"].decode()


def edited(card, text):
    """Return a card as somebody leaves it who has something to say."""
    return card.replace(MARKER, f"{text}\n\n{MARKER}").replace("library_name", "license: mit\nlibrary_name")


@pytest.mark.parametrize("where", ["here", "on the Hub"])
def test_what_was_written_above_the_marker_stays(hub, finished, where):
    push(finished)
    repository = hub.repository("me/adapter")
    card = card_of(repository)
    changed = edited(card, "# A much better name\n\nMade for my cat.")
    if where == "here":
        (finished / "README.md").write_text(changed)
    else:
        api = hub_module.HfApi()
        api.upload_file(path_or_fileobj=changed.encode(), path_in_repo="README.md", repo_id="me/adapter")
    push(finished, "--hub_base_model", "other/base")
    again = card_of(repository)
    assert "# A much better name\n\nMade for my cat.\n" in again.partition(MARKER)[0]
    assert "An adapter (lora) for [other/base]" in again.partition(MARKER)[2]
    assert ModelCard(again).data.license == "mit"
    assert ModelCard(again).data.base_model == "other/base"
    assert (finished / "README.md").read_text() == again


def upload(content, path, repository="me/adapter"):
    content = content if isinstance(content, bytes) else content.encode()
    hub_module.HfApi().upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repository)


@pytest.mark.parametrize("begin", ["", "\ufeff\n"])
def test_metadata_on_the_hub_stay_where_nothing_is_written_above_the_marker(hub, finished, begin):
    push(finished)
    repository = hub.repository("me/adapter")
    block = "license: mit\nextra_gated_prompt: Be kind.\nmine: {deep: [1, 2]}\n"
    upload(begin + card_of(repository).replace("library_name", f"{block}library_name"), "README.md")
    push(finished)
    again = card_of(repository)
    assert block in again
    assert again.startswith("---\n")
    assert again.count("library_name") == 2, "in the metadata, and in what is said of the push"


def test_metadata_here_that_are_no_yaml_are_kept_and_told(hub, finished, caplog):
    (finished / "README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    push(finished)
    assert (finished / hub_module.OWN_CARD).read_text() == "---\nlicense: [\n---\n# Mine\n"
    assert "README.md are not valid YAML and were not pushed: expected" in caplog.text
    assert "# Mine" in card_of(hub.repository("me/adapter"))


def test_metadata_here_that_give_way_to_those_on_the_hub_are_kept(hub, finished, caplog):
    push(finished)
    card = card_of(hub.repository("me/adapter"))
    upload(card.replace("library_name", "license: mit\nlibrary_name", 1), "README.md")
    mine = card.replace("library_name", "license: apache-2.0\nlanguage: en\nlibrary_name", 1)
    (finished / "README.md").write_text(mine)
    push(finished)
    data = read_card(card_of(hub.repository("me/adapter"))).data
    assert (data["license"], data["language"]) == ("mit", "en")
    assert (finished / hub_module.OWN_CARD).read_text() == mine
    assert "The pushed card has other values for license. " in caplog.text


def test_a_card_here_that_is_no_utf_8_is_told_before_anything_is_pushed(hub, finished):
    (finished / "README.md").write_bytes("# Stra\xdfe\n".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"^error: .*README.md cannot be read: 'utf-8' codec .* Save it as UTF-8.$"):
        push(finished)
    assert len(hub.repository("me/adapter").commits) == 1


def test_files_that_no_push_has_put_there_stay(hub, finished, caplog):
    hub_module.HfApi().create_repo("me/adapter")
    own = {"config.json": "{}", "plots/mine.png": "drawn", "training_args.bin": "mine", "notes/all_results.json": "{}"}
    for path, content in {**own, "model.safetensors": "mine, too", "tokenizer.json": "{}"}.items():
        upload(content, path)
    push(finished)
    upload("later", "plots/later.png")
    shutil.rmtree(finished / "plots", ignore_errors=True)
    (finished / "all_results.json").unlink()
    (finished / "abr_trace.jsonl").unlink()
    push(finished)
    files = hub.repository("me/adapter").files("main")
    assert {path: files[path].decode() for path in own} == own
    assert {"plots/later.png", "model.safetensors"} <= set(files)
    assert not {"plots/batches.png", "all_results.json"} & set(files), "of the first push, and not of the second"
    told = "me/adapter also has model.safetensors, not from a push of a run, which is kept."
    assert caplog.text.count(told) == 1, "and not at each save"
    told = "me/adapter already had tokenizer.json, not from a push of a run. Replaced;"
    assert caplog.text.count(told) == 1


def test_of_two_texts_that_of_the_hub_counts_and_the_other_is_kept_here(hub, finished, caplog):
    push(finished)
    card = card_of(hub.repository("me/adapter"))
    (finished / "README.md").write_text(edited(card, "Mine."))
    api = hub_module.HfApi()
    api.upload_file(path_or_fileobj=edited(card, "Theirs.").encode(), path_in_repo="README.md", repo_id="me/adapter")
    push(finished)
    assert "Theirs." in card_of(hub.repository("me/adapter"))
    assert "Mine." in (finished / hub_module.OWN_CARD).read_text()
    assert "has another text above its marker" in caplog.text


def test_a_card_that_cannot_be_read_now_is_not_lost(hub, finished):
    push(finished)
    repository = hub.repository("me/adapter")
    api = hub_module.HfApi()
    mine = edited(card_of(repository), "Mine.")
    api.upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="me/adapter")
    hub.fail("GET", "/resolve/.*README.md", status=503, times=100)
    with pytest.raises(SystemExit, match="^error: "):
        push(finished)
    assert card_of(repository) == mine


@pytest.mark.parametrize(
    ("before", "is_kept"),
    [
        ("# By hand\n\nAll of it.\n", True),
        ("---\nlicense: [\n---\n# By hand, with broken metadata\n", True),
        ("---\nlibrary_name: peft\n---\n# Model Card\n\n" + 3 * "[More Information Needed]\n", False),
    ],
)
def test_a_card_without_the_marker_is_kept_if_somebody_wrote_it(before, is_kept):
    new = merged_card(f"---\ntags:\n- lora\n---\n\n{MARKER}\n\n# New\n", before, None, [])
    assert ("# By hand" in new) == is_kept
    assert new.partition(MARKER)[2].startswith("\n\n# New\n")
    assert yaml.safe_load(new.split("---")[1])["tags"] == ["lora"]


def test_a_token_is_nowhere(hub, tmp_path, capfd, caplog):
    run_script(tmp_path / "run", "--hub_strategy", "checkpoint", "--save_strategy", "epoch")
    assert hub.where(WRITE_TOKEN) == []
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if WRITE_TOKEN.encode() in path.read_bytes()]
    assert WRITE_TOKEN not in capfd.readouterr().out + caplog.text
    assert not [name for name in hub.repository("me/adapter").files("main") if name.endswith("training_args.bin")]


def test_what_holds_the_token_is_not_pushed(hub, finished):
    config = finished / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": WRITE_TOKEN}))
    with pytest.raises(
        SystemExit, match=r"error: tokenizer_config.json contains your Hub token, so nothing is pushed."
    ):
        push(finished)
    assert not list(finished.glob("_push-*"))


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_each_save_goes_up_and_the_newest_is_never_dropped(hub, tmp_path, strategy):
    hub.delay("POST", "/commit/", seconds=0.5)
    run_script(
        tmp_path / "run",
        "--hub_strategy",
        strategy,
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
        "--save_total_limit",
        "1",
    )
    commits = hub.repository("me/adapter").commits[1:]
    assert commits[-1].title == "End of training"
    assert commits[-2].title == "Training in progress, step 9"
    for commit in commits:
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(commit.files), (
            "never half an adapter"
        )
    files = hub.repository("me/adapter").files("main")
    kept = {name.partition("/")[0] for name in files if "checkpoint" in name}
    assert (
        kept
        == {
            "every_save": set(),
            "checkpoint": {"last-checkpoint"},
            "all_checkpoints": {"checkpoint-3", "checkpoint-6", "checkpoint-9"},
        }[strategy]
    )
    if strategy == "checkpoint":
        assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 9
        assert files["last-checkpoint/adapter_model.safetensors"] == files["adapter_model.safetensors"]


def test_a_run_goes_on_from_the_last_checkpoint_of_the_hub(hub, tmp_path):
    flags = ["--save_strategy", "steps", "--save_steps", "2", "--num_train_epochs", "2"]
    flags += ["--lr_scheduler_type", "constant", "--hub_strategy", "checkpoint"]
    run_script(tmp_path / "begun", *flags, "--max_steps", "4")
    alone = [*flags, "--push_to_hub", "false"]
    run_script(tmp_path / "whole", *alone)
    run_script(tmp_path / "resumed", *alone, "--resume_from_checkpoint", "me/adapter@main")
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "resumed"))
    assert one.read_bytes() == other.read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "resumed" / "abr_trace.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]

    fetched = tmp_path / "resumed" / "checkpoint-4"
    state = json.loads((fetched / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None, "no path of the machine that pushed it"
    assert hub_module.fetch_checkpoint("me/adapter", tmp_path / "resumed") == str(fetched)
    assert not list(fetched.parent.glob("abandoned-*")), "it is the same"
    (fetched / "adapter_model.safetensors").write_bytes(b"of another run")
    assert hub_module.fetch_checkpoint("me/adapter", tmp_path / "resumed") == str(fetched)
    aside = fetched.with_name("abandoned-checkpoint-4")
    assert (aside / "adapter_model.safetensors").read_bytes() == b"of another run"
    assert (fetched / "adapter_model.safetensors").read_bytes() != b"of another run"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/adapter", "has no complete last-checkpoint. Push it with --hub_strategy checkpoint."),
        ("me/none", "is not a directory and cannot be loaded from the Hub: "),
        ("no/such/place", "is neither a directory nor the id of a repository on the Hub."),
    ],
)
def test_what_cannot_be_resumed_is_told(hub, finished, tmp_path, name, message):
    push(finished)
    told = error_of(tmp_path / "new", "--resume_from_checkpoint", name)
    assert told.startswith(f"error: --resume_from_checkpoint {name} {message}")
    assert "\n" not in told


def test_an_adapter_of_the_hub_is_evaluated_and_trained_further(hub, finished, tmp_path):
    push(finished)
    told = json.loads((finished / "all_results.json").read_text())
    from_hub = [*RUN, "--adapter_name_or_path", "me/adapter", "--model_name_or_path", "demo"]
    only_evaluated = [flag for flag in from_hub if flag != "--do_train"]
    found = run_clm_abr.main([*only_evaluated, "--output_dir", str(tmp_path / "evaluated")])
    assert found["eval_perplexity"] == pytest.approx(told["eval_perplexity"], rel=1e-6)
    run_clm_abr.main([*from_hub, "--max_steps", "2", "--output_dir", str(tmp_path / "further")])
    baseline = json.loads((tmp_path / "further" / "perplexity_history.json").read_text())["summary"]["baseline"]
    assert baseline == pytest.approx(told["eval_perplexity"], rel=1e-6)


# ---- What goes wrong ----


def error_of(*flags):
    with pytest.raises(SystemExit) as ended:
        run_script(*flags)
    return str(ended.value)


FAULTS = {
    "503 at the commit": lambda hub: hub.fail("POST", "/commit/", status=503, times=2),
    "500 at the repository": lambda hub: hub.fail("POST", "/api/repos/create", status=500, times=2),
    "409": lambda hub: hub.conflict(409),
    "412": lambda hub: hub.conflict(412),
    "a dropped commit": lambda hub: hub.drop("POST", "/commit/"),
    "a dropped answer": lambda hub: hub.drop("POST", "/commit/", at="answer"),
    "a dropped upload": lambda hub: hub.drop("PUT", "."),
    "a dropped card": lambda hub: hub.drop("HEAD", "README.md"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_tried_again(hub, finished, name):
    FAULTS[name](hub)
    push(finished)
    repository = hub.repository("me/adapter")
    assert [commit.title for commit in repository.commits[1:]] == ["Push of a finished run"]
    assert repository.files("main")["adapter_model.safetensors"]


def test_a_push_that_fails_costs_nothing_but_the_push(hub, tmp_path):
    run = tmp_path / "a run"
    hub.fail("POST", "/commit/", status=503, times=hub_module.ATTEMPTS)
    message = error_of(run, "--hub_strategy", "end")
    assert message.startswith("error: trained, but not pushed: 503: ")
    assert message.endswith(f"Finish it with: abr push '{run}'")
    assert len(hub.repository("me/adapter").commits) == 1
    assert (run / "adapter_model.safetensors").exists()
    assert json.loads((run / "all_results.json").read_text())["eval_perplexity"] > 1
    assert not list(run.glob("_push-*"))
    done = push(run)
    assert str(done.repo_url).endswith("me/adapter")
    files = hub.repository("me/adapter").files("main")
    assert files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "demo-org/base", (
        "as the run was told"
    )


def test_training_goes_on_where_saves_cannot_be_pushed(hub, tmp_path, caplog):
    hub.fail("POST", "/commit/", status=503, times=3 * hub_module.ATTEMPTS)
    run_script(tmp_path / "run", "--hub_strategy", "every_save", "--save_strategy", "epoch")
    assert caplog.text.count("Not pushed: 503") == 3
    assert [commit.title for commit in hub.repository("me/adapter").commits[1:]] == ["End of training"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            "hf_somebody_elses",
            "no valid token: set HF_TOKEN or run `hf auth login`. 401",
        ),
        (READ_TOKEN, "403"),
    ],
)
def test_a_token_that_may_not_push_is_told_before_training(hub, tmp_path, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    told = error_of(tmp_path / "run", "--hub_model_id", "adapter")
    assert told.startswith(f"error: --push_to_hub to adapter: {message}")
    assert "\n" not in told
    assert token not in told
    assert not (tmp_path / "run" / "abr_trace.jsonl").exists()


def test_a_hub_out_of_reach_at_the_start_is_tried_again_at_the_end(hub, tmp_path, caplog):
    hub.drop("POST", "/api/repos/create", times=hub_module.ATTEMPTS)
    run_script(tmp_path / "run", "--hub_strategy", "end")
    assert "The Hub cannot be reached. The first push will try again" in caplog.text
    assert hub.repository("me/adapter").files("main")["adapter_model.safetensors"]


def test_branch_and_privacy_are_as_asked(hub, finished):
    push(finished, "--hub_private_repo", "--hub_revision", "trial")
    repository = hub.repository("me/adapter")
    assert repository.private
    assert set(repository.files("main")) == {".gitattributes"}
    assert "adapter_model.safetensors" in repository.files("trial")


def test_a_base_that_only_this_machine_has_is_warned_of_and_not_named(hub, tmp_path, caplog):
    run_clm_abr.main([*RUN, "--push_to_hub", "--hub_strategy", "end", "--output_dir", str(tmp_path / "mine")])
    assert caplog.text.count("is not on the Hub, so others cannot load it by its name") == 1
    files = hub.repository("me/mine").files("main")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert card.data.base_model is None


@pytest.mark.parametrize("is_written_down", [True, False])
def test_a_base_named_by_a_relative_path_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch, is_written_down):
    """Nor is a data set: seen from another directory, both look like ids on the Hub."""
    shutil.copytree(DEMO_MODEL, tmp_path / "models" / "base")
    rows = Dataset.from_dict({"text": ["One tale or another. " * 40] * 8})
    DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "texts" / "mine")
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in RUN if flag not in ("--dataset_name", "demo")]
    flags += ["--model_name_or_path", "models/base", "--dataset_name", "texts/mine", "--output_dir", "runs/mine"]
    run_clm_abr.main(flags)
    if not is_written_down:  # by an earlier version, or a run that was killed
        (tmp_path / "runs" / "mine" / LOCAL_NAMES).unlink()
    monkeypatch.chdir(tmp_path / "runs")
    push("mine")
    files = hub.repository("me/mine").files("main")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    card = read_card(files["README.md"].decode())
    assert not {"base_model", "datasets"} & set(card.data)
    assert "huggingface.co" not in card.text
    assert "a base model that is not on the Hub" in card.text


def test_a_run_that_is_overwritten_forgets_which_names_were_paths(tmp_path, monkeypatch):
    shutil.copytree(DEMO_MODEL, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    run_clm_abr.main([*RUN, "--model_name_or_path", "gpt2", "--output_dir", "run"])
    assert local_path("gpt2", Path("run")) == tmp_path / "gpt2"
    run_clm_abr.main([*RUN, "--overwrite_output_dir", "--output_dir", "run"])
    assert is_on_the_hub("gpt2", Path("run"))


def test_a_folder_that_happens_to_be_called_like_the_base_changes_nothing(hub, finished, monkeypatch, tmp_path):
    provenance = json.loads((finished / "run.json").read_text())
    provenance["arguments"]["hub_base_model"] = None
    (finished / "run.json").write_text(json.dumps(provenance))
    config = json.loads((finished / "adapter_config.json").read_text())
    (finished / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gpt2"}))
    (finished / "_push.json").unlink(missing_ok=True)
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    push(finished)
    assert read_card(card_of(hub.repository("me/adapter"))).data["base_model"] == "gpt2"


def test_tables_go_up_only_if_they_were_trained_or_have_grown(hub, train, tmp_path, caplog):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")

    def pushed(name, rows=None, **options):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if rows is not None:
            base.resize_token_embeddings(rows)
        model = get_peft_model(base, LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}))
        args = {"output_dir": str(tmp_path / name), "hub_model_id": f"me/{name}", "hub_base_model": "org/base"}
        train(model=model, **args).push_to_hub()
        return load(hub.repository(f"me/{name}").files("main")["adapter_model.safetensors"])

    assert "base_model.model.lm_head.weight" in pushed("trained", modules_to_save=["lm_head"])
    assert "lm_head.weight, which was trained: 0.0 MB" in caplog.text
    assert not [name for name in pushed("plain") if "lora" not in name]
    assert not [name for name in pushed("targeted", target_modules=["q_proj", "embed_tokens"]) if "lora" not in name]
    grown = tiny_llama().config.vocab_size + 3
    assert pushed("grown", rows=grown)["base_model.model.model.embed_tokens.weight"].shape[0] == grown
    assert "embed_tokens.weight, which was resized: 0.0 MB" in caplog.text
    card = card_of(hub.repository("me/grown"))
    assert f"base.resize_token_embeddings({grown})" in card
    loading = re.search(r"```python\n(.*?)\ntokenizer", card, flags=re.DOTALL)[1]
    names = {}
    exec(loading.replace("org/base", str(tmp_path / "base")), names)
    ids = torch.tensor([[1, grown - 1]])
    table = load((tmp_path / "grown" / "adapter_model.safetensors").read_bytes())
    embedded = names["model"].get_input_embeddings()(ids)[0]
    assert torch.equal(embedded[1], table["base_model.model.model.embed_tokens.weight"][grown - 1])


def test_a_run_from_python_is_pushed_later_to_where_it_was_to_go(hub, train, tmp_path):
    hub.fail("POST", "/commit/", status=503, times=hub_module.ATTEMPTS)
    args = {"output_dir": str(tmp_path / "run"), "hub_model_id": "me/secret", "hub_private_repo": True}
    trainer = train(**args, hub_base_model="org/base")
    with pytest.raises(hub_module.PushError, match="503"):
        trainer.push_to_hub(revision="trial", license="mit", tags="mine")
    push(tmp_path / "run")
    assert hub.repository("me/secret").private
    files = hub.repository("me/secret").files("trial")
    card = ModelCard(files["README.md"].decode())
    assert {card.data.license, card.data.base_model} == {"mit", "org/base"}
    assert "mine" in card.data.tags
    assert 'from_pretrained("me/secret", dtype="auto", revision="trial")' in card.text
    assert {"model.safetensors", "config.json"} <= set(files), "all of it was trained"
    assert "optim adamw_torch" in card.text


def test_one_kind_of_weights_replaces_the_other(hub, finished, train, tmp_path):
    push(finished)
    train(output_dir=str(tmp_path / "whole"), hub_model_id="me/adapter").push_to_hub()
    files = hub.repository("me/adapter").files("main")
    assert "model.safetensors" in files
    assert not [name for name in files if name.startswith(("adapter_", "all_results"))]


def test_who_may_only_read_a_repository_is_told_before_training(hub, finished, tmp_path, monkeypatch):
    push(finished)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    told = error_of(tmp_path / "new")
    assert told.startswith("error: --push_to_hub to me/adapter: 403")
    assert not (tmp_path / "new" / "abr_trace.jsonl").exists()


WIKITEXT = ("Salesforce/wikitext", "wikitext", "wikitext-2-raw-v1")
MINE = ("my/corpus", "my/corpus", None)


@pytest.mark.parametrize(
    ("arguments", "validation", "test"),
    [
        ({"dataset_name": "wikitext"}, WIKITEXT, WIKITEXT),
        ({"dataset_name": "my/corpus", "eval_text": "wikitext"}, WIKITEXT, MINE),
        ({"dataset_mix": "my/corpus=0.5,c4=0.5"}, MINE, MINE),
        ({"dataset_name": "my/corpus", "validation_file": "data/val.txt"}, ("custom", "val.txt", None), MINE),
        ({"train_file": "/home/me/talk.jsonl"}, ("custom", "talk.jsonl", None), ("custom", "talk.jsonl", None)),
        ({"dataset_name": "demo"}, ("custom", "demo", None), ("custom", "demo", None)),
    ],
)
def test_numbers_are_said_to_be_of_their_text(arguments, validation, test):
    assert text_of(arguments, "validation") == validation
    assert text_of(arguments, "test") == test


def test_a_classifier_on_the_hub_tells_scores_labels_and_what_it_was_asked(hub, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", tales_and_reports(21))
    flags = ["--train_file", rows, "--validation_file", rows, "--do_train", "--do_eval", "--prompt", "Is it a tale?"]
    flags += ["--max_steps", "4", *PUSH, "--hub_strategy", "end", "--output_dir", str(tmp_path / "run")]
    results = classify.main([*QUICK, *flags])
    files = hub.repository("me/adapter").files("main")
    assert "task.json" in files
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert card.data.pipeline_tag == "text-classification"
    measured = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert measured["accuracy, validation"] == pytest.approx(results["eval_accuracy"], abs=1e-6)
    assert "input: `Is it a tale? Sentence: {sentence}`" in card.text
    assert "labels: 0 report, 1 tale" in card.text
    assert json.loads(files["task.json"])["id2label"] == {"0": "report", "1": "tale"}
    assert f"| validation | f1 | {results['eval_f1']:.4f} |" in card.text
    assert "perplexity" not in card.text.lower()
    names = {}
    loading = re.search(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL)[1]
    exec(loading.replace("demo-org/base", str(DEMO_MODEL)), names)
    assert names["model"].config.id2label == {0: "report", 1: "tale"}
    assert names["model"].config.label2id == {"report": 0, "tale": 1}
    assert names["model"].base_model.model.score.modules_to_save["default"].weight.shape[0] == 2
    again = ["--adapter", "me/adapter", "--model_name_or_path", "demo", "--test_file", rows, "--use_cpu"]
    assert evaluate.main(again)["test_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
