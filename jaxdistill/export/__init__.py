"""Writing the student for other programs, from the stored integers and scales."""
