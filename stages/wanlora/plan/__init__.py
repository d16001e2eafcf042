"""What a set of clips is, what it will cost, and how it looks, before any GPU is used."""
