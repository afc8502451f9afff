"""Kinds of weight matrix, one file each, found by listing this folder.

A file holds one Flax module, named as the file in camel case, which derives from
lm.modules.linear.Matrix; its other fields are its options.
"""
