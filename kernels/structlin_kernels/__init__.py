"""Libraries of structlin's native kernel, which `structlin.kernels` finds and loads; there is nothing to import."""
