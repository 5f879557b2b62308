"""Model families: one description per family, one engine for all."""
