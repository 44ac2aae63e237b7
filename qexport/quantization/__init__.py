"""`qexport quantize`: calibrate -> solve -> encode -> write, one tensor or one block in memory at a time."""

from qexport.quantization.quantize import planned_size, quantize, quantize_recipe

__all__ = ["planned_size", "quantize", "quantize_recipe"]
