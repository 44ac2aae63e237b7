"""How the codes of a grid are chosen: tensors and a spec in, tensors out."""
