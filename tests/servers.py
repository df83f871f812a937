"""A web server for tests, on this machine, with one file."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves the same bytes under every address.

    Args:
        data (bytes): What it serves.

    Attributes:
        ranges (bool): Whether it can send a part of the file.
        if_range (bool): Whether it minds If-Range.
        breaks_after (int | None): Bytes of a body after which it hangs up.
        delay (float): Seconds between pieces of 64 kB.
        status (int): Of every answer, if it is an error.
        requests (list[dict]): Headers of the requests so far.
        sent (list[int]): Bytes of the bodies it set out to send.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ranges = self.if_range = True
        self.breaks_after: int | None = None
        self.delay = 0.0
        self.status = 200
        self.requests: list[dict[str, str]] = []
        self.sent: list[int] = []

    def __enter__(self) -> FileServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802
                outer._answer(self)

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(dict(handler.headers))
        if self.status >= 400:
            handler.send_error(self.status)
            return
        data, start = self.data, 0
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        found = re.fullmatch(r'bytes=(\d+)-', handler.headers.get('Range', ''))
        same = handler.headers.get('If-Range', etag) == etag
        partial = found and self.ranges and (same or not self.if_range)
        if partial:
            start = int(found[1])
            if start >= len(data):
                self.sent.append(0)
                handler.send_error(416)
                return
        body = data[start:]
        self.sent.append(len(body))
        handler.send_response(206 if partial else 200)
        handler.send_header('Content-Length', str(len(body)))
        handler.send_header('ETag', etag)
        if partial:
            end = f'{start}-{len(data) - 1}/{len(data)}'
            handler.send_header('Content-Range', f'bytes {end}')
        handler.end_headers()
        if self.breaks_after is not None:
            body = body[: self.breaks_after]
        try:
            for first in range(0, len(body), 1 << 16):
                handler.wfile.write(body[first : first + (1 << 16)])
                time.sleep(self.delay)
        except OSError:
            pass  # the other side hung up
