"""The gate on the slice that `--slicecli-slice` names."""

from __future__ import annotations

from slicecli.testing.slice_tests import SliceTests


class TestSlice(SliceTests):
    """The slice under test."""
