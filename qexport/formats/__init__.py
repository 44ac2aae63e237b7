"""What the bytes of a quantized checkpoint look like: one module a format, writer and reader together."""
