"""A job as frozen tasks: built from a recipe, planned before it runs, skipped where its result stands."""
