"""A teacher's outputs: of its passes, or from disk."""
