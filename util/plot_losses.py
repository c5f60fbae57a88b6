"""Draw the losses of an experiment into a file: `python -m util.plot_losses checkpoints/<name>`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from util.display.loss_plot import draw, panels_of_losses
from util.display.loss_record import read_records
from util.errors import OneLineParser, UserError, first_line


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = OneLineParser(
        prog="python -m util.plot_losses", description="Draw the loss curves of a run."
    )
    parser.add_argument("experiment", metavar="EXPERIMENT_DIR", help="for one: checkpoints/NAME")
    parser.add_argument("--out", metavar="FILE", help="[default: EXPERIMENT_DIR/loss.png]")
    args = parser.parse_args(argv)
    folder = Path(args.experiment)
    out = Path(args.out) if args.out else folder / "loss.png"
    records = read_records(folder / "losses.jsonl")
    panels = panels_of_losses(records)
    try:
        if not panels:
            raise UserError(f"no losses are recorded in {folder / 'losses.jsonl'}")
        draw(panels, out, folder.resolve().name)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as e:  # ValueError: matplotlib knows no such suffix
        reason = getattr(e, "strerror", None) or first_line(e)
        print(f"error: {out} can't be written: {reason}", file=sys.stderr)
        return 1
    print(f"{len(records)} records drawn in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
