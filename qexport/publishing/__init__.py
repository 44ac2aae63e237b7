"""To the Hub: what of an output would go there, what must not, and sending it."""
