"""Kinds of weight matrix. There is one file for each, found by listing this folder.

A file holds one Flax module, named like the file in camel case, which derives from
lm.modules.linear.Matrix. Its additional fields are its options.
"""
