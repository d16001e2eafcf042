"""The world that the embedded micro model lives in."""
