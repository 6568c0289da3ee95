"""The next tokens."""
