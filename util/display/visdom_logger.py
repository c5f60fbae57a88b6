"""Live loss curves and pictures on visdom's web page.

Only the thread of the logger talks to the server, in plain HTTP: visdom's own client has no time
limits, prints tracebacks and opens a websocket. The logger keeps all curves and the newest pictures,
so a server that was away, stuck or restarted gets everything again.
"""

from __future__ import annotations

import base64
import html
import http.client
import importlib.util
import io
import ipaddress
import json
import math
import os
import re
import sys
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from PIL import Image

from .background import BackgroundLogger, Pictures
from .loss_record import thin
from .visdom_assets import missing_assets, static_dir

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 3.0
CHECK_SECONDS = 2.0  # how often the server is asked whether the windows are still there
UPDATE_SECONDS = 0.5  # the page is renewed at most this often
LONGEST_PAUSE = 10.0  # between two tries of a server that is away
START_SECONDS = 60.0  # a server that was started and still does not answer is given up
MAX_POINTS = 1000  # of a curve
LEAST_SIZE = 128  # of pictures on the page: those of small crops are enlarged
SCORE_ROWS = 20  # validations in the table
OUTAGES_TOLD = 5  # a server that comes and goes must not fill the console

# Okabe and Ito's colours, which colour-blind people can tell apart; black comes last.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#000000")

Window = tuple[str, bytes]  # id and the JSON that draws it


class _Unwell(Exception):
    """The server answered, but not as visdom in good health does."""


class _TurnOff(Exception):
    """Nothing more can come of this; the text says why."""


class _Connection:
    """One kept-alive connection to the server, with a time limit on every step.

    It goes straight to the server, whatever proxies the environment names.
    """

    def __init__(self, server: str, port: int):
        parts = urlsplit(server if "//" in server else f"http://{server}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _TurnOff(f"{server!r} is no address of a server (http://HOST)")
        self.host = parts.hostname
        self.port = parts.port or port
        self.base = parts.path.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"{parts.scheme}://{host}:{self.port}{self.base}"
        kind = http.client.HTTPSConnection if parts.scheme == "https" else None
        self._connection = (kind or http.client.HTTPConnection)(self.host, self.port)

    @property
    def local(self) -> bool:
        """Whether the server would be on this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def open(self) -> bool:
        return self._connection.sock is not None

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
        """Status and text of the answer.

        Raises:
            OSError, http.client.HTTPException: no server, no answer in time, or not HTTP.
        """
        connection = self._connection
        try:
            if connection.sock is None:
                connection.timeout = CONNECT_SECONDS
                connection.connect()
                if connection.sock is not None:
                    connection.sock.settimeout(ANSWER_SECONDS)
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, f"{self.base}/{path}", body, headers)
            response = connection.getresponse()
            text = response.read(1 << 20).decode("utf-8", "replace")
            if not response.isclosed():
                connection.close()  # more than visdom ever says; the rest is left unread
            return response.status, text
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._connection.close()


class _Spawned:
    """A process in a session of its own: neither the end of training nor Ctrl-C ends it.

    Not `subprocess.Popen`: that waits for a pipe to close, and a process for loading data that is
    forked in this moment holds the pipe open for as long as it lives.
    """

    def __init__(self, command: list[str], output: int):
        self.returncode: int | None = None
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ]
        self.pid = os.posix_spawn(
            command[0], command, os.environ, file_actions=actions, setsid=True
        )

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                self.returncode = -1
            else:
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class VisdomLogger(BackgroundLogger):
    """Shows losses and pictures on a visdom server, and starts one on this machine if need be.

    Args:
        server: address without the port; only on a loopback address a server is ever started.
        port: where it listens.
        env: visdom's environment, one page of windows.
        display_id: told apart from other runs of this name in the same environment.
        ncols: pictures in a row of the grid; 0 gives each picture a window of its own.
        title: name of the experiment.
        history: records of the run so far, when it is resumed.
        scores: its validations so far.
        winsize: longest side of a picture on the page, in pixels.
    """

    name = "visdom"

    def __init__(
        self,
        server: str = "http://localhost",
        port: int = 8097,
        env: str = "main",
        display_id: int = 1,
        ncols: int = 4,
        title: str = "training",
        history: Iterable[dict[str, Any]] = (),
        scores: Iterable[dict[str, Any]] = (),
        winsize: int = 256,
    ):
        super().__init__()
        self.env = env
        self.ncols = ncols
        self.title = title
        self.winsize = winsize
        # The server uses ids in addresses and the page in selectors.
        self._prefix = re.sub(r"[^A-Za-z0-9_-]", "_", f"{title}-{display_id}")
        self._curves: dict[str, tuple[array[float], array[float]]] = {}
        self._newest: Pictures | None = None
        self._stale: set[str] = set()  # of "losses" and "pictures": what the server lacks
        self._check = ""  # id of a window that the server has taken
        self._process: _Spawned | None = None
        self._log: Path | None = None
        self._started = 0.0
        self._connected = False
        self._failures = 0  # since the server last took something
        self._outages = 0  # told to the user
        self._told = False  # that the server is away now
        self._greeted = False  # whether visdom has ever answered here
        self._scores: deque[dict[str, Any]] = deque(maxlen=SCORE_ROWS)
        self._records.extend(history)
        self._records.extend({**record, "losses": {}} for record in scores)
        try:
            self._server = _Connection(server, port)
        except (_TurnOff, ValueError) as e:  # ValueError: a port that is no number
            self._turn_off(str(e))
            return
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        page = "" if self.env == "main" else f"/env/{quote(self.env.replace('/', '_'))}"
        return f"{self._server.url}{page}"

    # What the thread does.

    def _run(self) -> None:
        sent_at, cost = 0.0, 0.0
        while True:
            last = self._stop.is_set()
            self._take_news()
            pause = 0.0
            try:
                if not self._connected:
                    self._connect()
                began = time.monotonic()
                if self._stale:
                    self._send()
                    sent_at = time.monotonic()
                    cost = sent_at - began
                elif self._check and not self._there(self._check):
                    self._everything_is_stale()
                    continue
            except (OSError, http.client.HTTPException, _Unwell) as e:
                pause = self._lost(e)
            except _TurnOff as e:
                self._turn_off(str(e))
                return
            if last and not (self._starting if pause else self._stale):
                self._server.close()
                return
            if pause:
                # While closing, a server that is just coming up is still worth a short wait.
                time.sleep(pause) if last else self._stop.wait(pause)
                continue
            if not self._stale:
                self._wake.wait(CHECK_SECONDS)
                self._wake.clear()
            # Many points at once make one update; a slow server is kept busy a tenth of the time.
            rest = min(max(UPDATE_SECONDS, 10 * cost), LONGEST_PAUSE)
            self._stop.wait(max(0.0, sent_at + rest - time.monotonic()))

    def _take_news(self) -> None:
        while self._records:
            record = self._records.popleft()
            for name, value in record["losses"].items():
                xs, ys = self._curves.setdefault(str(name), (array("d"), array("d")))
                xs.append(record["progress"])
                ys.append(math.nan if value is None else value)
            if record["losses"]:
                self._stale.add("losses")
            if record.get("scores"):
                self._scores.append(record)
                self._stale.add("scores")
        if self._pictures:
            self._newest = self._pictures.pop()
            self._stale.add("pictures")

    def _everything_is_stale(self) -> None:
        self._check = ""
        if self._curves:
            self._stale.add("losses")
        if self._scores:
            self._stale.add("scores")
        if self._newest:
            self._stale.add("pictures")

    @property
    def _starting(self) -> bool:
        """Whether a server started here has not answered yet."""
        return self._process is not None and not self._greeted and self._process.poll() is None

    def _post(self, path: str, body: bytes) -> tuple[int, str]:
        kept = self._server.open
        try:
            return self._server.request("POST", path, body)
        except (OSError, http.client.HTTPException) as e:
            if not kept or isinstance(e, TimeoutError):
                raise
        # A kept connection broke: the server has most likely been restarted, with nothing in it.
        self._everything_is_stale()
        return self._server.request("POST", path, body)

    def _there(self, window: str) -> bool:
        body = json.dumps({"win": window, "eid": self.env}).encode()
        status, text = self._post("win_exists", body)
        if status != 200 or text not in ("true", "false"):
            raise _Unwell(f"status {status}")
        return text == "true"

    def _send(self) -> None:
        for part, windows in (
            ("losses", self._loss_windows),
            ("scores", self._score_windows),
            ("pictures", self._picture_windows),
        ):
            if part not in self._stale:
                continue
            for window, body in windows():
                status, text = self._post("events", body)
                if status != 200 or text != window:
                    raise _Unwell(f"status {status}")
                self._check = self._check or window
            self._stale.discard(part)
        self._failures = 0
        if self._told:
            self._told = False
            self._say(f"the server at {self._server.url} is back")

    # The server.

    def _connect(self) -> None:
        """Make sure that visdom answers; start it where nothing does, the first time."""
        try:
            status, text = self._server.request("POST", "env_state", b"{}")
        except ConnectionRefusedError:
            # A server that was there and went away has been ended by somebody: only wait for it.
            if self._server.local and not self._greeted:
                if self._process is None:
                    self._start_server()
                elif self._process.poll() is not None:
                    raise _TurnOff(f"its server did not start: {self._last_words()}") from None
                elif time.monotonic() - self._started > START_SECONDS:
                    raise _TurnOff(f"its server does not come up (see {self._log})") from None
            raise
        except http.client.BadStatusLine as e:
            if self._greeted or isinstance(e, http.client.RemoteDisconnected):
                raise
            raise self._stranger() from None
        if not self._greeted:
            self._recognize(status, text)
            self._greeted = True
            self._say(f"watch this run at {self.url}")
        elif status != 200:
            raise _Unwell(f"status {status}")
        self._connected = True
        self._everything_is_stale()

    def _recognize(self, status: int, text: str) -> None:
        """Raise unless the answer to `env_state` is visdom's."""
        if status in (500, 502, 503, 504):
            raise _Unwell(f"status {status}")
        try:
            environments = json.loads(text)
        except ValueError:
            environments = None
        if status == 200 and isinstance(environments, list):
            return
        if status == 400 and "visdom" in self._server.request("GET", "")[1].lower():
            raise _TurnOff(f"the server at {self._server.url} wants a login, which can't be given")
        raise self._stranger()

    def _stranger(self) -> _TurnOff:
        return _TurnOff(
            f"what answers at {self._server.url} is not visdom, choose another --display_port"
        )

    def _start_server(self) -> None:
        static = static_dir()
        if static is None or importlib.util.find_spec("tornado") is None:
            raise _TurnOff(
                f"no server answers at {self._server.url} and the package visdom is not installed"
            )
        if not hasattr(os, "posix_spawn"):  # Windows
            raise _TurnOff("start a server first: python -m visdom.server")
        missing = missing_assets(static)
        if missing:
            raise _TurnOff(
                f"the page would stay blue, {len(missing)} of its files are missing "
                f"({missing[0]}); run scripts/setup_visdom.sh"
            )
        # `main` is the entry that never downloads. The client's half of the package would import
        # torch, 400 MB for nothing; it is content without. Log level: no line for each request.
        # The folder that Python starts in leads its path, so it goes.
        code = (
            "import os, sys; os.chdir(os.sep); sys.path[:1] = []; sys.modules['torch'] = None; "
            "from visdom.server.run_server import main; main()"
        )
        options = ["-port", str(self._server.port), "-bind_local", "-eager_data_loading"]
        if self._server.base:
            options += ["-base_url", self._server.base]
        self._log, output = _open_log(self._server.port)
        with output:
            command = [sys.executable, "-c", code, *options, "-logging_level", "WARNING"]
            self._process = _Spawned(command, output.fileno())
        self._started = time.monotonic()

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines() if self._log else []
        except OSError:
            lines = []
        return f"{lines[-1] if lines else 'it said nothing'} (all of it: {self._log})"

    def _lost(self, error: Exception) -> float:
        """Note that the server failed; returns the seconds to wait before the next try."""
        self._connected = False
        self._server.close()
        if self._starting:
            return 0.2
        self._failures += 1
        late = isinstance(error, TimeoutError)
        # One refusal may be a restart, over in a second.
        if (late or self._failures > 1) and not self._told and self._outages < OUTAGES_TOLD:
            self._told = True
            self._outages += 1
            why = "no answer in time" if late else str(error)
            self._say(
                f"the server at {self._server.url} is away or not well ({why or repr(error)}); "
                "training goes on, and everything is sent when it is back"
            )
        return min(LONGEST_PAUSE, 0.25 * 2 ** min(self._failures, 10))

    # The windows.

    def _window(self, name: str, title: str, rest: dict[str, Any], **opts: Any) -> Window:
        window = f"{self._prefix}-{name}"
        message = {"win": window, "eid": self.env, "opts": {"title": title, **opts}, **rest}
        return window, json.dumps(message, allow_nan=False).encode()

    def _loss_windows(self) -> Iterator[Window]:
        # Each curve becomes JSON by itself: the encoder holds the interpreter's lock, and the
        # training loop would wait for one long piece.
        traces: list[bytes] = []
        drawn: list[list[float]] = []
        for i, (name, (xs, ys)) in enumerate(self._curves.items()):
            x, y = thin(xs, MAX_POINTS), thin(ys, MAX_POINTS)
            colour = COLOURS[i % len(COLOURS)]
            trace = {
                "type": "scatter",
                "name": html.escape(name),  # the page takes names for HTML
                "mode": "lines+markers" if len(x) <= 2 else "lines",
                "line": {"color": colour, "width": 1.5},
                # The page's button for smoothing fails on a curve without it.
                "marker": {"size": 5, "line": {"color": colour, "width": 0}},
                "x": [round(v, 5) for v in x],
                "y": [float(f"{v:.6g}") if math.isfinite(v) else None for v in y],
            }
            traces.append(json.dumps(trace, allow_nan=False).encode())
            drawn.append([v for v in y if math.isfinite(v)])
        y_axis: dict[str, Any] = {"title": "loss"}
        if (most := without_spikes(drawn)) is not None:
            y_axis = {"title": "loss (double click: with spikes)", "range": most}
        layout = {
            "xaxis": {"title": "epoch"},
            "yaxis": y_axis,
            "margin": {"l": 55, "r": 15, "t": 15, "b": 45},
            "showlegend": True,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        }
        title = f"{self.title}: loss over time"
        window, body = self._window("losses", title, {"layout": layout}, width=640, height=420)
        yield window, body[:-1] + b', "data": [' + b", ".join(traces) + b"]}"

    def _score_windows(self) -> Iterator[Window]:
        """The newest validations as a table, newest first; the best one's epoch is bold."""
        names = list(dict.fromkeys(name for record in self._scores for name in record["scores"]))
        best = self._scores[-1].get("best", {}).get("epoch")
        cell = '<td style="padding: 2px 8px; text-align: right">'
        rows = ["".join(f"{cell}{html.escape(name)}</td>" for name in ["epoch", *names])]
        for record in reversed(self._scores):
            values = [record["scores"].get(name) for name in names]
            texts = ["" if v is None else f"{v:.4g}" for v in values]
            epoch = record["epoch"]
            first = f"<b>{epoch}</b>" if epoch == best else f"{epoch}"
            rows.append("".join(f"{cell}{text}</td>" for text in [first, *texts]))
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        data = {"data": [{"type": "text", "content": f"<table>{table}</table>"}]}
        size = {"width": 90 + 90 * len(names), "height": 80 + 24 * len(rows)}
        phase = self._scores[-1].get("phase", "val")
        yield self._window("scores", f"{self.title}: scores on {phase}", data, **size)

    def _picture_windows(self) -> Iterator[Window]:
        if self._newest is None:
            return
        pictures, step = self._newest
        at = f"epoch {step['epoch']}, image {step['iters']}" if "epoch" in step else ""
        shown = [(label, *self._encode(array)) for label, array in pictures.items()]
        if self.ncols <= 0:
            for i, (label, source, width, height) in enumerate(shown):
                data = {"data": [{"type": "image", "content": {"src": source}}]}
                size = {"width": width + 20, "height": height + 36}
                yield self._window(f"picture-{i}", label, data, **size)
            return
        least = min(LEAST_SIZE, self.winsize)
        shown = [(label, source, *enlarged(w, h, least)) for label, source, w, h in shown]
        rows = [shown[i : i + self.ncols] for i in range(0, len(shown), self.ncols)]
        table = "".join(
            "<tr>"
            + "".join(
                f'<td style="padding: 2px 4px; text-align: center; vertical-align: bottom; '
                f'color: #333">'
                f'<img src="{source}" width="{width}" height="{height}" '
                f'style="image-rendering: pixelated" alt="{html.escape(label)}">'
                f"<br>{html.escape(label)}</td>"
                for label, source, width, height in row
            )
            + "</tr>"
            for row in rows
        )
        data = {"data": [{"type": "text", "content": f"<table>{table}</table>"}]}
        size = {
            "width": max(sum(width + 8 for _, _, width, _ in row) for row in rows) + 24,
            "height": sum(max(height for *_, height in row) + 28 for row in rows) + 40,
        }
        yield self._window("pictures", f"{self.title}: {at}" if at else self.title, data, **size)

    def _encode(self, picture: np.ndarray) -> tuple[str, int, int]:
        """A picture as a data URL, shrunk to what the page shows, and its width and height."""
        image = Image.fromarray(np.ascontiguousarray(picture))
        image.thumbnail((self.winsize, self.winsize), Image.Resampling.BOX, reducing_gap=None)
        file = io.BytesIO()
        # PNG, so that what looks like an artefact is one of the network; level 1 for speed.
        image.save(file, "PNG", compress_level=1)
        code = base64.b64encode(file.getvalue()).decode()
        return f"data:image/png;base64,{code}", image.width, image.height


def enlarged(width: int, height: int, least: int) -> tuple[int, int]:
    """A size times the smallest whole number that makes the longer side at least nearly `least`."""
    times = max(1, least // max(width, height))
    return width * times, height * times


def without_spikes(curves: list[list[float]]) -> list[float] | None:
    """The range of values that shows the curves where a few points are far above all others.

    Losses start high, and one such point would make flat lines of the rest. None where the usual
    range does.
    """
    curves = [values for values in curves if len(values) >= 20]
    if not curves:
        return None
    low, top = min(map(min, curves)), max(map(max, curves))
    high = max(sorted(values)[int(0.97 * (len(values) - 1))] for values in curves)
    span = high - low
    return None if top - low <= 3 * span or span <= 0 else [low - 0.05 * span, high + 0.2 * span]


def _open_log(port: int) -> tuple[Path, io.BufferedWriter]:
    """Where the server's output goes: the user's cache folder, else a new temporary file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = cache.expanduser().absolute() / "image-translation"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"visdom-{port}.log"
        return path, open(path, "wb")
    except (OSError, RuntimeError):
        handle, name = tempfile.mkstemp(prefix=f"visdom-{port}-", suffix=".log")
        return Path(name), open(handle, "wb")
