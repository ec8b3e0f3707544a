"""perplexity."""
