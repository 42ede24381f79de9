"""A small stand-in for the Hugging Face Hub on 127.0.0.1, for tests that have no network.

    with HubServer() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.client_env(tmp_path / "hf_home"), check=True)
        hub.files("user/repo")      # {"config.json": b"...", ...} at main
        hub.commits("user/repo")    # [{"sha": ..., "title": ...}, ...], oldest first

Clients must be other processes: `huggingface_hub` reads HF_ENDPOINT when it is imported. Repositories are in memory,
and new ones are empty. There is one branch. Files are sent whole, where the Hub would use LFS or Xet for large ones.
Any token may write, and nothing is private. Unknown requests get status 501: a test can search `hub.requests`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

USER = "user"  # the token's owner: `create_repo("name")` creates "user/name"
CLIENT_VARIABLES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "PYTHONPATH")
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+(?:/[^/]+)?)"
REV = r"(?P<rev>[^/]+)"
ROUTES = [  # method ("GET" also for HEAD), path, and the method of HubServer that replies
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("GET", REPO, "repo_info"),
    ("GET", rf"{REPO}/revision/{REV}", "repo_info"),
    ("GET", rf"{REPO}/tree/{REV}(?:/(?P<path>.+))?", "list_tree"),
    ("POST", rf"{REPO}/preupload/{REV}", "preupload"),
    ("POST", rf"{REPO}/commit/{REV}", "commit"),
    ("GET", rf"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+(?:/[^/]+)?)/resolve/{REV}/(?P<path>.+)", "resolve"),
]
NEEDS_TOKEN = {"create_repo", "preupload", "commit"}


def git_oid(content: bytes) -> str:
    """Git's id of a file. Clients compare it with their own, and leave unchanged files out of a commit."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]  # all files of the repository at this commit


class Repo:
    def __init__(self, repo_id: str):
        self.id = repo_id
        self.commits = [Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", {})]

    def at(self, revision: str) -> Commit:
        if revision == "main":
            return self.commits[-1]
        found = [commit for commit in self.commits if commit.sha == revision]
        if not found:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def commit(self, branch: str, title: str, message: str, changes: dict[str, bytes | None]) -> Commit:
        """Adds a commit to main. A change to None deletes the path."""
        parent = self.commits[-1]
        files = {path: content for path, content in {**parent.files, **changes}.items() if content is not None}
        listed = "".join(f"\n{path} {git_oid(files[path])}" for path in sorted(files))
        sha = hashlib.sha1(f"{parent.sha}\n{title}\n{message}{listed}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, files))
        return self.commits[-1]


class HubError(Exception):
    """An error reply. Clients choose the exception to raise by `code`, then by `status`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Reply:
    body: bytes
    status: int
    headers: dict[str, str]


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

    def client_env(self, hf_home) -> dict[str, str]:
        """Returns the environment for a client: this process's, without its Hub settings and its PYTHONPATH."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_VARIABLES)}
        env |= {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_dummy", "HF_HOME": str(hf_home), "NO_PROXY": "127.0.0.1"}
        return env | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def files(self, repo_id: str) -> dict[str, bytes]:
        return dict(self.repos["models", repo_id].at("main").files)

    def commits(self, repo_id: str) -> list[dict]:
        commits = self.repos["models", repo_id].commits[1:]
        return [{"sha": commit.sha, "title": commit.title} for commit in commits]

    # Each of the following methods serves one route, and returns a Reply or the JSON to send.

    def reply(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        for route_method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path) if route_method == method.replace("HEAD", "GET") else None
            if found is None:
                continue
            if name in NEEDS_TOKEN and not re.match(r"Bearer \S", headers.get("authorization", "")):
                raise HubError(401, "Invalid username or password.")
            args = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
            if "repo_id" in args:
                place = args.pop("kind", "models"), args.pop("repo_id")
                if place not in self.repos:
                    raise HubError(404, "Repository not found", "RepoNotFound")
                args["repo"] = self.repos[place]
            with self.lock:
                reply = getattr(self, name)(body, **args)
            return reply if isinstance(reply, Reply) else Reply(json.dumps(reply).encode(), 200, {})
        raise HubError(501, f"The stand-in Hub does not know {method} {path}")

    def validate_yaml(self, body):
        return {"errors": [], "warnings": []}

    def create_repo(self, body):
        request = json.loads(body)
        kind = (request.get("type") or "model") + "s"
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.url}/{repo_id}" if kind == "models" else f"{self.url}/{kind}/{repo_id}"
        if (kind, repo_id) in self.repos:
            error = {"error": "You already created this repo", "url": url}
            return Reply(json.dumps(error).encode(), 409, {"X-Error-Message": error["error"]})
        self.repos[kind, repo_id] = Repo(repo_id)
        return {"url": url, "name": repo_id}

    def repo_info(self, body, repo, rev="main"):
        commit = repo.at(rev)
        info = {"_id": git_oid(repo.id.encode()), "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha}
        info |= {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        return info | {"siblings": [{"rfilename": path} for path in commit.files]}

    def list_tree(self, body, repo, rev, path=""):
        """All files below a folder, as clients that ask for a recursive listing want them."""
        prefix = f"{path}/" if path else ""
        files = {name: content for name, content in sorted(repo.at(rev).files.items()) if name.startswith(prefix)}
        file = {"type": "file"}
        return [{**file, "path": name, "size": len(text), "oid": git_oid(text)} for name, text in files.items()]

    def preupload(self, body, repo, rev):
        oids = {path: git_oid(content) for path, content in repo.at(rev).files.items()}
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": path, "oid": oids.get(path), **mode} for path in paths]}

    def commit(self, body, repo, rev):
        title, message, changes = "", "", {}
        for item in map(json.loads, body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header":
                title, message = value["summary"], value.get("description", "")
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                changes.setdefault(value["path"].strip("/"), None)
            else:  # "lfsFile" comes only after `preupload` answered "lfs"
                raise HubError(501, f"The stand-in Hub does not take {key!r} in a commit")
        new = repo.commit(rev, title, message, changes)
        return {"success": True, "commitOid": new.sha, "commitUrl": f"{self.url}/{repo.id}/commit/{new.sha}"}

    def resolve(self, body, repo, rev, path):
        commit = repo.at(rev)
        headers = {"X-Repo-Commit": commit.sha}  # also with 404: clients then remember that there is no such file
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {"ETag": f'"{git_oid(commit.files[path])}"', "Content-Type": "application/octet-stream"}
        return Reply(commit.files[path], 200, headers)


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # clients download with several threads


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True

    def respond(self):
        path, _, _ = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            reply = self.server.hub.reply(self.command, path, headers, body)
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
