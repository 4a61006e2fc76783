"""The trainer glue shared by every stage."""
