"""What GPU tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def measured(record_property):
    """Records a measurement for the result file (`gpu_results`): ``measured("peak memory", "1.23 GiB")``."""
    return record_property
