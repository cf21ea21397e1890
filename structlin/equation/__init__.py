"""What a structure is: one equation over named modes, its sizes, and the registry of structures."""
