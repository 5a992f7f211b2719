"""One PEFT Per User: a private adapter of one language model for every user (arXiv 2402.04401)."""
