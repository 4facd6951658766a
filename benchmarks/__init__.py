"""Time, memory and exactness of the library beside its peers, on one machine, in one run."""
