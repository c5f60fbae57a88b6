"""Draw the losses of an experiment into a file: `python -m util.plot_losses checkpoints/<name>`."""

import sys

from util.display.loss_plot import main

if __name__ == "__main__":
    sys.exit(main())
