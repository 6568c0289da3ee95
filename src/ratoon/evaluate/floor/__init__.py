"""The cheap classics that a model must beat to be worth its cost: trained in seconds, without a network."""
