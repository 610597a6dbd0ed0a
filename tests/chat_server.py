"""A server that speaks the chat-completions API on this machine and misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = ("round", "flat", "striped", "smooth", "pale", "dark", "narrow", "wide", "curved", "spotted")


def good(count: int = 6) -> str:
    return json.dumps({"descriptions": [f"{WORDS[i % 10]} edge along part {i}" for i in range(count)]})


def of_class(request: dict) -> Reply:
    """A good answer that differs from class to class."""
    name = request["messages"][1]["content"][0]["text"].partition("class '")[2].partition("'")[0]
    digest = hashlib.sha256(name.encode()).hexdigest()
    count = int(request["messages"][1]["content"][0]["text"].partition("exactly ")[2].split()[0])
    return says(
        json.dumps({"descriptions": [f"{WORDS[i % 10]} {digest[i * 8 : i * 8 + 8]}" for i in range(count)]})
    )


def completion(content, *, finish="stop", refusal=None, usage=(1000, 100)) -> dict:
    """The body of an answer."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": counts,
    }


class Reply:
    """What to send: a status, a body (JSON unless bytes), headers; or an act upon the handler."""

    def __init__(self, status=200, body=None, headers=None, act: Callable | None = None) -> None:
        self.status, self.body, self.headers, self.act = status, body, headers or {}, act


def says(content, **options) -> Reply:
    return Reply(200, completion(content, **options))


def error(status, code=None, message="no", headers=None) -> Reply:
    return Reply(status, {"error": {"message": message, "type": code, "code": code}}, headers)


def reset() -> Reply:
    """Cut the connection with a TCP reset."""

    def act(handler):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return Reply(act=act)


def silence(released: threading.Event) -> Reply:
    """Say nothing until released."""
    return Reply(act=lambda handler: released.wait(20))


def drip(released: threading.Event) -> Reply:
    """Send one blank after the other, as far as the client lets us."""

    def act(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(1000):
            if released.wait(0.1):
                return
            handler.wfile.write(b" ")

    return Reply(act=act)


def half() -> Reply:
    """Promise more bytes than come."""

    def act(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True

    return Reply(act=act)


class ChatServer:
    """Answers requests with `script` in turn, its last entry for ever; keeps what was asked."""

    def __init__(self) -> None:
        self.script: list[Reply | Callable[[dict], Reply]] = [of_class]
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.released = threading.Event()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    reply = server.script[min(len(server.requests), len(server.script) - 1)]
                    server.requests.append(body)
                    server.headers.append(
                        {**{k.lower(): v for k, v in self.headers.items()}, ":path": self.path}
                    )
                reply = reply if isinstance(reply, Reply) else reply(body)
                if reply.act:
                    reply.act(self)
                    self.close_connection = True
                    return
                raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
                for key, value in {**headers, **reply.headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, address):
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def text(self, i: int) -> str:
        """What request i said to the model."""
        return self.requests[i]["messages"][1]["content"][0]["text"]

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
