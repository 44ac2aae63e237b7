"""`qexport quantize`: calibrate -> solve -> encode -> write, one tensor or one block in memory at a time."""
