"""Feed-forwards: what a layer computes for each token by itself. There is one file for each, found
by listing this folder.

A file holds one Flax module, named like the file in camel case, which derives from
lm.modules.feed_forward.FeedForward. Its fields are its options.
"""
