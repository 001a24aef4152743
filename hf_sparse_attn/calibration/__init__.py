"""From a dense checkpoint to a sparse one: the hash and what every head reads, fitted on sample documents."""
