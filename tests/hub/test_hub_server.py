"""The Hub of the tests, shown with the real client over real HTTP; only the client's settings are changed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_session,
    hf_hub_download,
    snapshot_download,
    whoami,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from abr_trainer.data.demo import DEMO_MODEL
from tests.conftest import ROOT, tiny_llama
from tests.hub_server import READ_TOKEN, WRITE_TOKEN, Account

pytestmark = pytest.mark.slow

NAME = "me/adapter"
CARD = "---\nlicense: mit\n---\n# A card\n"


@pytest.fixture
def api(hub):
    """The client, with an empty repository."""
    api = HfApi()
    api.create_repo(NAME)
    hub.requests.clear()
    return api


@pytest.fixture
def folder(tmp_path):
    """A folder as of an adapter: small files, and large ones at two depths."""
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "deeper" / "training_args.bin").write_bytes(b"arguments" * 100)
    return folder


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pushed(hub, revision="main"):
    """What is in the repository beside what the Hub itself puts there."""
    return {
        path: content for path, content in hub.repository(NAME).files(revision).items() if path != ".gitattributes"
    }


def asked_for(hub, method, path):
    return [each for each in hub.requests if each.method == method and path in each.path]


def add(path, content):
    return CommitOperationAdd(path, content if isinstance(content, bytes) else content.encode())


def commit(api, *operations, **options):
    return api.create_commit(NAME, list(operations), commit_message="By hand", **options)


def test_a_repository_is_made_once(hub):
    assert HfApi().create_repo(NAME) == f"{hub.url}/{NAME}"
    assert HfApi().create_repo("of_my_own").repo_id == "me/of_my_own"
    with pytest.raises(HfHubHTTPError, match="(?s)409 Conflict.*You already created this model repo"):
        HfApi().create_repo(NAME)
    assert HfApi().create_repo(NAME, exist_ok=True).repo_id == NAME
    assert [each.title for each in hub.repository(NAME).commits] == ["initial commit"]
    assert whoami()["name"] == "me"


def test_a_folder_comes_back_as_it_was_pushed(hub, api, folder):
    made = api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="All of it")
    assert pushed(hub) == contents(folder)
    found = contents(snapshot_download(NAME))
    assert {path: found[path] for path in contents(folder)} == contents(folder)
    assert [each.title for each in api.list_repo_commits(NAME)] == ["All of it", "initial commit"]
    assert api.model_info(NAME).sha == made.oid == hub.repository(NAME).commits[-1].sha
    assert api.model_info(NAME).card_data["license"] == "mit"
    stored = {
        file.path: file.lfs.sha256 for file in api.list_repo_tree(NAME, recursive=True) if getattr(file, "lfs", 0)
    }
    assert stored == {
        path: hashlib.sha256(contents(folder)[path]).hexdigest()
        for path in ("adapter_model.safetensors", "deeper/training_args.bin")
    }
    assert [each.path for each in api.list_repo_tree(NAME, "deeper")] == ["deeper/training_args.bin"]
    assert [each.path for each in api.get_paths_info(NAME, ["deeper", "README.md", "nowhere"])] == [
        "deeper",
        "README.md",
    ]
    assert {each.rfilename: each.size for each in api.model_info(NAME, files_metadata=True).siblings}[
        "adapter_model.safetensors"
    ] == 10240


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, api, folder):
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert len(asked_for(hub, "PUT", "/storage/")) == 2
    assert all(each.authorized == ("/storage/" not in each.path) for each in hub.requests)


def test_what_is_there_is_not_sent_again(hub, api, folder):
    first = api.upload_folder(repo_id=NAME, folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id=NAME, folder_path=folder).oid == first.oid
    assert not asked_for(hub, "POST", "/commit/")
    (folder / "copy.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert not asked_for(hub, "PUT", "/storage/")
    assert pushed(hub) == contents(folder)


def test_a_large_object_comes_in_parts(hub, api):
    hub.part_size = 1000
    content = bytes(range(250)) * 13  # 3,250 bytes: three parts and a quarter of one
    commit(api, add("adapter_model.safetensors", content))
    assert len(asked_for(hub, "PUT", "/storage/")) == 4
    assert pushed(hub) == {"adapter_model.safetensors": content}


def test_private_is_private(hub, api):
    api.create_repo("me/private", private=True)
    assert api.model_info("me/private").private
    assert HfApi(token=READ_TOKEN).model_info("me/private").private
    hub.tokens["hf_another"] = Account("another")
    for token, status in (("hf_another", 404), (False, 401)):
        for ask in (HfApi(token=token).model_info, lambda name, token=token: snapshot_download(name, token=token)):
            with pytest.raises(RepositoryNotFoundError) as found:
                ask("me/private")
            assert found.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        HfApi(token="hf_unknown").model_info("me/private")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/nowhere")
    assert HfApi(token=False).model_info(NAME).id == NAME


def test_only_its_owner_may_write(hub, api, folder):
    hub.tokens["hf_another"] = Account("another")
    for token, why in ((READ_TOKEN, "you must use a write token"), ("hf_another", "don't have the rights")):
        with pytest.raises(HfHubHTTPError, match=f"403 Forbidden: .*{why}"):
            HfApi(token=token).upload_folder(repo_id=NAME, folder_path=folder)
        with pytest.raises(HfHubHTTPError, match=f"403 Forbidden: .*{why}"):
            HfApi(token=token).create_repo("me/more")
        # Of a repository that exists, the client takes a refusal for an answer: this shows no right to write.
        assert HfApi(token=token).create_repo(NAME, exist_ok=True).repo_id == NAME
    with pytest.raises(HfHubHTTPError, match="401 Unauthorized"):
        HfApi(token=False).upload_folder(repo_id=NAME, folder_path=folder)
    assert not hub.repository(NAME).objects
    assert len(hub.repository(NAME).commits) == 1


def test_a_commit_knows_its_parent(hub, api):
    first = commit(api, add("a.txt", "a"))
    second = commit(api, add("a.txt", "b"), parent_commit=first.oid)
    with pytest.raises(HfHubHTTPError, match="(?s)412 Precondition Failed.*A commit has happened since"):
        commit(api, add("a.txt", "c"), parent_commit=first.oid)
    assert [each.sha for each in hub.repository(NAME).history()][:2] == [second.oid, first.oid]
    assert pushed(hub) == {"a.txt": b"b"}


def test_files_and_folders_are_deleted(hub, api, folder):
    api.upload_folder(repo_id=NAME, folder_path=folder)
    commit(api, CommitOperationDelete("deeper/"), CommitOperationDelete("README.md"))
    assert set(pushed(hub)) == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        commit(api, add("a.txt", "a"), CommitOperationDelete("README.md"))
    assert "a.txt" not in pushed(hub)
    api.upload_folder(repo_id=NAME, folder_path=folder / "deeper", delete_patterns="*.json")
    assert set(pushed(hub)) == {"training_args.bin", "adapter_model.safetensors"}


def test_branches_are_apart(hub, api, folder):
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=NAME, folder_path=folder, revision="runs/second")
    api.create_branch(NAME, branch="runs/second")
    api.create_branch(NAME, branch="runs/second", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409 Conflict"):
        api.create_branch(NAME, branch="runs/second")
    made = api.upload_folder(repo_id=NAME, folder_path=folder, revision="runs/second")
    assert pushed(hub) == {}
    assert pushed(hub, "runs/second") == contents(folder)
    assert {each.name: each.target_commit for each in api.list_repo_refs(NAME).branches}["runs/second"] == made.oid
    for revision in ("runs/second", made.oid):
        found = hf_hub_download(NAME, "adapter_config.json", revision=revision)
        assert Path(found).read_text() == '{"r": 8}'
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, "adapter_config.json", revision="runs/third")


def test_a_file_is_described_by_its_headers(hub, api):
    commit(api, add("a.bin", b"0123456789"), add("a.json", "{}"))
    sha256 = hashlib.sha256(b"0123456789").hexdigest()
    address = f"{hub.url}/{NAME}/resolve/main/"
    head = get_session().head(address + "a.bin").headers
    assert head["X-Repo-Commit"] == hub.repository(NAME).commits[-1].sha
    assert head["X-Linked-Etag"] == head["ETag"] == f'"{sha256}"'
    assert head["X-Linked-Size"] == head["Content-Length"] == "10"
    small = get_session().head(address + "a.json").headers
    assert small["ETag"] == f'"{hashlib.sha1(b"blob 2" + bytes(1) + b"{}").hexdigest()}"'
    assert "X-Linked-Etag" not in small
    part = get_session().get(address + "a.bin", headers={"Range": "bytes=7-"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"789", "bytes 7-9/10")
    assert get_session().get(address + "a.bin", headers={"Range": "bytes=2-3"}).content == b"23"
    assert get_session().get(address + "a.bin", headers={"Range": "bytes=10-"}).status_code == 416
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "nowhere.bin")
    assert not api.file_exists(NAME, "nowhere.bin")


def test_an_object_that_is_not_what_it_was_said_to_be_is_refused(hub, api, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    operation = CommitOperationAdd("model.safetensors", path)
    assert operation.upload_info.sha256  # computed now
    path.write_bytes(b"after!")
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'") as found:
        commit(api, operation)
    assert isinstance(found.value.__cause__, BadRequestError)
    assert pushed(hub) == {}
    assert not hub.repository(NAME).objects


def test_a_commit_of_an_object_that_never_came_is_refused(hub, api):
    lines = [
        {"key": "header", "value": {"summary": "Half of an adapter"}},
        {"key": "file", "value": {"path": "adapter_config.json", "content": "e30=", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "adapter_model.safetensors", "oid": "0" * 64, "size": 3}},
    ]
    answer = get_session().post(
        f"{hub.url}/api/models/{NAME}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {WRITE_TOKEN}"},
    )
    assert answer.status_code == 400
    assert "an LFS pointer pointed to a file that does not exist" in answer.json()["error"]
    assert pushed(hub) == {}


@pytest.mark.parametrize("path", ["/preupload/", "objects/batch", "/storage/", "objects/verify"])
def test_the_client_asks_again_before_the_commit(hub, api, folder, path):
    hub.fail("POST|PUT", path)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert next(each.status for each in hub.requests if path in each.path) == 503
    assert pushed(hub) == contents(folder)


@pytest.mark.parametrize("status", [409, 412, 500, 503])
def test_the_client_does_not_ask_for_a_commit_again(hub, api, folder, status):
    hub.conflict(status) if status < 500 else hub.fail("POST", "/commit/", status)
    with pytest.raises(HfHubHTTPError) as found:
        api.upload_folder(repo_id=NAME, folder_path=folder)
    assert found.value.response.status_code == status
    assert [each.status for each in asked_for(hub, "POST", "/commit/")] == [status]
    assert pushed(hub) == {}
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert pushed(hub) == contents(folder)
    assert len(asked_for(hub, "PUT", "/storage/")) == 2, "objects stay, and are sent once"


def test_a_connection_that_ends_within_a_commit_leaves_none(hub, api, folder):
    hub.drop("POST", "/commit/")
    with pytest.raises(httpx.TransportError):
        api.upload_folder(repo_id=NAME, folder_path=folder)
    assert [each.status for each in asked_for(hub, "POST", "/commit/")] == [None]
    assert pushed(hub) == {}
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert pushed(hub) == contents(folder)


@pytest.mark.parametrize("at", ["answer", "body"])
def test_a_commit_whose_answer_is_lost_is_made_and_not_made_again(hub, api, folder, at):
    hub.drop("POST", "/commit/", at=at)
    with pytest.raises(httpx.TransportError):
        api.upload_folder(repo_id=NAME, folder_path=folder)
    assert pushed(hub) == contents(folder)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert len(hub.repository(NAME).commits) == 2


def test_an_upload_that_breaks_off_begins_again(hub, api, folder):
    hub.drop("PUT", "/storage/")
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert sorted(str(each.status) for each in asked_for(hub, "PUT", "/storage/")) == ["200", "200", "None"]
    assert pushed(hub) == contents(folder)


def test_a_download_that_breaks_off_begins_again(hub, api):
    content = bytes(range(256)) * 2000  # less than the 10 MB after which the client goes on where it was
    commit(api, add("a.bin", content))
    hub.drop("GET", "/resolve/", at="body")
    assert Path(hf_hub_download(NAME, "a.bin")).read_bytes() == content
    assert [each.status for each in asked_for(hub, "GET", "/resolve/")] == [None, 200]


def test_a_slow_hub_is_asked_again_for_a_file_and_waited_for_at_a_commit(hub, api):
    hub.delay("POST", "/commit/", seconds=0.3)
    begun = time.monotonic()
    commit(api, add("a.json", "{}"))
    assert time.monotonic() - begun > 0.3
    hub.delay("HEAD", "/resolve/", seconds=60)
    assert Path(hf_hub_download(NAME, "a.json", etag_timeout=0.1)).read_text() == "{}"
    assert len(asked_for(hub, "HEAD", "/resolve/")) == 2


def test_everything_that_was_received_can_be_searched(hub, api):
    commit(api, add("notes.txt", "the password is sesame"), add("args.bin", b"\x80 sesame, in a pickle"))
    places = hub.where("sesame")
    assert any(place.endswith("/commit/main: notes.txt") for place in places)
    assert any(place.startswith("/storage/") for place in places)
    assert hub.where(WRITE_TOKEN) == []


def results(**changes):
    told = dict(
        task_type="text-generation",
        dataset_type="Salesforce/wikitext",
        dataset_name="WikiText-2",
        metric_type="perplexity",
        metric_value=27.3,
    )
    return [EvalResult(**{**told, **changes})]


def test_a_good_card_is_accepted(hub, api):
    data = ModelCardData(
        language=["en", "no", "deu", "code"],
        license="apache-2.0",
        library_name="peft",
        base_model="HuggingFaceTB/SmolLM2-135M",
        datasets=["Salesforce/wikitext"],
        tags=["abr-trainer"],
        model_name="adapter",
        eval_results=results(),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n# Adapter\n")
    card.validate()
    card.push_to_hub(NAME)
    assert ModelCard.load(NAME).data.eval_results == data.eval_results
    assert api.model_info(NAME).card_data["base_model"] == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"license": "mine"}, '"license" must be one of'),
        ({"base_model": "/home/me/models/llama"}, '"base_model" with value "/home/me/models/llama" is not valid'),
        ({"base_model": ["a/b", "./out"]}, '"base_model.1." with value "./out" is not valid'),
        ({"datasets": [None]}, '"datasets.0." must be a string'),
        ({"language": "english"}, '"language" with value .english. is not valid'),
        ({"language": ["EN"]}, '"language.0." must only contain lowercase'),
        ({"language": False}, '"language" must be a string'),
        ({"tags": [3]}, '"tags.0." must be a string'),
        ({"library_name": 3}, '"library_name" must be a string'),
        (dict(model_name="a", eval_results=results(dataset_type="/tmp/texts")), '"dataset.type" with value'),
        (dict(model_name="a", eval_results=results(dataset_config=3)), '"dataset.config" must be a string'),
    ],
)
def test_a_card_is_refused(hub, api, metadata, why):
    card = ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n# Adapter\n")
    with pytest.raises(ValueError, match=f"- Error: .*{why}"):
        card.validate()
    with pytest.raises(ValueError, match=f"Invalid metadata in README.md.\n- .*{why}"):
        commit(api, add("README.md", card.content), add("adapter_model.safetensors", "weights"))
    assert not asked_for(hub, "PUT", "/storage/"), "refused before anything is sent"


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"name": "adapter"}, '"model-index" must be an array'),
        ([{"name": "adapter"}], '"model-index" is malformed: KeyError..results'),
        ([{"name": "adapter", "results": [{"task": {"type": "text-generation"}}]}], "malformed: KeyError..dataset"),
    ],
)
def test_an_index_that_the_client_itself_would_not_read_is_refused(hub, api, index, why):
    with pytest.raises(ValueError, match=f"Invalid metadata in README.md.\n- .*{why}"):
        commit(api, add("README.md", f"---\n{yaml.safe_dump({'model-index': index})}---\n"))
    assert pushed(hub) == {}


def test_metadata_that_cannot_be_read_is_refused_and_none_at_all_is_warned_of(hub, api):
    with pytest.raises(ValueError, match="YAML metadata cannot be parsed"):
        commit(api, add("README.md", "---\ntags: [unclosed\n---\n"))
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(api, add("README.md", "# No metadata\n"))


def test_an_adapter_comes_back_with_its_weights(hub, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.push_to_hub(NAME, private=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(pushed(hub))
    again = PeftModel.from_pretrained(tiny_llama(), NAME)
    mine, theirs = ({k: v for k, v in each.state_dict().items() if "lora_" in k} for each in (model, again))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(mine) == 2


def test_a_tokenizer_and_a_model_come_back(hub, api):
    demo = Path(DEMO_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.push_to_hub("me/model")
    tiny_llama().push_to_hub("me/model", revision="tiny")
    assert AutoTokenizer.from_pretrained("me/model")("Once upon a time") == tokenizer("Once upon a time")
    again = type(tiny_llama()).from_pretrained("me/model", revision="tiny")
    assert all(torch.equal(a, b) for a, b in zip(tiny_llama().parameters(), again.parameters(), strict=True))


def test_another_process_is_pointed_here_by_its_environment(hub):
    script = "import huggingface_hub as h; h.create_repo('me/other', private=True); print(h.whoami()['name'])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | hub.environment
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == "me\n"
    assert hub.repository("me/other").private


def test_it_runs_by_itself():
    command = [sys.executable, "-m", "tests.hub_server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        assert process.stdout.readline() == f"export HF_ENDPOINT={url}\n"
        try:
            assert httpx.get(f"{url}/api/models/me/nowhere", trust_env=False).status_code == 401
        finally:
            process.terminate()
