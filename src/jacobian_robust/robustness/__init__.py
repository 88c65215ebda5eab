"""What an evaluation measures, and whether it is to be believed."""
