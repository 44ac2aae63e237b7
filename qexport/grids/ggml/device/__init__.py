"""The encoders in torch, for weights that lie on a GPU: the same searches, all blocks at once."""
