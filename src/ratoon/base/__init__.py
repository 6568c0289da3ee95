"""The ground: errors, typed settings, named random streams, the catalogue of names."""
