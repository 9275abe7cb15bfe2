"""A local HTTP server that scores responses as a test tells it to."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# The body of a call -> (status, answer): a value, which becomes JSON, or bytes as they are.
Answer = Callable[[dict], tuple[int, Any]]


class Server:
    """A server on a free port of this machine, and the calls that it got."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.calls: list[dict] = []
        self.delay = 0.0  # seconds before an answer
        self.headers: dict[str, str] = {}  # of an answer
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                call = json.loads(body)
                server.calls.append(call)
                time.sleep(server.delay)
                status, value = server.answer(call)
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                with contextlib.suppress(OSError):  # the caller may not wait any more
                    self.send_response(status)
                    for name, text in server.headers.items():
                        self.send_header(name, text)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"


def lengths(call: dict) -> tuple[int, Any]:
    """Answer with a tenth of each response's length in characters."""
    return 200, {"scores": [len(response) / 10 for response in call["responses"]]}


@contextlib.contextmanager
def serving(answer: Answer = lengths) -> Iterator[Server]:
    """Run a server within the context."""
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()
