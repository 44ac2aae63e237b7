"""Is the candidate whole, and what did it lose: reload, perplexity, BLEU, the gate."""
