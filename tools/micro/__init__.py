"""How the weights of the embedded micro model are made; not part of the wheel."""
