"""A call of the Hub: who makes it, what they may see and write, and how they are answered."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tests.hub_server.repository import Refusal, Repository

if TYPE_CHECKING:
    from tests.hub_server.server import Hub

WRITE_TOKEN, READ_TOKEN = "hf_writeTokenOfTheTests", "hf_readTokenOfTheTests"


@dataclass(frozen=True)
class Account:
    """Whose token it is, and whether it may write."""

    name: str
    role: str = "write"


@dataclass(frozen=True)
class Answer:
    """What goes back: a value as JSON, or bytes as they are."""

    content: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def refused(refusal: Refusal, **headers: str) -> Answer:
    """Say why, in the headers in which the client looks for it and in the body."""
    code = {"X-Error-Code": refusal.code} if refusal.code else {}
    line = refusal.message.splitlines()[0].encode("ascii", "replace").decode()
    said = {"X-Error-Message": line} | code
    return Answer({"error": refusal.message} | refusal.details, refusal.status, said | headers)


@dataclass(frozen=True)
class Call:
    """One request, whole."""

    hub: Hub
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @cached_property
    def path(self) -> str:
        return urllib.parse.urlsplit(self.target).path

    @cached_property
    def json(self) -> Any:
        return json.loads(self.body)

    def asks(self, option: str) -> bool:
        """Tell whether an option of the query is on."""
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.target).query))
        return query.get(option, "").lower() in ("true", "1")

    @property
    def account(self) -> Account | None:
        """Who calls, if they say so; a token that is not known is refused."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        kind, _, token = header.partition(" ")
        if kind != "Bearer" or token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def readable(self, name: str) -> Repository:
        """Return a repository, if it is there for who calls.

        Who gave no token gets 401, for the Hub does not tell them what is missing and what is private. The code is
        sent with it: the client concludes it where addresses begin with https, which ours do not.
        """
        account, repository = self.account, self.hub.repositories.get(name)
        if repository and (not repository.private or (account and account.name == repository.owner)):
            return repository
        if account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self, name: str) -> Repository:
        """Return a repository that who calls may write to."""
        repository = self.readable(name)
        self.may_write(repository.owner)
        return repository

    def may_write(self, owner: str | None) -> Account:
        """Return who calls, if they may write to the repositories of that owner; without one, to their own."""
        account = self.account
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if owner not in (None, account.name):
            raise Refusal(403, f"You don't have the rights to write to the namespace {owner!r}.")
        return account
