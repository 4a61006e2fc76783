"""Figures JSON and self-contained pages."""
