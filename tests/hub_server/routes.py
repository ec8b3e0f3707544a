"""What is answered at which address."""

from __future__ import annotations

import hashlib
import json
import math
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

from tests.hub_server.calls import Answer, Call, refused
from tests.hub_server.cards import check_card, read_metadata
from tests.hub_server.repository import LARGEST_REGULAR, LFS_ENDINGS, Refusal, Repository

Route = Callable[..., Answer]
ROUTES: list[tuple[tuple[str, ...], str, Route]] = []
REPOSITORY, REVISION = r"([^/]+(?:/[^/]+)?)", r"([^/]+)"
MODEL = f"/api/models/{REPOSITORY}"


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    """Register what answers these methods at paths of this form; groups are handed over unquoted."""

    def register(function: Route) -> Route:
        ROUTES.append((tuple(methods.split()), pattern, function))
        return function

    return register


@route("GET", "/api/whoami-v2")
def tell_account(call: Call) -> Answer:
    if call.account is None:
        raise Refusal(401, "Invalid username or password.")
    token = {"displayName": "tests", "role": call.account.role}
    auth = {"type": "access_token", "accessToken": token}
    return Answer({"type": "user", "name": call.account.name, "fullname": "Tests", "orgs": [], "auth": auth})


@route("POST", "/api/repos/create")
def create_repository(call: Call) -> Answer:
    asked = call.json
    owner = asked.get("organization") or call.may_write(None).name
    call.may_write(owner)
    name = f"{owner}/{asked['name']}"
    if asked.get("type", "model") != "model":
        raise Refusal(400, "Only models are kept here.")
    if name in call.hub.repositories:
        raise Refusal(409, "You already created this model repo", url=f"{call.hub.url}/{name}")
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    call.hub.repositories[name] = Repository(name, owner, private)
    return Answer({"url": f"{call.hub.url}/{name}", "name": name, "private": private})


@route("POST", "/api/validate-yaml")
def validate_card(call: Call) -> Answer:
    errors, warnings = check_card(call.json["content"])
    status = 400 if errors else 200
    if call.headers.get("Accept") == "text/plain":
        said = [f"- Error: {each}" for each in errors] + [f"- Warning: {each}" for each in warnings]
        return Answer("\n".join(said).encode(), status, {"Content-Type": "text/plain; charset=utf-8"})
    messages = {"errors": errors, "warnings": warnings}
    return Answer({kind: [{"message": each} for each in found] for kind, found in messages.items()}, status)


@route("POST", f"{MODEL}/branch/{REVISION}")
def create_branch(call: Call, name: str, branch: str) -> Answer:
    repository = call.writable(name)
    if branch.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {branch}")
    if branch in repository.branches:
        raise Refusal(409, "Reference already exists")
    repository.branches[branch] = repository.at(call.json.get("startingPoint", "main")).sha
    return Answer({})


@route("GET", f"{MODEL}/refs")
def list_refs(call: Call, name: str) -> Answer:
    branches = call.readable(name).branches.items()
    found = [{"name": each, "ref": f"refs/heads/{each}", "targetCommit": sha} for each, sha in branches]
    return Answer({"branches": found, "converts": [], "tags": [], "pullRequests": []})


@route("GET", f"{MODEL}/commits/{REVISION}")
def list_commits(call: Call, name: str, revision: str) -> Answer:
    history = call.readable(name).history(revision)
    return Answer(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in history
        ]
    )


@route("GET", f"{MODEL}/tree/{REVISION}(?:/(.+))?")
def list_tree(call: Call, name: str, revision: str, folder: str) -> Answer:
    listed = call.readable(name).at(revision).entries()
    within = {path: entry for path, entry in listed.items() if not folder or path.startswith(f"{folder}/")}
    if folder and not within:
        raise Refusal(404, f'"{folder}" does not exist on "{revision}"', "EntryNotFound")
    depth = folder.count("/") + 1 if folder else 0
    return Answer([each for path, each in within.items() if call.asks("recursive") or path.count("/") == depth])


@route("POST", f"{MODEL}/paths-info/{REVISION}")
def describe_paths(call: Call, name: str, revision: str) -> Answer:
    wanted = urllib.parse.parse_qs(call.body.decode()).get("paths", [])
    listed = call.readable(name).at(revision).entries()
    return Answer([listed[path] for path in wanted if path in listed])


@route("GET", f"{MODEL}/revision/{REVISION}")
@route("GET", MODEL)
def describe_model(call: Call, name: str, revision: str = "main") -> Answer:
    repository = call.readable(name)
    commit = repository.at(revision)
    siblings: list[dict[str, Any]] = []
    for path, file in sorted(commit.files.items()):
        siblings.append({"rfilename": path})
        if call.asks("blobs"):
            lfs = {"lfs": {"sha256": file.sha256} | file.sizes} if file.lfs else {}
            siblings[-1] |= {"size": len(file.content), "blobId": file.blob} | lfs
    card = commit.files.get("README.md")
    metadata = read_metadata(card.text) if card else None
    return Answer(
        {
            "id": name,
            "author": repository.owner,
            "sha": commit.sha,
            "siblings": siblings,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "tags": (metadata or {}).get("tags", []),
            "cardData": metadata,
            "createdAt": repository.commits[0].date,
            "lastModified": commit.date,
        }
    )


@route("GET", f"{MODEL}/auth-check/write")
def check_right_to_write(call: Call, name: str) -> Answer:
    call.writable(name)
    return Answer({})


@route("POST", f"{MODEL}/preupload/{REVISION}")
def choose_modes(call: Call, name: str, revision: str) -> Answer:
    commit = call.writable(name).at(revision)
    answers = []
    for asked in call.json["files"]:
        path, there = asked["path"], commit.files.get(asked["path"])
        lfs = asked["size"] > 0 and (path.endswith(LFS_ENDINGS) or asked["size"] > LARGEST_REGULAR)
        mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answers.append({"path": path, "oid": there.etag if there else None} | mode)
    return Answer({"files": answers})


@route("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch")
def plan_uploads(call: Call, name: str) -> Answer:
    """Say where objects go: nowhere, if they are there; in parts, if they are larger than one part."""
    repository, size_of_part = call.writable(name), call.hub.part_size
    objects = []
    for asked in call.json["objects"]:
        oid, size = asked["oid"], asked["size"]
        objects.append({"oid": oid, "size": size})
        if oid in repository.objects:
            continue
        repository.promised[oid] = size
        upload: dict[str, Any] = {"href": f"{call.hub.url}/storage/{name}/{oid}"}
        if size_of_part and size > size_of_part:
            parts = range(1, math.ceil(size / size_of_part) + 1)
            urls = {f"{part:05}": f"{upload['href']}/{part}" for part in parts}
            upload["header"] = {"chunk_size": str(size_of_part)} | urls
        verify = {"href": f"{call.hub.url}/{name}.git/info/lfs/objects/verify"}
        objects[-1]["actions"] = {"upload": upload, "verify": verify}
    return Answer({"transfer": "basic", "objects": objects})


@route("PUT", f"/storage/{REPOSITORY}/([0-9a-f]{{64}})(?:/([0-9]+))?")
def put_object(call: Call, name: str, oid: str, part: str) -> Answer:
    """Take an object, or a part of one. No token is asked for: the address is the permission."""
    repository = call.hub.repositories[name]
    if part:
        repository.parts.setdefault(oid, {})[int(part)] = call.body
    else:
        repository.store(oid, call.body)
    return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", f"/storage/{REPOSITORY}/([0-9a-f]{{64}})")
def complete_object(call: Call, name: str, oid: str) -> Answer:
    repository = call.hub.repositories[name]
    sent = repository.parts.pop(oid, {})
    for part in call.json["parts"]:
        content = sent.get(part["partNumber"])
        if content is None or part["etag"] != f'"{hashlib.md5(content).hexdigest()}"':
            raise Refusal(400, f"Part {part['partNumber']} is not what was sent.")
    repository.store(oid, b"".join(content for _, content in sorted(sent.items())))
    return Answer({"success": True})


@route("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/verify")
def verify_object(call: Call, name: str) -> Answer:
    asked = call.json
    content = call.writable(name).objects.get(asked["oid"])
    if content is None or len(content) != asked["size"]:
        raise Refusal(404, "The object does not exist on the server.")
    return Answer({})


@route("POST", f"{MODEL}/commit/{REVISION}")
def make_commit(call: Call, name: str, revision: str) -> Answer:
    repository = call.writable(name)
    if call.asks("create_pr"):
        raise Refusal(400, "Pull requests are not kept here.")
    header, *operations = [json.loads(line) for line in call.body.splitlines()]
    made = repository.commit(revision, repository.owner, header["value"], operations)
    return Answer({"success": True, "commitOid": made.sha, "commitUrl": f"{call.hub.url}/{name}/commit/{made.sha}"})


@route("GET HEAD", f"/{REPOSITORY}/resolve/{REVISION}/(.+)")
def send_file(call: Call, name: str, revision: str, path: str) -> Answer:
    commit = call.readable(name).at(revision)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    file = commit.files.get(path)
    if file is None:
        return refused(Refusal(404, "Entry not found", "EntryNotFound"), **headers)
    headers |= {"ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if asked is None:
        return Answer(file.content, 200, headers)
    size, start = len(file.content), int(asked[1])
    end = min(int(asked[2] or size), size - 1)
    if start > end:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
    return Answer(file.content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"})
