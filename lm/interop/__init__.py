"""Conversion to and from other software (Hugging Face folders, README.md), and between patterns."""
