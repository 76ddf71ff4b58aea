"""Ground floor: the integer lattice, its ranges, fake quantization, and the policy over a tree."""
