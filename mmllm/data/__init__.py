"""Records, sources, scenes, collation and the feature cache."""
