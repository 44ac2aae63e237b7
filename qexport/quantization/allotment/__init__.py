"""Which layers get how many bits, where the average or the size of the whole is given."""
