"""A proxy before a storage that answers some requests with 503, and cuts others."""

from collections.abc import Iterator
import contextlib
import http.client
import http.server
import random
import threading
import urllib.parse

DROPPED = {"connection", "content-length", "keep-alive", "transfer-encoding"}


class Faults:
  """What goes wrong: shares of all requests, and how often it did."""

  def __init__(self, refused: float, cut: float, seed: int = 0):
    self.refused, self.cut = refused, cut
    self.counts = {"good": 0, "refused": 0, "cut": 0}
    self._random = random.Random(seed)
    self._lock = threading.Lock()

  def next(self) -> str:
    with self._lock:
      number = self._random.random()
      kinds = (("refused", self.refused), ("cut", self.refused + self.cut), ("good", 2))
      kind = next(kind for kind, bound in kinds if number < bound)
      self.counts[kind] += 1
    return kind


@contextlib.contextmanager
def proxy(url: str, faults: Faults) -> Iterator[str]:
  """Yields the URL of a proxy before `url`, on loopback."""
  host = urllib.parse.urlsplit(url).netloc

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
      body = self._body()
      kind = faults.next()
      if kind == "refused":
        self._answer(503, [], b"the storage is out of order")
        return
      connection = http.client.HTTPConnection(host, timeout=120)
      headers = {k: v for k, v in self.headers.items() if k.lower() not in DROPPED}
      connection.request(self.command, self.path, body, headers)
      response = connection.getresponse()
      data = response.read()
      connection.close()
      # The storage has done what was asked; the client sees half of the answer, or
      # nothing of it.
      self._answer(response.status, response.getheaders(), data, kind == "cut")

    def _body(self) -> bytes:
      if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
      parts = []
      while size := int(self.rfile.readline().split(b";")[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(parts)

    def _answer(self, status, headers, data, cut=False) -> None:
      self.send_response(status)
      for key, value in headers:
        if key.lower() not in DROPPED and key.lower() not in ("server", "date"):
          value = value.replace(host, self.headers["Host"])  # of an upload's session
          self.send_header(key, value)
      length = next((v for k, v in headers if k.lower() == "content-length"), len(data))
      self.send_header(
        "Content-Length", length if self.command == "HEAD" else len(data)
      )
      self.end_headers()
      if self.command != "HEAD":
        self.wfile.write(data[: len(data) // 2] if cut else data)
      if cut:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args) -> None:
      """Keeps the test's output free of one line a request."""

  for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"):
    setattr(Handler, f"do_{method}", Handler.forward)

  class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
      """Says nothing of clients that were killed."""

  server = Server(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()
