"""Attention over paged KV, in place: decode, extend, latent rows, and the merge of partial results."""
