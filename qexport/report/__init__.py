"""Results as people and programs read them: rows, a table, Markdown, JSON."""
