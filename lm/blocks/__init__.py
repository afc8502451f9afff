"""Blocks: how a layer's mixer and feed-forward are joined to the residual stream. There is one file
for each, found by listing this folder.

A file holds one Flax module, named like the file in camel case, with the methods of
lm/blocks/pre_norm.py. Its fields, apart from context, mixer and mlp, are its options.
"""
