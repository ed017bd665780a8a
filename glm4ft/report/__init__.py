"""Reports for people: text in the terminal, Markdown, and a single HTML file with charts."""
