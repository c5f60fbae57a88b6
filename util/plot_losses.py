"""Plot an experiment's losses to a file: `python -m util.plot_losses checkpoints/<name>`."""

from pathlib import Path

from util.display.loss_plot import draw, panels_of_losses
from util.display.loss_record import read_records
from util.errors import OneLineParser, UserError, first_line, run_tool


def main() -> None:
    """Read the command line and draw."""
    parser = OneLineParser(
        prog="python -m util.plot_losses", description="Draw the loss curves of a run."
    )
    parser.add_argument("experiment", metavar="EXPERIMENT_DIR", help="such as checkpoints/NAME")
    parser.add_argument("--out", metavar="FILE", help="[default: EXPERIMENT_DIR/loss.png]")
    args = parser.parse_args()
    folder = Path(args.experiment)
    out = Path(args.out) if args.out else folder / "loss.png"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give that of a training, such as checkpoints/NAME")
    records = read_records(folder / "losses.jsonl")
    panels = panels_of_losses(records)
    if not panels:
        raise UserError(f"no losses are recorded in {folder / 'losses.jsonl'}")
    try:
        draw(panels, out, folder.resolve().name)
    except ValueError as e:  # a suffix that matplotlib does not know
        raise UserError(f"{out} can't be written: {first_line(e)}") from e
    except OSError as e:
        raise UserError(f"{out} can't be written: {e.strerror}; choose another --out") from e
    print(f"{len(records)} records drawn in {out}")


if __name__ == "__main__":
    run_tool(main)
