"""A real HTTP server for tests: serves well, with Range and validators, or as badly as it is told to."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from oppu.download import FILES, PLACES


def lamp_site(*tasks: str, items: int = 6000) -> dict[str, bytes]:
    """Files of LaMP's shape, about 400 KB, by their path on the site."""
    return {
        f"/{PLACES[task]}/{name.split('_')[0]}/{name}": json.dumps(
            [{"id": str(n), "text": f"text {n} of {name}"} for n in range(items)], indent=1
        ).encode()
        for task in tasks
        for name in FILES
    }


class Site:
    """Files by path, on a free port of this machine, for as long as the block lasts.

    `asked` lists each request's path and Range; `sent` counts the bytes of bodies. What `cut`, `fail`, `stall` and
    `then` plan for a path happens once, in that order, one per request.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str | None]] = []
        self.sent: Counter[str] = Counter()
        self.how: dict[str, Any] = {}
        self.plans: dict[str, list[tuple[str, Any]]] = defaultdict(list)
        self.end = threading.Event()

    def set(self, **how: Any) -> None:
        """etag: False, "weak" or its text; modified, range, if_range: False; range: 416; chunked, encoding, length."""
        self.how = how

    def cut(self, path: str, *sizes: int) -> None:
        self.plans[path] += [("cut", size) for size in sizes]

    def fail(self, path: str, *statuses: int) -> None:
        self.plans[path] += [("fail", status) for status in statuses]

    def stall(self, path: str, size: int) -> None:
        self.plans[path].append(("stall", size))

    def then(self, path: str, action: Callable[[], None]) -> None:
        self.plans[path].append(("then", action))

    def ranges(self, path: str) -> list[str | None]:
        return [range_ for url, range_ in self.asked if url == path]

    def __enter__(self) -> Self:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        site, path = self.site, self.path
        site.asked.append((path, self.headers["Range"]))
        plan, value = site.plans[path].pop(0) if site.plans[path] else ("serve", None)
        if plan == "then":
            value()
        if plan == "fail" or path not in site.files:
            return self.answer(value or 404, {"Content-Length": "0"})
        body, how = site.files[path], site.how
        status, headers, start = self.part(body, how)
        rest = b"" if status == 416 else body[start:]
        if how.get("chunked"):
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(rest) + how.get("length", 0))
        if "encoding" in how or "gzip" in self.headers["Accept-Encoding"]:
            headers["Content-Encoding"] = how.get("encoding", "gzip")
        self.answer(status, headers)
        self.send(rest[:value] if plan in ("cut", "stall") else rest, bool(how.get("chunked")), plan == "serve")
        if plan == "stall":
            site.end.wait(120)
        if plan in ("cut", "stall") or how.get("length"):
            self.close_connection = True

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def part(self, body: bytes, how: dict[str, Any]) -> tuple[int, dict[str, str], int]:
        """Status, headers and first byte of an answer, as RFC 9110 has it, unless told otherwise."""
        tag = {None: '"v1"', "weak": 'W/"v1"'}.get(how.get("etag"), f'"{how.get("etag")}"')
        headers = {} if how.get("etag") is False else {"ETag": tag}
        if how.get("modified", True):
            headers["Last-Modified"] = "Mon, 01 Jan 2024 00:00:00 GMT"
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        same = self.headers["If-Range"] in (None, *headers.values()) or not how.get("if_range", True)
        if asked is None or not same or how.get("range") is False:
            return 200, headers, 0
        start = int(asked[1])
        if start >= len(body) or how.get("range") == 416:
            return 416, {"Content-Range": f"bytes */{len(body)}"}, 0
        return 206, headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, start

    def send(self, data: bytes, chunked: bool, end: bool) -> None:
        self.site.sent[self.path] += len(data)
        if chunked:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if end else b""))
        else:
            self.wfile.write(data)
        self.wfile.flush()
