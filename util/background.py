"""Threads with a bounded queue."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any


class BackgroundWork:
    """Runs functions in threads; for decoding and encoding images, which release the GIL.

    At most three functions per thread are queued or running; `submit` blocks beyond that, so that
    memory stays bounded. Without threads, `submit` runs each function at once. If a function
    fails, its `failed` callback gets the error; without one, the next `submit` or `close` raises
    it. Leaving the `with` block waits for all functions; after an error, only for the running ones.
    """

    # Ctrl-C may come between acquiring and releasing a lock in Python code, such as those in
    # `concurrent.futures` and `threading.Semaphore`, and threads would then wait for ever.
    def __init__(self, threads: int):
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(3 * threads):
            self.places.put(None)
        self.error: BaseException | None = None
        self.ended: list[None] = []  # one for each thread
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            try:
                work()
            except BaseException as e:
                self.error = self.error or e
            finally:
                self.places.put(None)
        self.ended.append(None)
        self.wake.put(None)

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
                    raise
                failed(e)

        if self.threads:
            self.places.get()
            self.work.put(work)
        else:
            work()

    def call(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Queue `function(*args)`; returns a function that waits for its result or its error."""
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put((function(*args), None))
            except BaseException as e:
                answer.put((None, e))

        def result() -> Any:
            value, error = answer.get()
            if error is not None:
                raise error
            return value

        self.submit(work)
        return result

    def _raise(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for all functions."""
        self._join()
        self._raise()

    def _join(self) -> None:
        for _ in self.threads:
            self.work.put(None)
        # not by `Thread.join`: where a signal interrupts it, as Ctrl-C does, it takes the thread
        # for one that has ended (until Python 3.12)
        while len(self.ended) < len(self.threads):
            with contextlib.suppress(queue.Empty):
                self.wake.get(timeout=1)
        self.threads = []

    def __enter__(self) -> BackgroundWork:
        return self

    def abandon(self) -> None:
        """Wait for the running functions only, and raise none of their errors."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.work.get_nowait()
        self._join()

    def __exit__(self, kind: type | None, *rest: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # an error of the block, or Ctrl-C, is the one to raise
            self.abandon()


def map_in_threads(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int | None = None
) -> list[Any]:
    """`[function(x) for x in items]`, computed in threads: by default one for each core."""
    results: dict[int, Any] = {}

    def compute(i: int, x: Any) -> None:
        results[i] = function(x)

    with BackgroundWork(threads or os.cpu_count() or 1) as work:
        for i, x in enumerate(items):
            work.submit(compute, i, x)
    return [results[i] for i in range(len(results))]
