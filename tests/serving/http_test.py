"""HTTP as clients and proxies speak it: HEAD, gzip, CORS, ids, slow clients."""

import gzip
import json
import logging
import socket
import zlib

import pytest

pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llamagen_jax.serving.http_server import Timeouts  # noqa: E402
from tests.serving import live  # noqa: E402

PATH = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}
BODY = {"prompt": "1"}
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def server(image_model):
  with live.serve(image_model) as server:
    yield server


@pytest.fixture(scope="module")
def cors(image_model):
  with live.serve(image_model, key=live.KEY, app={"cors_origins": [ORIGIN]}) as server:
    yield server


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics"])
def test_head(server, path):
  got, head = live.HTTP.get(server.url + path), live.HTTP.head(server.url + path)
  assert head.status_code == got.status_code == 200 and head.content == b""
  assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
  "path", ["/v1/models/", "/v1/models/tiny/", "/health/", "//v1/models", "/v1//models"]
)
def test_a_path_with_a_slash_too_many(server, path):
  assert live.HTTP.get(server.url + path).status_code == 200
  assert live.HTTP.post(f"{server.url}{PATH}/", json=BODY).status_code == 200


@pytest.mark.parametrize(
  "encoding, pack", [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_bodies(server, encoding, pack):
  def post(data: bytes):
    headers = JSON | {"Content-Encoding": encoding}
    return live.HTTP.post(server.url + PATH, content=data, headers=headers)

  assert post(pack(json.dumps(BODY).encode())).status_code == 200
  assert post(pack(b'{"prompt": "' + b"x" * 10**7)).status_code == 413  # 10 MB of 10 kB
  response = post(b"no such stream")
  assert response.status_code == 400
  assert "Content-Encoding" in response.json()["error"]["message"]


def test_refuses_another_content_encoding(server):
  headers = JSON | {"Content-Encoding": "br"}
  response = live.HTTP.post(server.url + PATH, content=b"x", headers=headers)
  assert response.status_code == 415
  assert response.json()["error"]["code"] == "unsupported_encoding"


def test_every_response_has_a_request_id(server):
  ids = set()
  for path in ("/health", "/v1/models", "/nothing", "/v1/models/nothing"):
    ids.add(live.HTTP.get(server.url + path).headers["x-request-id"])
  for body in (BODY, {}, BODY | {"stream": True}):
    ids.add(live.HTTP.post(server.url + PATH, json=body).headers["x-request-id"])
  assert len(ids) == 7
  headers = {"X-Request-ID": "mine-1"}
  response = live.HTTP.get(server.url + "/health", headers=headers)
  assert response.headers["x-request-id"] == "mine-1"
  response = live.HTTP.get(server.url + "/health", headers={"X-Request-ID": "a b"})
  assert response.headers["x-request-id"] != "a b"


def test_a_crash_has_a_request_id_and_tells_nothing(server, monkeypatch):
  def crash(*args):
    raise RuntimeError("secret")

  monkeypatch.setattr(server.service, "model", crash)
  response = live.HTTP.post(server.url + PATH, json=BODY)
  assert response.status_code == 500 and "secret" not in response.text
  assert response.headers["x-request-id"] in response.json()["error"]["message"]


def test_the_access_log_is_json(server, caplog):
  with caplog.at_level(logging.INFO, "llamagen.access"):
    headers = {"X-Request-ID": "logged"}
    live.HTTP.post(server.url + PATH, json=BODY | {"n": 2}, headers=headers)
    live.wait_until(lambda: caplog.messages)
  fields = json.loads(caplog.messages[0])
  assert fields.pop("seconds") > 0 and fields.pop("time").endswith("Z")
  assert fields == {
    "request_id": "logged", "client": "127.0.0.1", "method": "POST", "path": PATH,
    "status": 200, "model": "tiny", "images": 2, "stream": False,
  }  # fmt: skip


def test_a_page_of_another_origin(cors):
  preflight = {
    "Origin": ORIGIN, "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
  }  # fmt: skip
  response = live.HTTP.options(cors.url + PATH, headers=preflight)  # without the key
  assert response.status_code == 200
  assert response.headers["access-control-allow-origin"] == ORIGIN
  headers = {"Origin": ORIGIN, "Authorization": f"Bearer {live.KEY}"}
  response = live.HTTP.post(cors.url + PATH, json=BODY, headers=headers)
  assert response.status_code == 200
  assert response.headers["access-control-allow-origin"] == ORIGIN
  response = live.HTTP.post(cors.url + PATH, json=BODY, headers={"Origin": ORIGIN})
  assert response.status_code == 401  # which the page can read
  assert response.headers["access-control-allow-origin"] == ORIGIN
  stranger = preflight | {"Origin": "https://other.example"}
  response = live.HTTP.options(cors.url + PATH, headers=stranger)
  assert "access-control-allow-origin" not in response.headers


def url_of(server, **headers) -> str:
  headers = {f"X-Forwarded-{name}": value for name, value in headers.items()}
  response = live.HTTP.post(
    server.url + PATH, json=BODY | {"response_format": "url"}, headers=headers
  )
  return response.json()["data"][0]["url"].rpartition("/")[0]


def test_urls_behind_a_proxy(server):
  assert url_of(server) == f"{server.url}/images"
  url = url_of(server, Proto="https", Host="art.example", Prefix="/make/it/")
  assert url == "https://art.example/make/it/images"
  assert url_of(server, Host="a.example, b.example") == "http://a.example/images"
  bad = url_of(server, Host="a b", Proto="javascript", Prefix="//evil")
  assert bad == f"{server.url}/images"


@pytest.mark.parametrize("path", ["/v1/models", "/make/it/v1/models/"])
def test_a_proxy_may_leave_its_prefix_in_the_path(server, path):
  headers = {"X-Forwarded-Prefix": "/make/it"}
  assert live.HTTP.get(server.url + path, headers=headers).status_code == 200


def test_a_public_url(image_model):
  app = {"public_url": "https://art.example/make"}
  with live.serve(image_model, app=app) as server:
    assert url_of(server, Host="other") == "https://art.example/make/images"
    assert live.HTTP.get(server.url + "/v1/models").status_code == 200


def received(connection: socket.socket) -> bytes:
  """Returns all bytes until the server closes the connection."""
  data = b""
  try:
    while chunk := connection.recv(4096):
      data += chunk
  except ConnectionResetError:
    pass
  return data


@pytest.fixture(scope="module")
def hasty(image_model):
  timeouts = Timeouts(head=1.0, idle=1.0, connections=20, drain=30)
  app = {"body_seconds": 0.3}
  with live.serve(image_model, timeouts=timeouts, app=app) as server:
    yield server


@pytest.mark.parametrize(
  "sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nX: "]
)
def test_half_a_head_is_not_waited_for(hasty, sent):
  with socket.create_connection(("127.0.0.1", hasty.port), 120) as connection:
    connection.sendall(sent)
    assert received(connection) == b""
  live.wait_until(lambda: not hasty.server.server_state.connections)


def test_half_a_head_after_a_response_is_not_waited_for(hasty):
  with socket.create_connection(("127.0.0.1", hasty.port), 120) as connection:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
    assert received(connection).startswith(b"HTTP/1.1 200")


def test_an_idle_connection_is_closed(hasty):
  with socket.create_connection(("127.0.0.1", hasty.port), 120) as connection:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert received(connection).startswith(b"HTTP/1.1 200")


def test_half_a_body_is_not_waited_for(hasty):
  head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
  with socket.create_connection(("127.0.0.1", hasty.port), 120) as connection:
    connection.sendall(f'{head}Content-Length: 90\r\n\r\n{{"pro'.encode())
    answer = received(connection)  # and then it closes
  assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer


def test_no_more_connections_than_the_cap(hasty):
  open_ones = [
    socket.create_connection(("127.0.0.1", hasty.port), 120) for _ in range(20)
  ]
  with socket.create_connection(("127.0.0.1", hasty.port), 120) as connection:
    answer = received(connection)
  assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After" in answer
  assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
  for connection in open_ones:
    connection.close()
  live.wait_until(lambda: not hasty.server.server_state.connections)
  assert live.HTTP.get(hasty.url + "/health").status_code == 200


def test_the_drain_ends_whoever_stalls(image_model):
  timeouts = Timeouts(drain=0.5)
  with live.serve(image_model, timeouts=timeouts) as server:
    server.engine.last = 3  # its image never ends
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    stalled[0].sendall(f'{head}Content-Length: 90\r\n\r\n{{"pro'.encode())
    stalled[1].sendall(b"GET /hea")
    body = json.dumps(BODY)
    stalled[2].sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    live.wait_until(lambda: server.worker.busy_slots)
    server.server.should_exit = True
    live.wait_until(
      lambda: not server.worker.alive
    )  # not for the 300 s of its deadline
    for connection in stalled:
      connection.close()
