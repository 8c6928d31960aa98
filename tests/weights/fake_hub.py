"""A stand-in for the Hugging Face hub's HTTP API: repositories in memory, on loopback.

It answers what `huggingface_hub` 2.4 asks when it creates a repository, uploads a
folder as regular files, and downloads a snapshot.
"""

import base64
from collections.abc import Iterator
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

TOKEN = "hf_secretsecretsecretsecret"


class FakeHub(http.server.ThreadingHTTPServer):
  """Repositories by name: the files of every commit, by its id."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
    self.branches: dict[str, str] = {}
    self.cut = 0  # answers with a file that end in the middle
    self.asked: list[str] = []

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"

  def commit(self, repo: str, files: dict[str, bytes]) -> str:
    """Adds a commit with files on top of the last one; returns its id."""
    commits = self.commits.setdefault(repo, {})
    old = commits.get(self.branches.get(repo, ""), {})
    new = {**old, **files}
    oid = hashlib.sha1(repr(sorted(new.items())).encode()).hexdigest()
    commits[oid], self.branches[repo] = new, oid
    return oid

  def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
    oid = self.branches.get(repo) if revision == "main" else revision
    files = self.commits.get(repo, {}).get(oid or "")
    return None if files is None else (oid, files)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: FakeHub

  def log_message(self, *_):
    pass

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    path = urllib.parse.urlsplit(self.path).path
    self.server.asked.append(f"POST {path}")
    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
      self._json(401, {"error": "Invalid username or password."})
    elif path == "/api/repos/create":
      fields = json.loads(body)
      name = "/".join(filter(None, [fields.get("organization"), fields["name"]]))
      self.server.commits.setdefault(name, {})
      self._json(200, {"url": f"{self.server.url}/{name}"})
    elif path == "/api/validate-yaml":
      self._json(200, {"errors": [], "warnings": []})
    elif match := re.fullmatch(r"/api/models/(.+)/preupload/(\w+)", path):
      files = [
        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
        for f in json.loads(body)["files"]
      ]
      self._json(200, {"files": files})
    elif match := re.fullmatch(r"/api/models/(.+)/commit/(\w+)", path):
      lines = [json.loads(line) for line in body.splitlines()]
      files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
      }
      oid = self.server.commit(match[1], files)
      url = f"{self.server.url}/{match[1]}/commit/{oid}"
      self._json(200, {"commitUrl": url, "commitOid": oid, "hookOutput": ""})
    else:
      self._json(404, {"error": f"not here: {path}"})

  def do_HEAD(self):
    self._get(with_body=False)

  def do_GET(self):
    self._get(with_body=True)

  def _get(self, with_body: bool):
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    self.server.asked.append(f"{self.command} {path}")
    info = re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path)
    tree = re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)/?", path)
    file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    match = info or tree or file
    if match is None:
      self._json(404, {"error": f"not here: {path}"})
      return
    found = self.server.find(match[1], match[2])
    if found is None:
      known = match[1] in self.server.commits
      code = "RevisionNotFound" if known else "RepoNotFound"
      self._json(404, {"error": "not found"}, {"X-Error-Code": code})
      return
    oid, files = found
    if info:
      siblings = [{"rfilename": name} for name in files]
      self._json(200, {"id": match[1], "sha": oid, "siblings": siblings})
    elif tree:
      entries = [
        {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
        for n, c in files.items()
      ]
      self._json(200, entries)
    elif match[3] in files:
      self._file(oid, files[match[3]], with_body)
    else:
      self._json(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})

  def _file(self, oid: str, content: bytes, with_body: bool):
    start, status = 0, 200
    if match := re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", "")):
      start, status = int(match[1]), 206
    self.send_response(status)
    self.send_header("X-Repo-Commit", oid)
    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
    self.send_header("Content-Length", str(len(content) - start))
    if status == 206:
      self.send_header(
        "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
      )
    self.end_headers()
    if not with_body:
      return
    part = content[start:]
    if self.server.cut and len(part) > 1000:
      self.server.cut -= 1
      part = part[: len(part) // 2]
      self.close_connection = True
    self.wfile.write(part)

  def _json(self, status: int, value, headers=None):
    body = json.dumps(value).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    for name, text in (headers or {}).items():
      self.send_header(name, text)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
  """Runs a hub in a thread."""
  with FakeHub() as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join(60)
