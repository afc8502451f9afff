"""Objectives: what a step minimises, one file each, found by listing this folder.

A file holds one frozen dataclass, named as the file in camel case, whose fields with defaults are
its options.
"""
