"""Training of the embedded micro model; not part of the wheel."""
