"""Uvicorn with limits on connections and on slow clients, and a bounded drain.

Written against uvicorn 0.54, whose h11 protocol has a timeout for idle connections but
none for the head of a request, and answers a connection too many only when it has
sent one.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import signal
import socket

from fastapi import FastAPI
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llamagen_jax.serving.api_error import APIError
from llamagen_jax.serving.service import Service


@dataclasses.dataclass(frozen=True)
class Timeouts:
  """Seconds that a client may take, and the most connections at a time."""

  head: float = 10.0  # from the first byte, or the connection, to the last header
  idle: float = 30.0  # between two requests
  drain: float = 300.0  # from SIGTERM to the end, whoever still waits
  connections: int = 512


def run(
  app: FastAPI, service: Service, listening: socket.socket, timeouts: Timeouts
) -> None:
  """Serves until SIGTERM or SIGINT, and then finishes what was accepted."""
  server = Server(app, timeouts)

  def stop(number, frame) -> None:
    service.draining = True
    server.force_exit = server.should_exit and number == signal.SIGINT
    server.should_exit = True

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  asyncio.run(server.serve(sockets=[listening]))


class Server(uvicorn.Server):
  """A server that leaves signals alone; uvicorn's own dies of them in the end."""

  def __init__(self, app: FastAPI, timeouts: Timeouts):
    config = uvicorn.Config(
      app, http=functools.partial(_LimitedProtocol, limits=timeouts),
      ws="none", log_level="warning", access_log=False,
      timeout_keep_alive=timeouts.idle, timeout_graceful_shutdown=timeouts.drain,
    )  # fmt: skip
    super().__init__(config)

  @contextlib.contextmanager
  def capture_signals(self):
    yield


class _LimitedProtocol(H11Protocol):
  """One connection."""

  def __init__(self, *args, limits: Timeouts, **kwargs):
    super().__init__(*args, **kwargs)
    self.limits, self._unsent = limits, -1
    self._head_timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    if len(self.connections) > self.limits.connections:
      transport.write(_refusal(self.limits.connections))
      transport.close()
    else:
      self._start_head_timer()

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_head_timer()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_head_timer()
    elif not self.timeout_keep_alive_task:  # the next head has begun
      self._start_head_timer()

  def timeout_keep_alive_handler(self) -> None:
    """Ends an idle connection, and one whose client has stopped reading."""
    unsent = self.transport.get_write_buffer_size()
    if unsent in (0, self._unsent):
      self.transport.abort()  # `close` would wait until all is read
      return
    self._unsent = unsent
    self.timeout_keep_alive_task = self.loop.call_later(
      self.timeout_keep_alive, self.timeout_keep_alive_handler
    )

  def _start_head_timer(self) -> None:
    if self._head_timer is None:
      seconds = self.limits.head
      self._head_timer = self.loop.call_later(seconds, self.transport.abort)

  def _stop_head_timer(self) -> None:
    if self._head_timer is not None:
      self._head_timer.cancel()
      self._head_timer = None


def _refusal(connections: int) -> bytes:
  """Returns the whole response to a connection too many."""
  message = f"The server has its {connections} connections; try again."
  body = json.dumps(APIError(503, message, code="too_many_connections").body())
  head = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(body)}\r\nRetry-After: 2\r\nConnection: close\r\n\r\n"
  )
  return (head + body).encode()
