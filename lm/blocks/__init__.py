"""Blocks: how a layer's mixer and feed-forward are joined to the residual stream, one file each,
found by listing this folder.

A file holds one Flax module, named as the file in camel case, with the methods of
lm/blocks/pre_norm.py; its fields, apart from context, mixer and mlp, are its options.
"""
