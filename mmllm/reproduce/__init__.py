"""The armed effect runner."""
