"""Tensor compute. This package imports without torch; modules that need it import it themselves."""
