"""Texts and questions, and how they become rows of token ids."""
