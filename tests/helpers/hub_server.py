"""Serve a model hub on this machine: a folder per repository, with the HTTP interface that huggingface_hub uses.

A data set is a repository whose name begins with datasets/, as on the real hub.
"""

import hashlib
import itertools
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?")
RESOLVE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CDN = re.compile(r"/cdn/([0-9a-f]{64})")
MISSING_REPOSITORY = (404, "RepoNotFound", "Repository not found")


@dataclass(frozen=True)
class Request:
    """A request received by the server."""

    method: str
    host: str
    path: str
    token: str | None


@dataclass(frozen=True)
class Sent:
    """An answer with a file's content from `start` on."""

    file: str
    start: int = 0


@dataclass
class Break:
    """A fault in the next answer with a file: after some bytes it is cut, reset or held, or one byte is changed."""

    after: int
    how: str
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class HubServer(ThreadingHTTPServer):
    """The hub. As on the real hub, another host sends large files (safetensors): localhost, not 127.0.0.1."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[tuple[str, str], str] = {}
        self.breaks: dict[str, list[Break]] = {}
        self.refused: dict[str, tuple[int, str | None, str]] = {}  # repository -> the refusal of its files
        self.down: dict[str, tuple[int, str | None, str]] = {}  # repository -> the refusal of all requests
        self.edits: dict[str, Callable[[Any], Any]] = {}  # repository -> what a hostile hub makes of its listings
        self.raw: dict[str, Iterable[bytes]] = {}  # the end of a path -> what is sent for it, with its headers
        self.headers: dict[str, str] = {}  # sent with every file
        self.requests: list[Request] = []
        self.sent: list[Sent] = []

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for broken in itertools.chain(*self.breaks.values()):
            broken.released.set()
        self.shutdown()
        self.server_close()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection without a shutdown first, which would prevent a reset."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the errors of a connection, except that the other side has left."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a commit to a repository, make `revision` point to it, and return its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        for name, data in files.items():
            path = self.root / repo / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.commits[repo, revision] = self.commits[repo, commit] = commit
        return commit

    def breaking(self, file: str, after: int, how: str = "cut") -> Break:
        """Break the next answer with a file after `after` bytes.

        Args:
            how: "cut" or "reset" the connection, "hold" it until released, or "damage" the next byte.
        """
        broken = Break(after, how)
        self.breaks.setdefault(file, []).append(broken)
        return broken


class Handler(BaseHTTPRequestHandler):
    """A connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer would wait 40 ms for an acknowledgement of its headers
    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        host, token = self.headers["Host"].split(":")[0], self.headers["Authorization"]
        self.server.requests.append(Request(self.command, host, unquote(path), token))
        if (raw := next((raw for end, raw in self.server.raw.items() if self.path.endswith(end)), None)) is not None:
            self.send_raw(raw)
        elif match := CDN.fullmatch(path):
            self.send_file(next(p for p in self.server.root.rglob("*") if p.is_file() and sha256(p) == match[1]))
        elif match := API.fullmatch(path):
            self.send_api(match[1], match[2], unquote(match[3] or "main"))
        elif match := RESOLVE.fullmatch(path):
            self.send_resolved(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self.send_json({"error": "Not Found"}, 404)

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def commit_of(self, repo: str, revision: str) -> str | None:
        """Return the commit of a revision, or answer with a refusal and return None."""
        refusal = self.server.down.get(repo)
        if refusal is None and not any(known == repo for known, _ in self.server.commits):
            refusal = MISSING_REPOSITORY
        commit = self.server.commits.get((repo, revision))
        if refusal is None and commit is None:
            refusal = (404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if refusal is not None:
            self.send_refusal(*refusal)
            return None
        return commit

    def send_api(self, repo: str, kind: str | None, revision: str) -> None:
        if (commit := self.commit_of(repo, revision)) is None:
            return
        folder = self.server.root / repo / commit
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        value: Any = [{"type": "file", "path": name, **facts(path, "oid")} for name, path in paths.items()]
        if kind != "tree":
            siblings = [{"rfilename": name, **facts(path, "blobId")} for name, path in paths.items()]
            value = {"id": repo.removeprefix("datasets/"), "sha": commit, "siblings": siblings}
        self.send_json(self.server.edits.get(repo, lambda value: value)(value))

    def send_resolved(self, repo: str, revision: str, name: str) -> None:
        if (commit := self.commit_of(repo, revision)) is None:
            return
        path = self.server.root / repo / commit / name
        if repo in self.server.refused:
            self.send_refusal(*self.server.refused[repo])
        elif not path.is_file():
            self.send_refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        elif name.endswith(".safetensors"):
            place = f"http://localhost:{self.server.server_port}/cdn/{sha256(path)}"
            linked = {"X-Linked-Etag": f'"{sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            self.send_bytes(302, b"", {"X-Repo-Commit": commit, "Location": place, **linked})
        else:
            self.send_file(path, {"X-Repo-Commit": commit})

    def send_file(self, path: Path, headers: dict[str, str] | None = None) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{etag(path)}"', "Accept-Ranges": "bytes", **(headers or {}), **self.server.headers}
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(requested[1]) if requested else 0
        if self.command == "GET":
            commits = set(self.server.commits.values())
            folder = next(parent for parent in path.parents if parent.name in commits)
            self.server.sent.append(Sent(path.relative_to(folder).as_posix(), start))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if start and start >= len(data):
            self.send_bytes(416, b"", headers)
        else:
            self.send_bytes(206 if start else 200, data[start:], headers, self.server.breaks.get(path.name))

    def send_refusal(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        coded = {"X-Error-Code": code} if code else {}
        self.send_bytes(status, b"", {"X-Error-Message": message, **coded, **(headers or {})})

    def send_json(self, value: object, status: int = 200) -> None:
        self.send_bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_bytes(self, status: int, body: bytes, headers: dict[str, str], breaks: list[Break] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if breaks:
            self.send_broken(body, breaks.pop(0))
        else:
            with suppress(OSError):  # the other side may leave
                self.wfile.write(body)

    def send_raw(self, parts: Iterable[bytes]) -> None:
        """Send bytes as they are until they end or the other side leaves, then close the connection."""
        self.close_connection = True
        with suppress(OSError):
            for part in parts:
                self.wfile.write(part)

    def send_broken(self, body: bytes, broken: Break) -> None:
        """Send a body up to the break, then do what the break says."""
        if broken.how == "damage":
            changed = bytes([body[broken.after] ^ 1])
            self.wfile.write(body[: broken.after] + changed + body[broken.after + 1 :])
            return
        self.wfile.write(body[: broken.after])
        broken.reached.set()
        if broken.how == "hold":
            broken.released.wait(30)
        if broken.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def sha256(path: Path) -> str:
    """Return the hash that names a large file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def etag(path: Path) -> str:
    """Return the hub's ETag of a file: git's hash, or the SHA-256 of a large file."""
    data = path.read_bytes()
    return sha256(path) if path.suffix == ".safetensors" else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def facts(path: Path, key: str) -> dict[str, object]:
    """Return a file's entry in the hub's listings."""
    size, name = path.stat().st_size, etag(path)
    if path.suffix != ".safetensors":
        return {key: name, "size": size}
    return {key: name[:40], "size": size, "lfs": {"oid": name, "sha256": name, "size": size, "pointerSize": 134}}
