"""What models write: generated responses, pairs of them, and their scores."""
