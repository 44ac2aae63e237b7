"""Adapter files -> edits of tensors -> a plan -> a stream that reads, changes and writes at once.

adapter.py                     a directory that PEFT saved: config and tensors, on disk until wanted
settings.py, names.py          what its config says of a module; where that module lies in the checkpoint
lora_adapter.py, trained.py    LoRA and DoRA pairs, tensors trained whole: as edits, by our arithmetic
peft_adapter.py, peft_layers.py    every other kind: as edits that PEFT's own layers carry out
book.py, together.py           one adapter's edits; several adapters': in turn, in shares, combined
layout.py, plan.py             every tensor of the output, from names and shapes: ties, sizes, dtypes
base.py, vocabulary.py, replication.py, rope.py    which base, tokenizer, depth and context
sources.py, edits.py, stream.py    where rows come from, what is done to them, how they flow
lora.py, combine.py            the arithmetic: tensors in, tensors out
merge.py                       the verb
"""
