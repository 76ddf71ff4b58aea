"""Ground floor: the decoder, its configuration, and the files it is read from and written to."""
