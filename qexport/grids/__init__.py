"""Which values a group of weights may take: pure arithmetic, `fit`, `encode` and `decode` side by side."""
