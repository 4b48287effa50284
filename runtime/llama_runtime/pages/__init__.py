"""Pages for people: words and numbers, charts as SVG, and HTML that needs nothing beside it."""
