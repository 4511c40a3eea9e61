"""The maths: tensors and numbers in, tensors out; no options, no modules, no device of its own."""
