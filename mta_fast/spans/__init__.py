"""Text to character spans (extract), character spans to token ranges (align, batch), and the collator."""
