"""Weights in 4 bits. Apart from the teachers' own files, which are all imported: this one needs torchao."""
