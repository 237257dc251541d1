"""Formulas on tensors: bases, normal equations, ridges, and maps that read or write the stream."""
