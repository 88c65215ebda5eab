"""The studies: the note, the toy model, the simplifications, accuracy against robustness."""
