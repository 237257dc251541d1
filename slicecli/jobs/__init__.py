"""Whole jobs: from a request to a plan, and from the plan to finished folders."""
