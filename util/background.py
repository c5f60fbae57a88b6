"""A thread pool with a bounded queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundWork:
    """Runs functions in threads; for encoding pictures, which releases the GIL.

    At most three functions a thread are queued or running; `submit` blocks beyond that, so that
    memory stays bounded. Without threads it runs them at once. The next `submit` or `close` raises
    an error of a function, unless `failed` is given, which is called with the error. The end of
    the `with` block waits for all functions.
    """

    def __init__(self, threads: int):
        self.pool = ThreadPoolExecutor(threads, "encode") if threads > 0 else None
        self.places = threading.Semaphore(3 * max(1, threads))
        self.error: BaseException | None = None

    def submit(
        self,
        function: Callable[..., Any],
        *args: Any,
        failed: Callable[[Exception], Any] | None = None,
    ) -> None:
        """Queue `function(*args)`."""
        self._raise()

        def work() -> None:
            try:
                function(*args)
            except Exception as e:
                if failed is None:
                    self.error = self.error or e
                else:
                    failed(e)

        if self.pool is None:
            work()
            self._raise()
            return
        self.places.acquire()
        future: Future = self.pool.submit(work)
        future.add_done_callback(lambda _: self.places.release())

    def _raise(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for all functions."""
        if self.pool is not None:
            self.pool.shutdown()
        self._raise()

    def __enter__(self) -> BackgroundWork:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
