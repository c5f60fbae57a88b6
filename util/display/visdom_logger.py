"""Live loss curves, scores and images on visdom's web page.

Only the logger's thread talks to the server, with a time limit on each request. It keeps all curves
and the newest images, and sends them again when a server that was down or stuck is back.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
import time
import zlib
from array import array
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from .base import BackgroundLogger
from .loss_plot import COLOURS, range_without_spikes
from .loss_record import thin
from .visdom_server import Disabled, ServerUnavailable, VisdomServer

CHECK_SECONDS = 2.0  # how often the server is asked whether the windows are still there
UPDATE_SECONDS = 0.5  # minimum time between two updates of the page
LONGEST_PAUSE = 10.0  # seconds between two attempts to reach a server that is down
MAX_POINTS = 1000  # of a curve
LEAST_SIZE = 128  # pixels: smaller images are enlarged on the page by whole factors up to this
SCORE_ROWS = 20  # validations in the table
OUTAGES_REPORTED = 5  # a server that comes and goes must not fill the console

Curve = tuple[Any, Any]  # epochs and values, of the same length


class VisdomLogger(BackgroundLogger):
    """Shows losses and images on a visdom server, and starts one on this machine if need be.

    Args:
        server: address without the port; a server is only ever started on a loopback address.
        port: where it listens.
        env: visdom's environment, one page of windows.
        display_id: distinguishes runs of this name in the same environment.
        ncols: images in a row of the grid; 0 gives each image a window of its own.
        title: name of the experiment.
        history: records of the run so far, when it is resumed.
        scores: its validations so far.
        winsize: longest side of an image on the page, in pixels.
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
        self.env, self.ncols, self.title, self.winsize = env, ncols, title, winsize
        # The server uses the ids in addresses, and the page uses them in selectors.
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", title)
        # without this, names in other alphabets would collide
        told_apart = "" if title.isascii() else f"-{zlib.crc32(os.fsencode(title)):08x}"
        self._prefix = f"{plain}{told_apart}-{display_id}"
        self._curves: dict[str, Curve] = {}
        self._score_curves: dict[str, Curve] = {}
        self._scores: list[dict[str, Any]] = []
        self._newest: tuple[dict[str, np.ndarray], dict[str, Any]] = ({}, {})
        self._stale: set[str] = set()  # of "losses", "scores", "pictures": what the server lacks
        self._shown: set[str] = set()  # ids of windows that the server has taken
        self._connected = False
        self._cleared = False  # whether windows that this run does not have are closed
        self._failures = 0  # since the server last took something
        self._outages = 0  # reported to the user
        self._reported = False  # that the server is down now
        self._records.extend(history)
        self._records.extend({**record, "losses": {}} for record in scores)
        try:
            self._server = VisdomServer(server, port, env)
        except Disabled as e:
            self._turn_off(str(e))
            return
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        page = "" if self.env == "main" else f"/env/{quote(self.env.replace('/', '_'))}"
        return f"{self._server.address}{page}"

    # What the thread does.

    def _run(self) -> None:
        checked_at = 0.0
        while True:
            last = self._stop.is_set()
            self._take_news()
            began = time.monotonic()
            rest, lost = 0.0, False
            try:
                if not self._connected:
                    self._connect()
                elif began - checked_at > CHECK_SECONDS:
                    checked_at = began
                    if not all(self._server.client.win_exists(window) for window in self._shown):
                        self._everything_is_stale()  # a new server, or wiped by hand
                if self._stale:
                    self._send()
                    # New points are collected into one update; a slow server is kept busy about
                    # a tenth of the time.
                    cost = time.monotonic() - began
                    rest = min(max(UPDATE_SECONDS, 10 * cost), LONGEST_PAUSE)
            except ServerUnavailable as e:
                rest, lost = self._lost(str(e)), True
            except Disabled as e:
                self._turn_off(str(e))
                return
            if last and not (lost and self._server.starting):
                return
            # While closing, a server that is just coming up is still worth a short wait.
            time.sleep(rest) if last else self._stop.wait(rest)
            if not lost:
                self._wake.wait(CHECK_SECONDS)
                self._wake.clear()

    def _take_news(self) -> None:
        while self._records:
            record = self._records.popleft()
            _extend(self._curves, record["progress"], record["losses"])
            self._stale |= {"losses"} if record["losses"] else set()
            if record.get("scores"):
                _extend(self._score_curves, record["progress"], record["scores"])
                self._scores.append(record)
                self._stale.add("scores")
        if self._pictures:
            self._newest = self._pictures.pop()
            self._stale.add("pictures")

    def _everything_is_stale(self) -> None:
        self._shown.clear()
        parts = {"losses": self._curves, "scores": self._scores, "pictures": self._newest[0]}
        self._stale |= {part for part, content in parts.items() if content}

    def _connect(self) -> None:
        """Make sure that visdom answers, and mark everything as still to be sent."""
        if self._server.connect():
            self._say(f"watch this run at {self.url}")
        self._connected = True
        self._everything_is_stale()

    def _lost(self, why: str) -> float:
        """Note that the server failed; returns the seconds to wait before the next try."""
        self._connected = False
        if self._server.starting:
            return 0.2
        self._failures += 1
        # One refusal may be a restart, over in a second.
        worth_it = self._failures > 1 or why == "no answer in time"
        if worth_it and not self._reported and self._outages < OUTAGES_REPORTED:
            self._reported = True
            self._outages += 1
            self._say(
                f"the server at {self._server.address} does not respond ({why}); training "
                "continues, and everything is sent again when it is back; if something else "
                "listens there, choose another --display_port"
            )
        return min(LONGEST_PAUSE, 0.25 * 2 ** min(self._failures, 10))

    def _send(self) -> None:
        for part in ("losses", "scores", "pictures"):
            if part in self._stale:
                getattr(self, f"_show_{part}")()
                self._stale.discard(part)
        if not (self._scores or self._cleared):  # those of an earlier training under this name
            for window in ("scores", "score-curves"):
                self._server.client.close(win=f"{self._prefix}-{window}")
            self._cleared = True
        self._failures = 0
        if self._reported:
            self._reported = False
            self._say(f"the server at {self._server.address} is back")

    # The windows.

    def _show(self, method: str, window: str, title: str, content: tuple, **opts: Any) -> None:
        """Show a window by one of the client's methods: `line`, `text`, `image`."""
        window = f"{self._prefix}-{window}"
        taken = getattr(self._server.client, method)(
            *content, win=window, opts={"title": title, **opts}
        )
        if taken != window:
            raise ServerUnavailable("no sensible answer")
        self._shown.add(window)

    def _show_lines(
        self,
        window: str,
        title: str,
        curves: Mapping[str, Curve],
        layout: dict[str, Any],
        traces: Mapping[str, dict[str, Any]],
        **opts: Any,
    ) -> None:
        """Show curves; the page interprets names as HTML, so they are escaped."""
        points = max(len(xs) for xs, _ in curves.values())
        x = np.full((points, len(curves)), np.nan)
        y = x.copy()
        for column, (xs, ys) in enumerate(curves.values()):
            x[: len(xs), column], y[: len(ys), column] = xs, ys
        y[~np.isfinite(y)] = np.nan  # the page can't parse infinity
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(curves))]
        self._show(
            "line",
            window,
            title,
            (y, x),
            legend=[html.escape(name) for name in curves],
            linecolor=np.array([list(bytes.fromhex(colour[1:])) for colour in colours]),
            markersize=5,
            traceopts={"plotly": {html.escape(name): trace for name, trace in traces.items()}},
            # plotly's buttons in a column at the right, where they cover neither legend nor curves
            layoutopts={"plotly": {"title": None, "modebar": {"orientation": "v"}, **layout}},
            marginleft=55,
            marginright=32,
            margintop=15,
            marginbottom=45,
            **opts,
        )

    def _show_losses(self) -> None:
        thinned = {
            name: (thin(xs, MAX_POINTS), thin(ys, MAX_POINTS))
            for name, (xs, ys) in self._curves.items()
        }
        y_axis: dict[str, Any] = {"title": "loss"}
        values = np.concatenate([ys for _, ys in thinned.values()])
        if (most := range_without_spikes(values)) is not None:
            y_axis = {"title": "loss (double click: with spikes)", "range": most}
        layout = {
            "xaxis": {"title": "epoch"},
            "yaxis": y_axis,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        }
        few = {name: {"mode": "lines+markers"} for name, (xs, _) in thinned.items() if len(xs) <= 2}
        title = f"{self.title}: loss over time"
        self._show_lines("losses", title, thinned, layout, few, width=640, height=420)

    def _show_scores(self) -> None:
        """Show each score as a curve in axes of its own, and the newest scores as a table."""
        phase = self._scores[-1].get("phase", "val")
        count = len(self._score_curves)
        lowest = f"y{count}" if count > 1 else "y"
        layout: dict[str, Any] = {"xaxis": {"title": "epoch", "anchor": lowest}}
        traces = {}
        for i, name in enumerate(self._score_curves):
            number = "" if i == 0 else f"{i + 1}"
            top = 1 - i / count
            domain = [top - 0.8 / count, top]
            layout[f"yaxis{number}"] = {"title": html.escape(name), "domain": domain}
            traces[name] = {"yaxis": f"y{number}", "mode": "lines+markers"}
        title = f"{self.title}: scores on {phase} by epoch"
        size = {"width": 480, "height": 80 + 120 * count, "showlegend": False}
        self._show_lines("score-curves", title, self._score_curves, layout, traces, **size)

        names = list(self._score_curves)
        best = self._scores[-1].get("best", {}).get("epoch")
        cell = '<td style="padding: 2px 8px; text-align: right">'
        rows = ["".join(f"{cell}{html.escape(name)}</td>" for name in ["epoch", *names])]
        for record in reversed(self._scores[-SCORE_ROWS:]):
            values = [record["scores"].get(name) for name in names]
            texts = ["" if v is None else f"{v:.4g}" for v in values]
            epoch = record["epoch"]
            first = f"<b>{epoch}</b>" if epoch == best else f"{epoch}"
            rows.append("".join(f"{cell}{text}</td>" for text in [first, *texts]))
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        title = f"{self.title}: scores on {phase}"
        # wide enough for its title too
        width = max(90 + 90 * len(names), 40 + 8 * len(title))
        size = {"width": width, "height": 80 + 24 * len(rows)}
        self._show("text", "scores", title, (f"<table>{table}</table>",), **size)

    def _show_pictures(self) -> None:
        pictures, step = self._newest
        shrunk = {label: self._shrunk(array) for label, array in pictures.items()}
        least = min(LEAST_SIZE, self.winsize)
        if self.ncols <= 0:
            for i, (label, image) in enumerate(shrunk.items()):
                sides = enlarged(image.width, image.height, least)
                image = image.resize(sides, Image.Resampling.NEAREST)
                size = {"width": image.width + 20, "height": image.height + 36}
                channels_first = np.moveaxis(np.array(image), 2, 0)
                self._show("image", f"picture-{i}", label, (channels_first,), **size)
            return
        at = f": epoch {step['epoch']}, image {step['iters']}" if "epoch" in step else ""
        cells = []  # width, height and HTML of each
        for label, image in shrunk.items():
            width, height = enlarged(image.width, image.height, least)
            name, size = html.escape(label), f'width="{width}" height="{height}"'
            cell = (
                '<td style="padding: 2px 4px; text-align: center; vertical-align: bottom; '
                f'color: #333"><img src="{_data_url(image)}" {size} '
                f'style="image-rendering: pixelated" alt="{name}"><br>{name}</td>'
            )
            cells.append((width, height, cell))
        rows = [cells[i : i + self.ncols] for i in range(0, len(cells), self.ncols)]
        size = {
            "width": max(sum(width + 8 for width, *_ in row) for row in rows) + 24,
            "height": sum(max(height for _, height, _ in row) + 28 for row in rows) + 40,
        }
        table = "".join(f"<tr>{''.join(cell for *_, cell in row)}</tr>" for row in rows)
        content = f"<table>{table}</table>"
        self._show("text", "pictures", f"{self.title}{at}", (content,), **size)

    def _shrunk(self, picture: np.ndarray) -> Image.Image:
        """An image, reduced to at most the size at which the page shows it."""
        image = Image.fromarray(np.ascontiguousarray(picture))
        image.thumbnail((self.winsize, self.winsize), Image.Resampling.BOX, reducing_gap=None)
        return image


def _extend(curves: dict[str, Curve], x: float, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        xs, ys = curves.setdefault(str(name), (array("d"), array("d")))
        xs.append(x)
        ys.append(math.nan if value is None else value)


def _data_url(image: Image.Image) -> str:
    # PNG, so that any artefact is the network's, not the compression's; level 1 for speed.
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def enlarged(width: int, height: int, least: int) -> tuple[int, int]:
    """A size times the largest whole number for which no side exceeds `least`, at least times 1."""
    times = max(1, least // max(width, height))
    return width * times, height * times
