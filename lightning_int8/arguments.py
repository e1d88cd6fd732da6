"""Numbers of a command line, refused where nothing could be done with them."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1.")
    return number


def count(text: str) -> int:
    """For argparse: a number of at least 1, also written as 5e6."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1, such as 5e6.")
    return int(number)
