"""A client of a visdom server; starts the server on this machine if need be."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from .visdom_assets import missing_assets, static_dir

try:
    import requests  # visdom's client needs it too
    import visdom
except ImportError:
    visdom = None

TIMEOUT = (1.0, 3.0)  # seconds for connecting, and for an answer
START_SECONDS = 60.0  # after these, a started server that does not answer is given up


class ServerUnavailable(Exception):
    """The server does not answer, or not as visdom does: try again later."""


class Disabled(Exception):
    """The dashboard can't work; the text says why."""


class VisdomServer:
    """`client` talks to the server at `address`, with a time limit on each request.

    Raises Disabled if that can't work. If nothing listens at a loopback address, starts a server
    there: `process`, whose output is in the file `log`.
    """

    def __init__(self, server: str, port: int, env: str):
        self.process: subprocess.Popen | None = None
        self._started = 0.0
        self._answered = False  # whether visdom has ever answered here
        try:
            parts = urlsplit(server if "//" in server else f"http://{server}")
            host, port = parts.hostname, parts.port or port
        except ValueError:  # a port that is not a number
            parts = host = None
        if parts is None or parts.scheme not in ("http", "https") or not host:
            raise Disabled(f"{server!r} is no address of a server (http://HOST)")
        address = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}"
        base = parts.path.rstrip("/")
        self.address = f"{address}:{port}{base}"
        if visdom is None:
            raise Disabled("the package visdom is not installed (pip install visdom)")
        # `send=False`, or it would contact the server now, on the thread of the training loop.
        self.client = visdom.Visdom(
            address,
            port=port,
            base_url=base or "/",
            env=env,
            send=False,
            use_incoming_socket=False,
            raise_exceptions=True,
        )
        self.client.send = True
        self.client._handle_post = self._post  # meant to be replaced, says its docstring
        self._session = requests.Session()
        self._session.trust_env = False  # straight to the server, ignoring any proxies
        local = host in ("localhost", "::1") or host.startswith("127.")
        if local and not _listening(host, port):
            self._start_server(port, base)

    def connect(self) -> bool:
        """Make sure that visdom answers; returns whether this is its first answer.

        Raises ServerUnavailable, or Disabled if a server that was started here does not come up.
        """
        try:
            well = isinstance(self.client.get_env_list(), list)
        except ValueError:  # not JSON
            well = False
        except ServerUnavailable:
            self._check_start()
            raise
        if not well:
            raise ServerUnavailable("no sensible answer")
        first, self._answered = not self._answered, True
        return first

    def _post(self, url: str, data: str | None = None) -> str:
        """Send a request of the client; raises ServerUnavailable unless the status is 200."""
        try:
            answer = self._session.post(url, data=data, timeout=TIMEOUT)
        except requests.Timeout:
            raise ServerUnavailable("no answer in time") from None
        except requests.RequestException as e:
            raise ServerUnavailable(
                "no server" if "refused" in str(e) else type(e).__name__
            ) from None
        if answer.status_code != 200:
            raise ServerUnavailable(f"status {answer.status_code}")
        return answer.text

    def _start_server(self, port: int, base: str) -> None:
        """Start a server that outlives both training and Ctrl-C."""
        static = static_dir()
        missing = missing_assets(static) if static else ["all"]
        if missing:
            raise Disabled(
                f"the page would stay blue, {len(missing)} of its files are missing "
                f"({missing[0]}); run scripts/setup_visdom.sh"
            )
        # `main` is the entry point that never downloads. torch is blocked: it takes 400 MB, and
        # only the client would use it. Python puts the current folder first on its path, so that
        # entry is removed.
        code = (
            "import os, sys; os.chdir(os.sep); sys.path[:1] = []; sys.modules['torch'] = None; "
            "from visdom.server.run_server import main; main()"
        )
        options = ["-port", str(port), "-bind_local", "-eager_data_loading"]
        options += ["-base_url", base] if base else []
        handle, self.log = tempfile.mkstemp(prefix=f"visdom-{port}-", suffix=".log")
        with open(handle, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *options, "-logging_level", "WARNING"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started = time.monotonic()

    @property
    def starting(self) -> bool:
        """Whether a server started here has not answered yet."""
        return self.process is not None and not self._answered

    def _check_start(self) -> None:
        """Raise Disabled if a server that is starting here has ended or takes too long."""
        if not self.starting:
            return
        ended = self.process is not None and self.process.poll() is not None
        if ended or time.monotonic() - self._started > START_SECONDS:
            lines = Path(self.log).read_text(errors="replace").strip().splitlines()
            said = lines[-1] if lines else "it said nothing"
            fault = "did not start" if ended else "did not become ready"
            raise Disabled(f"its server {fault}: {said} (all of it: {self.log})")


def _listening(host: str, port: int) -> bool:
    """Whether something accepts connections, or there is no telling."""
    try:
        # the longer time: Windows needs two seconds to say that nobody listens
        socket.create_connection((host, port), TIMEOUT[1]).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True
