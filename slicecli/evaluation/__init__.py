"""Measuring what a model is worth, dense or sliced."""
