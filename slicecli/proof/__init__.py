"""Proving a declaration on small random models."""
