"""Faults, injected into the real training command and counted: `python -m experiments.faults`."""
