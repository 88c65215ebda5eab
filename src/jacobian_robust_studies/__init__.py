"""The studies: the note, the toy model, the simplifications, the comparison of defences."""
