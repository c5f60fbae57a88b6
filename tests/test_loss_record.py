"""The record of losses: whole lines whatever happens, and nothing foreign is taken for one."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from util.display import loggers
from util.display.loggers import RecordLogger
from util.display.loss_record import append_record, cut, read_records, thin
from util.run.position import Position


def record(images: int, **losses) -> dict:
    return {
        "epoch": 1,
        "iters": images,
        "images": images,
        "progress": images / 100,
        "lr": 2e-4,
        "time": 0.1,
        "data": 0.01,
        "losses": losses or {"G": 1.5, "D": 0.5},
    }


def write(path, n: int) -> None:
    for i in range(1, n + 1):
        append_record(path, record(i))


def images(path) -> list[int]:
    return [r["images"] for r in read_records(path)]


def test_written_and_read(tmp_path):
    path = tmp_path / "losses.jsonl"
    append_record(path, record(1))
    assert read_records(path) == [record(1)]
    append_record(path, record(2, G=np.float32(0.25), D=3))
    assert read_records(path) == [record(1), record(2, G=0.25, D=3)]
    assert read_records(tmp_path / "none") == []


def test_what_json_does_not_have_is_null(tmp_path):
    path = tmp_path / "losses.jsonl"
    append_record(path, record(1, G=math.nan, D=math.inf, E=-math.inf, F=np.float64("nan")))
    line = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert line["losses"] == {"G": None, "D": None, "E": None, "F": None}
    (back,) = read_records(path)
    assert all(math.isnan(value) for value in back["losses"].values())


@pytest.mark.parametrize("size", [1, 40, 200_000])
def test_torn_last_line_is_cut_off(tmp_path, size):
    path = tmp_path / "losses.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    torn = json.dumps({**record(4), "x": "y" * size}).encode()[: size + 20]
    path.write_bytes(whole + torn)
    assert images(path) == [1, 2, 3]
    cut(path, "losses", lambda record: True)
    assert path.read_bytes() == whole
    append_record(path, record(4))
    assert images(path) == [1, 2, 3, 4]


def test_only_a_torn_line(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_bytes(b'{"epoch": 1, "los')
    cut(path, "losses", lambda record: True)
    assert path.read_bytes() == b""


def test_last_line_without_line_break_is_kept(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_text(json.dumps(record(1)))
    cut(path, "losses", lambda record: True)
    append_record(path, record(2))
    assert images(path) == [1, 2]


def test_foreign_lines_are_left_out(tmp_path):
    path = tmp_path / "losses.jsonl"
    write(path, 2)
    foreign = [
        b"not json",
        b"\xff\xfe\x00",
        b"",
        b"[1, 2]",
        b"null",
        b'{"losses": 3, "images": 1, "progress": 1}',
        b'{"losses": {}, "images": "1", "progress": 1}',
        b'{"losses": {}, "images": 1}',
        b"[" * 100_000,
    ]
    with open(path, "ab") as f:
        f.write(b"\n".join(foreign) + b"\n")
        f.write(json.dumps(record(3, G=1.0, text="x", flag=True)).encode() + b"\r\n")
    assert [r["losses"] for r in read_records(path)] == [record(1)["losses"]] * 2 + [{"G": 1.0}]


def test_cut(tmp_path):
    path = tmp_path / "losses.jsonl"
    write(path, 10)
    with open(path, "ab") as f:
        f.write(b"a foreign line\n")
    whole = path.read_bytes()
    cut(path, "losses", lambda r: r["images"] <= 20)
    assert path.read_bytes() == whole
    cut(path, "losses", lambda r: r["images"] <= 6)
    assert images(path) == [1, 2, 3, 4, 5, 6]
    assert b"a foreign line\n" in path.read_bytes()
    append_record(path, record(7))
    assert images(path) == [1, 2, 3, 4, 5, 6, 7]
    assert os.listdir(tmp_path) == ["losses.jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_says_so():
    with pytest.raises(OSError, match="No space"):
        append_record(Path("/dev/full"), record(1))


def test_thin():
    for n in (0, 1, 2, 999, 1000, 1001, 2000, 12_345):
        kept = thin(range(n), 1000)
        assert len(kept) <= 1000
        assert len(kept) == n if n <= 1000 else len(kept) >= 500
        assert kept[:1] == list(range(n))[:1]
        assert kept[-1:] == list(range(n))[-1:]
    # What was shown stays shown while the curve grows, but for its end.
    assert set(thin(range(3000), 1000)[:-1]) <= set(thin(range(3100), 1000))


def test_scores_of_an_epoch_that_is_scored_again_are_dropped(tmp_path):
    rows = [{"images": 8 * e, "progress": e, "epoch": e, "scores": {"L1": 0.1}} for e in (1, 2)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # saved with the last iteration of epoch 2, in front of its scores
    RecordLogger(tmp_path, "scores", Position(epoch=2, epoch_iter=8, total_iters=16)).close()
    assert [r["epoch"] for r in read_records(tmp_path / "scores.jsonl", "scores")] == [1]


def test_records_of_a_time_without_room_come_later(tmp_path, monkeypatch, capsys):
    logger = RecordLogger(tmp_path, "losses", Position())
    rows = [{"images": i, "progress": i / 9, "losses": {"G": float(i)}} for i in range(5)]
    disk = {}

    def append(path: Path, record: dict) -> None:
        if disk["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        append_record(path, record)

    monkeypatch.setattr(loggers, "append_record", append)
    for i, row in enumerate(rows):
        disk["full"] = i in (1, 2)
        logger.log_losses(row)
    logger.close()
    assert read_records(tmp_path / "losses.jsonl") == rows
    assert capsys.readouterr().err.count("No space left on device") == 1
