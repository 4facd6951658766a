"""Terms that objectives are made of; a term knows numbers, never an objective's name."""
