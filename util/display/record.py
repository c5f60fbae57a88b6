"""The records of a run, `losses.jsonl` and `scores.jsonl`, which other views are made from."""

from __future__ import annotations

from typing import Any

from .base import Logger
from .loss_record import LossRecord


class RecordLogger(Logger):
    """Appends each record as one line."""

    name = "losses.jsonl"

    def __init__(self, record: LossRecord):
        self.record = record

    def log_losses(self, record: dict[str, Any]) -> None:
        self.record.append(record)

    def close(self) -> None:
        self.record.close()


class ScoreRecordLogger(Logger):
    """Appends the scores of each validation as one line."""

    name = "scores.jsonl"

    def __init__(self, record: LossRecord):
        self.record = record

    def log_scores(self, record: dict[str, Any]) -> None:
        self.record.append(record)

    def close(self) -> None:
        self.record.close()
