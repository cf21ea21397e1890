"""How an equation runs: plans by predicted time, contraction, the native kernel, and the choice between them."""
