"""HTML pages for people: self-contained files that need no network."""
