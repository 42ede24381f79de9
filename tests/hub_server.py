"""A small stand-in for the Hugging Face Hub on 127.0.0.1, for tests that have no network.

    with HubServer() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.client_env(tmp_path / "hf_home"), check=True)
        hub.files("user/repo")      # {"config.json": b"...", ...} at main
        hub.commits("user/repo")    # [{"sha": ..., "title": ..., "files": ["config.json", ...]}, ...], oldest first

Clients must be other processes: `huggingface_hub` reads HF_ENDPOINT when it is imported.

It holds repositories in memory and answers the requests of `huggingface_hub` and `transformers` that create a
repository, upload to it and load from it. It differs from the Hub in these ways:

- Every file is a "regular" file, whatever its size: its content is part of the commit request. The Hub would use LFS
  or Xet for large files. As a consequence `upload_folder` makes a commit for each 100 MB, where the Hub would take
  one.
- There are branches, but no tags and no pull requests.
- A new repository is empty, where the Hub would add a `.gitattributes`.
- Any token may write to every repository. Writing without a token is refused. Nothing is private.

Unknown requests get status 501. A test can search `hub.requests` for them.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

USER = "user"  # the token's owner: `create_repo("name")` creates "user/name"
CLIENT_VARIABLES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "PYTHONPATH")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_oid(content: bytes) -> str:
    """Git's id of a file. Clients compare it with their own, and leave unchanged files out of a commit."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: "Commit | None"
    title: str
    message: str
    changed: list[str]
    files: dict[str, bytes]  # all files of the repository at this commit
    date: str = field(default_factory=now)

    def history(self) -> list["Commit"]:
        """Returns this commit and its ancestors, newest first, without the empty first commit of a repository."""
        return [self, *self.parent.history()] if self.parent else []


class Repo:
    def __init__(self, repo_id: str):
        self.id = repo_id
        first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), None, "initial commit", "", [], {})
        self.by_sha = {first.sha: first}
        self.branches = {"main": first}

    def at(self, revision: str) -> Commit:
        for known in (self.branches, self.by_sha):
            if revision in known:
                return known[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, title: str, message: str, changes: dict[str, bytes | None]) -> Commit:
        """Adds a commit to a branch. A change to None deletes the path."""
        parent = self.branches[branch]
        files = {path: content for path, content in {**parent.files, **changes}.items() if content is not None}
        digest = hashlib.sha1(f"{parent.sha}\n{title}\n{message}".encode())
        for path in sorted(files):
            digest.update(f"\n{path} {git_oid(files[path])}".encode())
        new = Commit(digest.hexdigest(), parent, title, message, sorted(changes), files)
        self.by_sha[new.sha] = self.branches[branch] = new
        return new


class HubError(Exception):
    """An error reply. Clients choose the exception to raise by `code`, then by `status`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Request:
    method: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass
class Reply:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+(?:/[^/]+)?)"
REV = r"(?P<rev>[^/]+)"
ROUTES = [  # method ("GET" also for HEAD), path, and the method of HubServer that replies
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("GET", REPO, "repo_info"),
    ("GET", rf"{REPO}/revision/{REV}", "repo_info"),
    ("GET", rf"{REPO}/tree/{REV}(?:/(?P<path>.+))?", "list_tree"),
    ("POST", rf"{REPO}/paths-info/{REV}", "paths_info"),
    ("POST", rf"{REPO}/branch/{REV}", "create_branch"),
    ("POST", rf"{REPO}/preupload/{REV}", "preupload"),
    ("POST", rf"{REPO}/commit/{REV}", "commit"),
    ("GET", rf"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+(?:/[^/]+)?)/resolve/{REV}/(?P<path>.+)", "resolve"),
]
NEEDS_TOKEN = {"whoami", "create_repo", "delete_repo", "create_branch", "preupload", "commit"}


class HubServer:
    """Serves on a free port while used as a context manager. `requests` lists "METHOD path -> status" of each call."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("models", "datasets", "spaces") and id
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self.server.shutdown()
        self.server.server_close()

    # For tests.

    def client_env(self, hf_home) -> dict[str, str]:
        """Returns the environment for a client: this process's, without its Hub settings and its PYTHONPATH."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_VARIABLES)}
        env |= {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_dummy", "HF_HOME": str(hf_home), "NO_PROXY": "127.0.0.1"}
        return env | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def files(self, repo_id: str, kind: str = "models") -> dict[str, bytes]:
        return dict(self.repos[kind, repo_id].at("main").files)

    def commits(self, repo_id: str, kind: str = "models") -> list[dict]:
        history = reversed(self.repos[kind, repo_id].at("main").history())
        return [{"sha": commit.sha, "title": commit.title, "files": list(commit.changed)} for commit in history]

    # For clients. Each method serves one route, and returns a Reply or the JSON to send.

    def reply(self, request: Request, path: str) -> Reply:
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path) if route_method == method else None
            if found is None:
                continue
            if name in NEEDS_TOKEN and not re.match(r"Bearer \S", request.headers.get("authorization", "")):
                raise HubError(401, "Invalid username or password.")
            args = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
            if "repo_id" in args:
                kind, repo_id = args.pop("kind", "models"), args.pop("repo_id")
                if (kind, repo_id) not in self.repos:
                    raise HubError(404, "Repository not found", "RepoNotFound")
                args["repo"] = self.repos[kind, repo_id]
            with self.lock:
                reply = getattr(self, name)(request, **args)
            return reply if isinstance(reply, Reply) else Reply(json.dumps(reply).encode())
        raise HubError(501, f"The stand-in Hub does not know {request.method} {path}")

    def whoami(self, request):
        token = {"displayName": "dummy", "role": "write"}
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": token}}

    def validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    def create_repo(self, request):
        body = json.loads(request.body)
        kind = (body.get("type") or "model") + "s"
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        url = f"{self.url}/{repo_id}" if kind == "models" else f"{self.url}/{kind}/{repo_id}"
        if (kind, repo_id) in self.repos:
            error = {"error": "You already created this repo", "url": url}
            return Reply(json.dumps(error).encode(), 409, {"X-Error-Message": error["error"]})
        self.repos[kind, repo_id] = Repo(repo_id)
        return {"url": url, "name": repo_id}

    def delete_repo(self, request):
        body = json.loads(request.body)
        name = (body.get("type") or "model") + "s", f"{body.get('organization') or USER}/{body['name']}"
        if self.repos.pop(name, None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return {}

    def repo_info(self, request, repo, rev="main"):
        commit = repo.at(rev)
        info = {"_id": git_oid(repo.id.encode()), "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha}
        info |= {"lastModified": commit.date, "private": False, "gated": False, "disabled": False, "tags": []}
        info |= {"downloads": 0, "likes": 0}
        if "blobs" in request.query:  # `model_info(..., files_metadata=True)`
            details = {path: {"size": len(data), "blobId": git_oid(data)} for path, data in commit.files.items()}
        else:
            details = {path: {} for path in commit.files}
        return info | {"siblings": [{"rfilename": path, **detail} for path, detail in details.items()]}

    def list_tree(self, request, repo, rev, path=""):
        commit = repo.at(rev)
        entries, prefix = self.entries(commit), f"{path}/" if path else ""
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        below = [entry for name, entry in entries.items() if name.startswith(prefix)]
        if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(prefix)]
        return below

    def paths_info(self, request, repo, rev):
        paths = parse_qs(request.body.decode()).get("paths", [])
        entries = self.entries(repo.at(rev))
        return [entries[path.strip("/")] for path in paths if path.strip("/") in entries]

    def entries(self, commit: Commit) -> dict[str, dict]:
        found = {}
        for path, content in sorted(commit.files.items()):
            parts = path.split("/")
            for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": git_oid(folder.encode())}
            found[path] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        return found

    def create_branch(self, request, repo, rev):
        if rev in repo.branches:
            raise HubError(409, f"Reference already exists: {rev}")
        repo.branches[rev] = repo.at(json.loads(request.body).get("startingPoint", "main"))
        return {}

    def preupload(self, request, repo, rev):
        oids = {path: git_oid(content) for path, content in repo.at(rev).files.items()}
        paths = [file["path"] for file in json.loads(request.body)["files"]]
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        return {"files": [{"path": path, "oid": oids.get(path), **mode} for path in paths]}

    def commit(self, request, repo, rev):
        if rev not in repo.branches:
            raise HubError(404, f"Not a branch: {rev}", "RevisionNotFound")
        if "create_pr" in request.query:
            raise HubError(501, "The stand-in Hub has no pull requests")
        head, title, message, changes = repo.branches[rev], "", "", {}
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title, message = value["summary"], value.get("description", "")
                if not head.sha.startswith(value.get("parentCommit", "")):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key in ("deletedFile", "deletedFolder"):
                path = value["path"].strip("/")
                deleted = [p for p in head.files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
                if not deleted:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes |= {p: None for p in deleted if p not in changes}
            else:  # "lfsFile" comes only after `preupload` answered "lfs"
                raise HubError(501, f"The stand-in Hub does not take {key!r} in a commit")
        new = repo.commit(rev, title, message, changes)
        return {"success": True, "commitOid": new.sha, "commitUrl": f"{self.url}/{repo.id}/commit/{new.sha}"}

    def resolve(self, request, repo, rev, path):
        commit = repo.at(rev)
        headers = {"X-Repo-Commit": commit.sha}  # also with 404: clients then remember that there is no such file
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        content = commit.files[path]
        headers |= {"ETag": f'"{git_oid(content)}"', "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if not wanted or wanted[0] == "bytes=-":
            return Reply(content, 200, headers)
        size = len(content)
        if wanted[1]:
            start, end = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        else:
            start, end = max(size - int(wanted[2]), 0), size - 1
        if start > end:
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return Reply(content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"})


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # clients download with several threads


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True

    def respond(self):
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            reply = self.server.hub.reply(Request(self.command, parse_qs(query), headers, body), path)
        except HubError as error:
            reply = Reply(json.dumps({"error": str(error)}).encode(), error.status, error.headers)
        except Exception as error:  # a bug in this file; clients show the message, and would retry after a 500
            reply = Reply(b"", 501, {"X-Error-Message": repr(error)})
        self.server.hub.requests.append(f"{self.command} {unquote(path)} -> {reply.status}")
        self.send_response(reply.status)
        for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
            self.send_header(name, value.replace("\n", " "))
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond  # noqa: N815

    def log_message(self, *args):
        pass
