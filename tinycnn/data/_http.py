"""HTTP requests that give up on a server that sends too little or too much."""

import io
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPResponse
from typing import Any
from urllib.request import HTTPHandler, HTTPSHandler, Request, build_opener


class Pace:
    """Limits what is received: at least `least` bytes in each `window` seconds, at most `most` bytes in all.

    clock: seconds, as of `time.monotonic`
    """

    def __init__(self, window: float, least: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.window, self.least, self.most, self.clock = window, least, most, clock
        self.start, self.count, self.total = clock(), 0, 0

    def add(self, count: int) -> None:
        """Note that `count` bytes came.  Raises OSError beyond the limits."""
        self.count, self.total = self.count + count, self.total + count
        if self.total > self.most:
            raise OSError(f"expected at most {self.most} bytes, got more")
        elapsed = self.clock() - self.start
        if elapsed >= self.window:
            if self.count < self.least:
                raise TimeoutError(f"too slow: {self.count} bytes in {elapsed:.0f} seconds")
            self.start, self.count = self.start + elapsed, 0


def open_url(url: str, timeout: float, pace: Pace) -> Any:
    """`urllib.request.urlopen` with limits on the whole response, from the first byte of its header.

    timeout: seconds, for the connection and for each read
    """
    opener = build_opener(_PacedHTTP(pace), _PacedHTTPS(pace))
    return opener.open(Request(url, headers={"User-Agent": "tinycnn"}), timeout=timeout)


class _PacedReader(io.RawIOBase):
    def __init__(self, raw: Any, pace: Pace) -> None:
        self.raw, self.pace = raw, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self.raw.readinto(buffer)
        self.pace.add(count or 0)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _PacedResponse(HTTPResponse):
    def __init__(self, pace: Pace, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = io.BufferedReader(_PacedReader(self.fp.detach(), pace))


class _Paced:
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> Any:
        def connection(*args: Any, **options: Any) -> Any:
            opened = http_class(*args, **options)
            opened.response_class = partial(_PacedResponse, self.pace)
            return opened

        parent: Any = super()
        return parent.do_open(connection, req, **http_conn_args)


class _PacedHTTP(_Paced, HTTPHandler):
    pass


class _PacedHTTPS(_Paced, HTTPSHandler):
    pass
