"""Reports: what they show, and how that becomes Markdown, pictures and a page."""
