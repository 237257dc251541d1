"""The record of a slice, and its schema."""
