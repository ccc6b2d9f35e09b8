"""A web server on this machine that misbehaves as told."""

import contextlib
import http.server
import threading
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path. A path's `behaviours` are used up first, one per request:

    "serve"; a number, an error of that code; "to <address>", a redirect; "cut", half of it; "no length", all of it
    without a Content-Length; "cut, no length"; "ignore range"; "wrong range", another part than the one asked for;
    "stall", half of it and then silence.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.behaviours: dict[str, list[object]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: clients that hang up are the point."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        self.server.requests.append((path, wanted))
        behaviours = self.server.behaviours.get(path)
        behaviour = behaviours.pop(0) if behaviours else "serve"
        body = self.server.files.get(path)
        if isinstance(behaviour, int) or (body is None and not str(behaviour).startswith("to ")):
            self.send_error(behaviour if isinstance(behaviour, int) else 404)
            return
        if behaviour.startswith("to "):
            self.send_response(302)
            self.send_header("Location", behaviour[3:])
            self.end_headers()
            return
        start = (
            int(wanted.removeprefix("bytes=").removesuffix("-"))
            if wanted and behaviour != "ignore range"
            else 0
        )
        if behaviour == "wrong range":
            start //= 2
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if "no length" not in behaviour:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(
            body[start : len(body) // 2] if behaviour.startswith(("cut", "stall")) else body[start:]
        )
        if behaviour == "stall":
            self.wfile.flush()
            self.server.closing.wait(20)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.closing.set()
        running.shutdown()
