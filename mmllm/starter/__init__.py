"""The starter recipe, quickstart, doctor and terminal chat."""
