"""``python -m lightning_int8.bench``, where the command is not installed."""

import sys

from lightning_int8.bench.cli import main

sys.exit(main())
