"""The conformance suite of byte streams, second part: cancellation, misuse, death and crowds."""

TROUBLE = []
