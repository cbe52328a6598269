"""A Hugging Face Hub in one process, of the standard library and PyYAML, to test pushes against without a network.

It speaks as much of the Hub's HTTP API as huggingface_hub 2, transformers 5 and gradio 6 use:

    account     whoami, with a token that may write and one that may only read; organisations; auth-check
    repos       create (models, datasets, Spaces; private ones; 403 in a namespace of others), info, tree
    cards       validate-yaml, by the rules of the documentation
    uploads     preupload, LFS batch + PUT (sha256 checked) + verify, commits with deletions
    downloads   resolve with ETag, Range and LFS headers; revisions
    Spaces      variables, secrets, hardware, runtime, logs, restart, pause, sleeptime
    faults      `hub.fail.append(Fault(...))`: the next matching requests fail with a status, or are cut off

A client needs HF_ENDPOINT (before `import huggingface_hub`) and HF_TOKEN. Xet's own storage is not spoken: set
HF_HUB_DISABLE_XET=1, or take `Hub(lfs=False)`, which has every file arrive inside its commit.

    python tests/fakehub.py --port 8000        serves one by hand, and says how to reach it
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from card_rules import mistakes

USER, ORGANISATION = "alice", "acme"
TOKEN, READ_TOKEN = "hf_fakeWrite", "hf_fakeRead"
ROLES = {TOKEN: "write", READ_TOKEN: "read"}
LFS_SIZE = 1 << 20  # bytes
DATE = "2026-01-01T00:00:00.000Z"
REPO = r"([^/]+/[^/]+)"
RUNTIME = ("runtime", "restart", "pause", "sleeptime")
CUT_OFF = 0  # a Fault's status: the connection ends without an answer


@dataclass
class Fault:
    """Answers requests whose "METHOD /path" matches `pattern` with `status`: after `skip` of them, the next `times`."""

    pattern: str
    status: int
    body: bytes = b'{"error": "fault"}'
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    skip: int = 0

    def strikes(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.skip -= 1
        return self.skip < 0


class HubError(Exception):
    """An answer other than 200: `code` and `message` as the Hub names them, `more` for its body."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **more):
        super().__init__(message)
        self.status, self.body = status, {"error": message} | more
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


@dataclass
class Repo:
    kind: str  # model, dataset or space
    id: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha -> file name -> content, oldest first
    space: dict = field(default_factory=lambda: {"variables": {}, "secrets": {}, "hardware": "cpu-basic"})
    stages: list[str] = field(default_factory=lambda: ["RUNNING"])  # that a Space goes through, one a request
    logs: list[str] = field(default_factory=list)

    def at(self, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """The sha and the files of a revision."""
        sha = list(self.commits)[-1] if revision in ("main", "HEAD") else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        return sha


class Hub:
    """A running hub at `url`; `with Hub() as hub` closes it at the end.

    `requests` lists what was asked as "METHOD /path"; `blobs` holds the LFS files that arrived, by sha256.
    """

    def __init__(self, port: int = 0, lfs: bool = True):
        self.lfs = lfs
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail: list[Fault] = []
        self.stages: list[str] = []  # that a new Space goes through first
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return repo

    def asked(self, pattern: str) -> list[str]:
        """The requests so far that match."""
        return [request for request in self.requests if re.search(pattern, request)]

    def is_lfs(self, name: str, size: int) -> bool:
        return self.lfs and (size > LFS_SIZE or name.endswith(".safetensors"))

    def entry(self, name: str, data: bytes) -> dict:
        """A file as the API lists it."""
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        listed = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if self.is_lfs(name, len(data)):
            listed["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return listed

    def etag(self, name: str, data: bytes) -> str:
        entry = self.entry(name, data)
        return entry.get("lfs", entry)["oid"]


class _Handler(BaseHTTPRequestHandler):
    """A method of a route returns the body of its answer, or raises `HubError`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are written apart: 40 ms an answer otherwise
    hub: Hub

    def log_message(self, *args) -> None:
        """Silent: a test reads `hub.requests`."""

    def answer(self) -> None:
        self.route = unquote(urlsplit(self.path).path)
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.role = ROLES.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        request = f"{self.command} {self.route}"
        self.hub.requests.append(request)
        if fault := next((fault for fault in self.hub.fail if fault.strikes(request)), None):
            return self.send_fault(fault)
        try:
            return self.send(*self.routed())
        except HubError as problem:
            return self.send(problem.status, problem.body, problem.headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    def routed(self) -> tuple[int, bytes | dict | list, dict]:
        if match := re.fullmatch(rf"/(?:(datasets|spaces)/)?{REPO}/resolve/([^/]+)/(.+)", self.route):
            return self.resolve(*match.groups())
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, self.route):
                return 200, method(self, *match.groups()), {}
        raise HubError(404, f"Not found: {self.route}")

    def send(self, status: int, body: bytes | dict | list, headers: dict) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_fault(self, fault: Fault) -> None:
        fault.times -= 1
        if fault.times == 0:
            self.hub.fail.remove(fault)
        if fault.status == CUT_OFF:
            self.close_connection = True
        else:
            self.send(fault.status, fault.body, fault.headers)

    def whoami(self) -> dict:
        if not self.role:
            raise HubError(401, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"role": self.role, "displayName": "test"}}
        organisations = [{"type": "org", "name": ORGANISATION, "roleInOrg": "write"}]
        return {"type": "user", "name": USER, "fullname": USER, "isPro": False, "orgs": organisations, "auth": access}

    def owns(self, repo_id: str) -> bool:
        return bool(self.role) and repo_id.split("/")[0] in (USER, ORGANISATION)

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" and self.owns(repo_id)

    # repos

    def create_repo(self) -> dict:
        asked = json.loads(self.data)
        kind, owner = asked.get("type", "model"), asked.get("organization") or USER
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if not self.role:
            raise HubError(401, "Invalid credentials in Authorization header")
        if not self.may_write(repo_id):
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        if (kind, repo_id) in self.hub.repos:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        repo = self.hub.create(kind, repo_id, asked.get("visibility") == "private")
        repo.space["variables"] = {variable["key"]: variable for variable in asked.get("variables") or []}
        repo.space["hardware"] = asked.get("hardware") or "cpu-basic"
        repo.stages[:0] = self.hub.stages
        return {"url": url, "name": repo_id, "id": repo_id}

    def repo_api(self, kinds: str, repo_id: str, verb: str | None, rest: str | None) -> dict | list | bytes:
        """Everything at and below /api/models/OWNER/NAME, and the same for data sets and Spaces."""
        verb, rest = verb or "", rest or ""
        repo = self.visible(kinds, repo_id)
        if (self.command != "GET" or rest == "write") and not self.may_write(repo_id):
            raise HubError(403, "You don't have the rights to write to this repository")
        if verb == "auth-check":
            return {}
        reads = {"": self.info, "revision": self.info, "tree": self.tree}
        verbs = reads | {"preupload": self.preupload, "commit": self.take_commit}
        if verb not in verbs:
            return self.space(repo, verb)
        revision, _, path = rest.partition("/")
        return verbs[verb](repo, *repo.at(revision or "main"), path)

    def visible(self, kinds: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kinds.removesuffix("s"), repo_id))
        if repo is None or (repo.private and not self.owns(repo_id)):
            raise HubError(404 if self.role else 401, "Repository not found", "RepoNotFound")
        return repo

    def info(self, repo: Repo, sha: str, files: dict[str, bytes], path: str) -> dict:
        names = {"_id": "0" * 24, "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": sha}
        state = {"private": repo.private, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
        listed = {"siblings": [{"rfilename": name} for name in sorted(files)], "createdAt": DATE, "lastModified": DATE}
        return names | state | listed | ({"sdk": "gradio"} if repo.kind == "space" else {})

    def tree(self, repo: Repo, sha: str, files: dict[str, bytes], path: str) -> list:
        below = f"{path}/" if path else ""
        listed = [self.hub.entry(name, data) for name, data in sorted(files.items()) if name.startswith(below)]
        if not listed:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        return listed

    # uploads

    def validate_yaml(self) -> dict:
        asked = json.loads(self.data)
        if errors := list(mistakes(asked["content"], asked["repoType"])):
            raise HubError(400, "Invalid metadata in README.md", errors=[{"message": error} for error in errors])
        return {"errors": [], "warnings": []}

    def preupload(self, repo: Repo, sha: str, files: dict[str, bytes], path: str) -> dict:
        modes = []
        for asked in json.loads(self.data)["files"]:
            name = asked["path"]
            mode = "lfs" if self.hub.is_lfs(name, asked["size"]) else "regular"
            known = self.hub.etag(name, files[name]) if name in files else None
            modes.append({"path": name, "shouldIgnore": False, "uploadMode": mode, "oid": known})
        return {"files": modes}

    def lfs_batch(self) -> dict:
        objects = []
        for asked in json.loads(self.data)["objects"]:
            upload = {"href": f"{self.hub.url}/_lfs/{asked['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/_verify"}}
            present = asked["oid"] in self.hub.blobs
            objects.append({"oid": asked["oid"], "size": asked["size"]} | ({} if present else {"actions": actions}))
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict:
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise HubError(400, "sha256 mismatch")
        self.hub.blobs[oid] = self.data
        return {}

    def lfs_verify(self) -> dict:
        if json.loads(self.data)["oid"] not in self.hub.blobs:
            raise HubError(404, "This object was not uploaded")
        return {}

    def take_commit(self, repo: Repo, sha: str, files: dict[str, bytes], path: str) -> dict:
        values = {"header": [], "file": [], "lfsFile": [], "deletedFile": [], "deletedFolder": []}
        for line in filter(None, self.data.splitlines()):
            operation = json.loads(line)
            values[operation["key"]].append(operation["value"])
        if values["header"][0].get("parentCommit") not in (None, repo.at()[0]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        deleted = {file["path"] for file in values["deletedFile"]}
        folders = tuple(folder["path"].rstrip("/") + "/" for folder in values["deletedFolder"])
        kept = {name: data for name, data in files.items() if name not in deleted and not name.startswith(folders)}
        added = {file["path"]: base64.b64decode(file["content"]) for file in values["file"]}
        for file in values["lfsFile"]:
            if file["oid"] not in self.hub.blobs:
                raise HubError(400, f"The LFS object of {file['path']} was not uploaded")
            added[file["path"]] = self.hub.blobs[file["oid"]]
        done = repo.commit(kept | added)
        url = f"{self.hub.url}/{repo.id}/commit/{done}"
        return {"success": True, "commitOid": done, "commitUrl": url, "pullRequestUrl": None}

    # downloads

    def resolve(self, kinds: str | None, repo_id: str, revision: str, name: str) -> tuple[int, bytes, dict]:
        sha, files = self.visible(kinds or "models", repo_id).at(revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if name not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        data = files[name]
        headers["ETag"] = etag = f'"{self.hub.etag(name, data)}"'
        if self.hub.is_lfs(name, len(data)):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": len(data)}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, data, headers
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        part = data[first : last + 1]
        return 206, part, headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}

    def space(self, repo: Repo, verb: str) -> dict | bytes:
        if repo.kind != "space" or verb not in ("variables", "secrets", "hardware", "logs", *RUNTIME):
            raise HubError(404, f"Not found: {self.route}")
        if verb == "logs":
            return "".join(f"data: {json.dumps({'data': line})}\n\n" for line in repo.logs).encode()
        asked = json.loads(self.data or b"{}")
        if verb in ("variables", "secrets"):
            if self.command == "POST":
                repo.space[verb][asked["key"]] = {"description": None} | asked
            elif self.command == "DELETE":
                repo.space[verb].pop(asked["key"], None)
            return repo.space[verb]
        flavor = repo.space["hardware"] = asked.get("flavor", repo.space["hardware"])
        hardware = {"current": flavor, "requested": flavor}
        stage = repo.stages.pop(0) if len(repo.stages) > 1 else repo.stages[0]
        return {"stage": stage, "hardware": hardware, "sdk": "gradio", "storage": None, "gcTimeout": 172800}


ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create_repo),
    (rf"/api/(models|datasets|spaces)/{REPO}(?:/([^/]+)(?:/(.*))?)?", _Handler.repo_api),
    (r"/.+\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/_lfs/(\w+)", _Handler.lfs_put),
    (r"/_verify", _Handler.lfs_verify),
]


def main() -> None:
    cli = argparse.ArgumentParser(description="Serves a fake Hugging Face Hub on this machine until Ctrl-C.")
    cli.add_argument("--port", type=int, default=8000)
    with Hub(cli.parse_args().port) as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
