"""Checks the shapes and types that signatures promise, during tests only."""

from beartype import BeartypeConf, beartype

# int is accepted where float is written (PEP 484), as mypy does.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
