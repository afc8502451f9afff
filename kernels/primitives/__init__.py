"""Pieces of mathematics that several ops share, each judged against a plain form."""
