"""The embedded micro model: its weights, the drawn world of its clips, and their recogniser."""
