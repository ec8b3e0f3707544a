"""What a Hub keeps of a model: files, commits, branches, and the objects of LFS."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from tests.hub_server.cards import check_card

LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx", ".npz", ".zip", ".gz", ".parquet")
LARGEST_REGULAR = 10 * 2**20
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
MOVED = "A commit has happened since. Please refresh and try again."


class Refusal(Exception):
    """Why something is not done: an HTTP status, a message, and the code that the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.details = status, message, code, details


def sha1(content: bytes | str) -> str:
    return hashlib.sha1(content if isinstance(content, bytes) else content.encode()).hexdigest()


@dataclass(frozen=True)
class File:
    """What a commit holds at a path."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return POINTER.format(self.sha256, len(self.content)).encode()

    @cached_property
    def blob(self) -> str:
        """What git would call it: an LFS file is its pointer."""
        stored = self.pointer if self.lfs else self.content
        return sha1(b"blob %d\0" % len(stored) + stored)

    @property
    def sizes(self) -> dict[str, int]:
        return {"size": len(self.content), "pointerSize": len(self.pointer)}

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one time, by their paths."""

    parent: str | None
    title: str
    message: str
    author: str
    files: dict[str, File]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def sha(self) -> str:
        tree = sorted((path, file.blob) for path, file in self.files.items())
        return sha1(repr((self.parent, self.title, self.message, self.date, tree)))

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the files and the folders above them by their paths, as the Hub describes them in a tree."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.files.items()):
            for parent in map(str, PurePosixPath(path).parents[:-1]):
                found[parent] = {"type": "directory", "path": parent, "oid": sha1(f"{self.sha} {parent}"), "size": 0}
            found[path] = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
            if file.lfs:
                found[path]["lfs"] = {"oid": file.sha256} | file.sizes
        return dict(sorted(found.items()))


@dataclass
class Repository:
    """A model repository: commits, the branches that point at them, and LFS objects by their sha256."""

    name: str
    owner: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    promised: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS)
        self.add(Commit(None, "initial commit", "", self.owner, {".gitattributes": File(attributes.encode())}), "main")

    def add(self, commit: Commit, branch: str) -> None:
        self.commits.append(commit)
        self.branches[branch] = commit.sha

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, or the one whose sha begins like that."""
        sha = self.branches.get(revision, revision if re.fullmatch("[0-9a-f]{7,40}", revision) else None)
        for commit in self.commits:
            if sha is not None and commit.sha.startswith(sha):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.at(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, the last one first."""
        by_sha = {commit.sha: commit for commit in self.commits}
        found = [self.at(revision)]
        while found[-1].parent is not None:
            found.append(by_sha[found[-1].parent])
        return found

    def store(self, oid: str, content: bytes) -> None:
        """Keep an object that was announced, if it is what was announced."""
        if oid not in self.promised:
            raise Refusal(403, "No upload of this object was asked for.")
        if len(content) != self.promised[oid]:
            raise Refusal(400, f"The object has {len(content)} bytes, {self.promised[oid]} were announced.")
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content does not have the sha256 that was announced.")
        self.objects[oid] = content

    def commit(self, branch: str, author: str, header: dict[str, str], operations: list[dict[str, Any]]) -> Commit:
        """Make a commit of all operations; where one is refused, of none."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.at(branch)
        if not header.get("summary"):
            raise Refusal(400, '"summary" is not allowed to be empty')
        if not head.sha.startswith(header.get("parentCommit", "")):
            raise Refusal(412, MOVED)
        files = dict(head.files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        if "README.md" in files and (errors := check_card(files["README.md"].text)[0]):
            raise Refusal(400, "\n".join(errors), errors=[{"message": each} for each in errors])
        self.add(Commit(head.sha, header["summary"], header.get("description", ""), author, files), branch)
        return self.commits[-1]

    def apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        """Carry out one operation of a commit on the files that it begins with."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > LARGEST_REGULAR:
                raise Refusal(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
            files[path] = File(content)
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                reason = f"an LFS pointer pointed to a file that does not exist. Offending file: - {path}"
                raise Refusal(400, f"Your push was rejected because {reason}")
            files[path] = File(self.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/"
            gone = [each for each in files if (each == path if key == "deletedFile" else each.startswith(folder))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for each in gone:
                del files[each]
        else:
            raise Refusal(400, f"Unknown operation: {key}")
