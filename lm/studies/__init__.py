"""Experiments about the framework itself, built on train.run."""
