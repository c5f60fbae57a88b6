#!/usr/bin/env python3
"""Read a whole data set and say what is wrong with it: the same as `python -m data.check`.

python scripts/check_dataset.py --dataroot ./datasets/maps
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # in front of the imports that take seconds

from data.check import main
from util.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
