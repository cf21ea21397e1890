"""How one dense weight becomes the factors of a structure of a given size."""
