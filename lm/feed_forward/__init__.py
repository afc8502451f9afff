"""Feed-forwards: what a layer computes of each token by itself, one file each, found by listing
this folder.

A file holds one Flax module, named as the file in camel case, which derives from
lm.modules.feed_forward.FeedForward; its fields are its options.
"""
