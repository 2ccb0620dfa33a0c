"""Comparisons of methods: one folder a question, one runner (`run.py`) for all."""
