"""Pieces of mathematics that several ops share, each with its plain form."""
