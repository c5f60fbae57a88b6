"""The record of a run, `losses.jsonl`, which the other views are made from."""

from __future__ import annotations

from typing import Any

from util.loss_record import LossRecord

from .base import Sink


class RecordSink(Sink):
    """Appends each record as one line."""

    name = "losses.jsonl"

    def __init__(self, record: LossRecord):
        self.record = record

    def log_losses(self, record: dict[str, Any]) -> None:
        self.record.append(record)

    def close(self) -> None:
        self.record.close()
