"""The maths: a readable torch reference for every operation, and fast twins tested against it.

Shape letters used in ops/ and model/:
B batch rows, T tokens, S keys, D hidden, V vocabulary, H heads, G groups (of heads; KV heads in attention),
K channels of an attention head, P channels of a Mamba head, N SSM state, C convolved channels, W taps of the
convolution, E experts, F feed-forward width, L latent width, M rows of routed tokens, Z chunks, Q tokens of a chunk.
"""
