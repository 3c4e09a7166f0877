"""A hub over HTTP for tests: what huggingface_hub, transformers and datasets ask of huggingface.co, on 127.0.0.1.

    with HubServer() as hub:
        hub.fail("commit", 503, times=2)      # the next two commits are answered with 503
        api = HfApi(endpoint=hub.url, token="hf_alice")

Repositories live in memory: commits that are never changed, branches and tags that point at them, and blobs by hash.
A commit is taken whole or not at all. Every route can be made to fail: with a status, by cutting the connection before
the work is done ("cut") or after it ("lost"), in the middle of the answer ("half"), by answering slowly ("slow") or
never ("hang").
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NOW = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".png", ".jpg", ".parquet", ".gguf", ".onnx")


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code, X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        self.status, self.code, self.message, self.headers = status, code, message, headers


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    kind: str  # model, dataset, space
    id: str
    private: bool = False
    commits: dict[str, tuple[str, dict[str, File]]] = field(default_factory=dict)  # sha: (title, files)
    refs: dict[str, list[str]] = field(default_factory=dict)  # branch: its commits, oldest first
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, ref: str, title: str, files: dict[str, File]) -> str:
        history = self.refs.setdefault(ref, [])
        sha = hashlib.sha1(repr((self.id, ref, title, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = (title, files)
        history.append(sha)
        return sha

    def find(self, revision: str) -> str:
        for known in (self.refs.get(revision, [None])[-1], self.tags.get(revision)):
            if known is not None:
                return known
        if revision in self.commits:
            return revision
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.find(revision)][1]


@dataclass
class User:
    """role: read or write. orgs: name -> role in it."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)


class HubServer:
    """users: by token. multipart: LFS files of more bytes come in parts of so many bytes. requests: how often each
    route was asked. slow: seconds that a slow answer waits."""

    def __init__(self, multipart: int = 1 << 20):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.users = {
            "hf_alice": User("alice", orgs={"team": "write", "readers": "read"}),
            "hf_reader": User("alice", role="read"),
        }
        self.multipart = multipart
        self.slow = 0.3
        self.hanging = threading.Event()
        self.faults: list[list[Any]] = []  # [route, what, times, requests to pass first]
        self.requests: Counter[str] = Counter()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"  # another host, as the real one's: the token must not be sent there

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, route: str, what: int | str, times: int = 1, after: int = 0) -> None:
        assert route in {name for name, *_ in ROUTES}, f"no route {route}"
        self.faults.append([route, what, times, after])

    def next_fault(self, route: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault[0] == route and fault[2] > 0:
                    if fault[3] > 0:
                        fault[3] -= 1
                        return None
                    fault[2] -= 1
                    return fault[1]
        return None

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def create(self, repo_id: str, kind: str = "model", private: bool = False) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        repo.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return repo

    def put(self, repo_id: str, folder: Any) -> str:
        """The files of a folder as one commit of a repository, without HTTP; returns the commit."""
        repo = self.repos.get(("model", repo_id)) or self.create(repo_id)
        files = {
            str(path.relative_to(folder)): File(path.read_bytes(), path.suffix in LFS_SUFFIXES)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return repo.commit("main", "put", repo.files() | files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer goes out at once, and not with the next acknowledgement
    hub: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(split.query).items()}
        self.body = self.read_body()
        for name, methods, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, split.path)
            if found and self.command in methods.split():
                return self.route(name, answer, [unquote(group or "") for group in found.groups()])
        self.send(501, json.dumps({"error": f"the test's hub has no {self.command} {split.path}"}).encode())

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def route(self, name: str, answer: Callable[..., Any], groups: list[str]) -> None:
        self.hub.requests[name] += 1
        self.fault = self.hub.next_fault(name)
        if self.fault == "hang":
            self.hub.hanging.set()
            self.rfile.read(1)  # until the other side is gone
        if self.fault in ("cut", "hang"):
            return self.cut()
        try:
            if isinstance(self.fault, int):
                raise Refused(self.fault, message=f"the test wants {self.fault}", **{"Retry-After": "0"})
            with self.hub.lock:
                result = answer(self, *groups)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message, **refused.headers}
            body = json.dumps({"error": refused.message}).encode()
            return self.send(refused.status, body, {name: value for name, value in headers.items() if value})
        if self.fault == "lost":
            return self.cut()
        if self.fault == "slow":
            time.sleep(self.hub.slow)
        if isinstance(result, tuple):
            self.send(*result)
        else:
            self.send(200, json.dumps(result).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "fault", None) == "half":
            self.wfile.write(body[: len(body) // 2])
            return self.cut()
        self.wfile.write(body)

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------------ who, and which repository

    def user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def may_write(self, repo_id: str) -> User:
        user, namespace = self.user(), repo_id.split("/")[0]
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        mine = namespace == user.name or user.orgs.get(namespace) in ("write", "admin")
        if not mine or user.role != "write":
            raise Refused(403, message=f"you have no right to write in {namespace}")
        return user

    def found(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind.rstrip("s") or "model", repo_id))
        user = self.user()
        if repo is None or (repo.private and user is None):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write:
            self.may_write(repo_id)
        return repo

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def whoami(self) -> Any:
        user = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        orgs = [{"name": name, "type": "org", "roleInOrg": role} for name, role in user.orgs.items()]
        token = {"displayName": "test", "role": user.role}
        return {"type": "user", "name": user.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def create_repo(self) -> Any:
        wanted = self.json()
        user = self.user()
        repo_id = f"{wanted.get('organization') or (user and user.name)}/{wanted['name']}"
        self.may_write(repo_id)
        kind = wanted.get("type") or "model"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return 409, json.dumps({"error": "You already created this repo", "url": url}).encode(), {}
        self.hub.create(repo_id, kind, bool(wanted.get("private") or wanted.get("visibility") == "private"))
        return {"url": url, "name": repo_id}

    def validate_yaml(self) -> Any:
        content = self.json()["content"]
        if not re.match(r"---\n.*?\n---\n", content, re.S):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    # ------------------------------------------------------------------ what a repository holds

    def info(self, kind: str, repo_id: str, revision: str = "main") -> Any:
        repo = self.found(kind, repo_id)
        sha = repo.find(revision)
        siblings = [{"rfilename": name, "size": len(file.data)} for name, file in sorted(repo.files(sha).items())]
        about = {"id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private, "tags": [], "gated": False}
        about |= {"author": repo.id.split("/")[0], "lastModified": NOW, "createdAt": NOW, "disabled": False}
        return about | {"siblings": siblings, "downloads": 0, "likes": 0}

    def entries(self, repo: Repo, revision: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        folders = set()
        for name, file in sorted(repo.files(revision).items()):
            entry = {"type": "file", "path": name, "size": len(file.data), "oid": file.git_oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
            found.append(entry)
            parents = name.split("/")[:-1]
            folders |= {"/".join(parents[: depth + 1]) for depth in range(len(parents))}
        return found + [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]

    def tree(self, kind: str, repo_id: str, revision: str, folder: str) -> Any:
        repo = self.found(kind, repo_id)
        inside = f"{folder}/" if folder else ""
        below = [entry for entry in self.entries(repo, revision) if entry["path"].startswith(inside)]
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            below = [entry for entry in below if "/" not in entry["path"][len(inside) :]]
        if folder and not below:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        return below

    def paths_info(self, kind: str, repo_id: str, revision: str) -> Any:
        paths = self.json().get("paths") or parse_qs(self.body.decode()).get("paths", [])
        return [entry for entry in self.entries(self.found(kind, repo_id), revision) if entry["path"] in paths]

    def list_refs(self, kind: str, repo_id: str) -> Any:
        repo = self.found(kind, repo_id)
        branches = [(name, shas[-1]) for name, shas in repo.refs.items() if not name.startswith("refs/")]
        pulls = [(name, shas[-1]) for name, shas in repo.refs.items() if name.startswith("refs/")]

        def listed(pairs: Any, prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": sha} for name, sha in pairs]

        found = {"branches": listed(branches, "refs/heads/"), "tags": listed(repo.tags.items(), "refs/tags/")}
        return found | {"converts": [], "pullRequests": listed(pulls, "")}

    def list_commits(self, kind: str, repo_id: str, revision: str) -> Any:
        repo = self.found(kind, repo_id)
        shas = repo.refs.get(revision) or [repo.find(revision)]
        about = {"authors": [{"user": "alice"}], "date": NOW, "message": ""}
        return [{"id": sha, "title": repo.commits[sha][0], **about} for sha in reversed(shas)]

    def discussions(self, kind: str, repo_id: str) -> Any:
        repo = self.found(kind, repo_id)
        about = {"createdAt": NOW, "status": "open", "isPullRequest": True, "repo": {"name": repo.id, "type": "model"}}
        found = [{**pull, **about} for pull in repo.pulls]
        return {"discussions": found, "count": len(found), "start": 0}

    def resolve(self, kind: str, repo_id: str, revision: str, name: str) -> Any:
        repo = self.found(kind, repo_id)
        sha = repo.find(revision)
        file = repo.files(sha).get(name)
        if file is None:
            raise Refused(404, "EntryNotFound", f"{name} does not exist", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if not file.lfs:
            return self.ranged(file.data, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        self.hub.blobs[file.sha256] = file.data
        return 302, b"", headers | {"Location": f"{self.hub.cdn}/cdn/{file.sha256}"}

    def cdn(self, oid: str) -> Any:
        if "Authorization" in self.headers:
            raise Refused(400, message="a token was sent to another host")
        return self.ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def ranged(self, data: bytes, headers: dict[str, str]) -> Any:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, data, headers | {"Content-Length": str(len(data))}
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            raise Refused(416, **{"Content-Range": f"bytes */{len(data)}"})
        part = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "Content-Length": str(last + 1 - first)}
        return 206, data[first : last + 1], headers | part

    # ------------------------------------------------------------------ pushing

    def preupload(self, kind: str, repo_id: str, revision: str) -> Any:
        offered = "create_pr" in self.query or revision.startswith("refs/pr/")
        repo = self.found(kind, repo_id, write=not offered)
        held = repo.files(revision)
        answers = []
        for wanted in self.json()["files"]:
            path = wanted["path"]
            lfs = path.endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": held[path].etag} if path in held else {}))
        return {"files": answers}

    def lfs_batch(self, kind: str, repo_id: str) -> Any:
        self.found(kind, repo_id)
        if self.user() is None:
            raise Refused(401, message="Invalid username or password.")
        objects = []
        for wanted in self.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > self.hub.multipart:
                    count = -(-size // self.hub.multipart)
                    upload["href"] += "/complete"
                    upload["header"] = {str(n): f"{self.hub.url}/lfs/{oid}/{n}" for n in range(1, count + 1)}
                    upload["header"]["chunk_size"] = str(self.hub.multipart)
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, part: str = "") -> Any:
        if part:
            self.hub.parts[oid, int(part)] = self.body
        elif hashlib.sha256(self.body).hexdigest() == oid:
            self.hub.blobs[oid] = self.body
        else:
            raise Refused(400, message="the bytes are not those of the hash")
        return 200, b"", {"ETag": f'"{oid}-{part}"'}

    def lfs_complete(self, oid: str) -> Any:
        numbers = [part["partNumber"] for part in self.json()["parts"]]
        data = b"".join(self.hub.parts[oid, number] for number in numbers)
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, message="the parts are not those of the hash")
        self.hub.blobs[oid] = data
        return {}

    def lfs_verify(self, oid: str) -> Any:
        if oid not in self.hub.blobs:
            raise Refused(404, message="was not uploaded")
        return {}

    def commit(self, kind: str, repo_id: str, revision: str) -> Any:
        opens = self.query.get("create_pr") == "1"
        repo = self.found(kind, repo_id, write=not opens and not revision.startswith("refs/pr/"))
        if (user := self.user()) is None:
            raise Refused(401, message="Invalid username or password.")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = repo.find(revision)
        if header.get("parentCommit", head) != head:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, message=f"the LFS object of {value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(value["path"])}
        answer = {}
        if opens:
            number = len(repo.pulls) + 1
            repo.pulls.append({"num": number, "title": header["summary"], "author": {"name": user.name}})
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo.id}/discussions/{number}"
        sha = repo.commit(revision, header["summary"], files)
        return answer | {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.id}/commit/{sha}"}

    def branch(self, kind: str, repo_id: str, name: str) -> Any:
        repo = self.found(kind, repo_id, write=True)
        if name in repo.refs:
            raise Refused(409, message="Reference already exists")
        repo.refs[name] = [repo.find(self.json().get("startingPoint", "main"))]
        return {}

    def tag(self, kind: str, repo_id: str, revision: str) -> Any:
        repo = self.found(kind, repo_id, write=True)
        name = self.json()["tag"]
        if name in repo.tags:
            raise Refused(409, message="Tag reference exists already")
        repo.tags[name] = repo.find(revision)
        return {}


API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
LFS = r"/lfs/([0-9a-f]{64})"
REV = r"([^/]+|refs/pr/\d+|refs(?:/|%2F)convert(?:/|%2F)\w+)"
# name (for `fail`), methods, path, what answers it; the first that matches counts
ROUTES: list[tuple[str, str, str, Callable[..., Any]]] = [
    ("whoami", "GET", r"/api/whoami-v2", _Handler.whoami),
    ("create", "POST", r"/api/repos/create", _Handler.create_repo),
    ("validate-yaml", "POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("info", "GET", API, _Handler.info),
    ("info", "GET", rf"{API}/revision/{REV}", _Handler.info),
    ("tree", "GET", rf"{API}/tree/{REV}(?:/(.*))?", _Handler.tree),
    ("paths-info", "POST", rf"{API}/paths-info/{REV}", _Handler.paths_info),
    ("refs", "GET", rf"{API}/refs", _Handler.list_refs),
    ("commits", "GET", rf"{API}/commits/{REV}", _Handler.list_commits),
    ("discussions", "GET", rf"{API}/discussions", _Handler.discussions),
    ("branch", "POST", rf"{API}/branch/{REV}", _Handler.branch),
    ("tag", "POST", rf"{API}/tag/{REV}", _Handler.tag),
    ("preupload", "POST", rf"{API}/preupload/{REV}", _Handler.preupload),
    ("commit", "POST", rf"{API}/commit/{REV}", _Handler.commit),
    (
        "lfs-batch",
        "POST",
        r"/((?:datasets|spaces)(?=/)|)/?([^/]+/[^/]+)\.git/info/lfs/objects/batch",
        _Handler.lfs_batch,
    ),
    ("lfs-complete", "POST", rf"{LFS}/complete", _Handler.lfs_complete),
    ("lfs-verify", "POST", rf"{LFS}/verify", _Handler.lfs_verify),
    ("lfs-part", "PUT", rf"{LFS}/(\d+)", _Handler.lfs_put),
    ("lfs-put", "PUT", LFS, _Handler.lfs_put),
    ("cdn", "HEAD GET", r"/cdn/([0-9a-f]{64})", _Handler.cdn),
    ("head", "HEAD", rf"/((?:datasets|spaces)(?=/)|)/?([^/]+/[^/]+)/resolve/{REV}/(.+)", _Handler.resolve),
    ("download", "GET", rf"/((?:datasets|spaces)(?=/)|)/?([^/]+/[^/]+)/resolve/{REV}/(.+)", _Handler.resolve),
]
